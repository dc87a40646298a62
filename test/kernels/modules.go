// SPDX-License-Identifier: Apache-2.0

package kernels

import (
	"bytes"
	"context"
	"debug/elf"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
)

// A module is ready for insmod.
type module struct {
	name  string
	image []byte
}

// loadOrder returns the wanted modules with everything they depend on, each
// after its dependencies, decompressed, and the wanted ones that the kernel has
// neither as a module nor built in. Packages carry no modules.dep (depmod writes
// it when a kernel is installed), so the modules are asked themselves.
func loadOrder(ctx context.Context, t Tree, want []string) (order []module, absent []string, err error) {
	files := map[string]string{}
	builtin := map[string]bool{}
	for _, lib := range []string{"lib/modules", "usr/lib/modules"} {
		root := filepath.Join(t.Root, lib, t.Release)
		err := filepath.WalkDir(root, func(path string, d fs.DirEntry, err error) error {
			if err != nil || d.IsDir() {
				return err
			}
			if name := moduleName(path); name != "" {
				files[name] = path
			}
			return nil
		})
		if err != nil && !os.IsNotExist(err) {
			return nil, nil, fmt.Errorf("list the modules of %s: %w", t.Release, err)
		}
		text, err := os.ReadFile(filepath.Join(root, "modules.builtin"))
		if err != nil && !os.IsNotExist(err) {
			return nil, nil, fmt.Errorf("read what %s has built in: %w", t.Release, err)
		}
		for line := range strings.Lines(string(text)) {
			builtin[moduleName(strings.TrimSpace(line))] = true
		}
	}

	done := map[string]bool{}
	var add func(name, by string) error
	add = func(name, by string) error {
		if done[name] || builtin[name] {
			return nil
		}
		done[name] = true
		file, ok := files[name]
		if !ok && by == "" {
			absent = append(absent, name)
			return nil
		}
		if !ok {
			return fmt.Errorf("module %s of %s needs %s, which its packages do not have", by, t.Release, name)
		}
		image, err := decompress(ctx, file)
		if err != nil {
			return err
		}
		depends, err := moduleDepends(image)
		if err != nil {
			return fmt.Errorf("read module %s: %w", file, err)
		}
		for _, d := range depends {
			if err := add(d, name); err != nil {
				return err
			}
		}
		order = append(order, module{name: name, image: image})
		return nil
	}
	for _, name := range want {
		if err := add(name, ""); err != nil {
			return nil, nil, err
		}
	}
	return order, absent, nil
}

// moduleName is the name lsmod shows for a module's file, empty for other files.
func moduleName(path string) string {
	base := filepath.Base(path)
	for _, suffix := range []string{".ko", ".ko.xz", ".ko.zst", ".ko.gz"} {
		if name, ok := strings.CutSuffix(base, suffix); ok {
			return strings.ReplaceAll(name, "-", "_")
		}
	}
	return ""
}

func decompress(ctx context.Context, file string) ([]byte, error) {
	switch filepath.Ext(file) {
	case ".xz":
		return command(ctx, nil, "", "xz", "-dc", file)
	case ".zst":
		return command(ctx, nil, "", "zstd", "-dcq", file)
	case ".gz":
		return command(ctx, nil, "", "gzip", "-dc", file)
	}
	image, err := os.ReadFile(file)
	if err != nil {
		return nil, fmt.Errorf("read a module: %w", err)
	}
	return image, nil
}

// moduleDepends reads depends= of a module's .modinfo.
func moduleDepends(image []byte) ([]string, error) {
	f, err := elf.NewFile(bytes.NewReader(image))
	if err != nil {
		return nil, err
	}
	section := f.Section(".modinfo")
	if section == nil {
		return nil, fmt.Errorf("no .modinfo section")
	}
	info, err := section.Data()
	if err != nil {
		return nil, err
	}
	return parseModinfo(info), nil
}

func parseModinfo(info []byte) []string {
	var names []string
	for entry := range strings.SplitSeq(string(info), "\x00") {
		value, ok := strings.CutPrefix(entry, "depends=")
		if !ok {
			continue
		}
		for name := range strings.SplitSeq(value, ",") {
			if name != "" {
				names = append(names, strings.ReplaceAll(name, "-", "_"))
			}
		}
	}
	return names
}
