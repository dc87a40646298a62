// SPDX-License-Identifier: Apache-2.0

package containerd

import (
	"archive/tar"
	"bytes"
	"crypto/sha256"
	"encoding/json"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
)

// An Image is an OCI image of one layer, or of two with a base.
type Image struct {
	Names      []string          // "registry.example/mooring/app:1"
	Files      map[string]string // static binaries of this machine, by their place in the image
	Entrypoint []string

	Base        string   // a directory that is a root file system, below the files
	Command     []string // the entry point's arguments
	Environment []string // PATH=/bin:/ when there is none
}

// A descriptor is OCI's reference to a blob.
type descriptor struct {
	MediaType   string            `json:"mediaType"`
	Digest      string            `json:"digest"`
	Size        int64             `json:"size"`
	Annotations map[string]string `json:"annotations,omitempty"`
	Platform    map[string]string `json:"platform,omitempty"`
}

// Write writes the image as an archive that `ctr images import` reads. The same
// files give the same image.
func (i Image) Write(path string) error {
	layer, err := i.layer()
	if err != nil {
		return fmt.Errorf("image %s: %w", i.Names[0], err)
	}
	out, err := os.Create(path)
	if err != nil {
		return fmt.Errorf("image %s: %w", i.Names[0], err)
	}
	defer out.Close()
	archive := archive{tar.NewWriter(out)}

	contents := [][]byte{layer}
	if i.Base != "" {
		base, err := exec.Command("tar", "--numeric-owner", "-C", i.Base, "-c", ".").Output()
		if err != nil {
			return fmt.Errorf("image %s: tar of %s: %w", i.Names[0], i.Base, err)
		}
		contents = [][]byte{base, layer}
	}
	var layers []descriptor
	var digests []string
	for _, content := range contents {
		l, err := archive.blob("application/vnd.oci.image.layer.v1.tar", content)
		if err != nil {
			return fmt.Errorf("image %s: %w", i.Names[0], err)
		}
		layers, digests = append(layers, l), append(digests, l.Digest)
	}
	environment := i.Environment
	if environment == nil {
		environment = []string{"PATH=/bin:/"}
	}
	platform := map[string]string{"architecture": runtime.GOARCH, "os": "linux"}
	config, err := archive.object("application/vnd.oci.image.config.v1+json", map[string]any{
		"architecture": platform["architecture"], "os": platform["os"],
		"config": map[string]any{"Entrypoint": i.Entrypoint, "Cmd": i.Command, "Env": environment, "WorkingDir": "/"},
		"rootfs": map[string]any{"type": "layers", "diff_ids": digests},
	})
	if err != nil {
		return fmt.Errorf("image %s: %w", i.Names[0], err)
	}
	manifest, err := archive.object("application/vnd.oci.image.manifest.v1+json", map[string]any{
		"schemaVersion": 2, "mediaType": "application/vnd.oci.image.manifest.v1+json",
		"config": config, "layers": layers,
	})
	if err != nil {
		return fmt.Errorf("image %s: %w", i.Names[0], err)
	}
	var index []descriptor
	for _, name := range i.Names {
		named := manifest
		named.Platform = platform
		named.Annotations = map[string]string{"io.containerd.image.name": name, "org.opencontainers.image.ref.name": name}
		index = append(index, named)
	}
	document, err := json.Marshal(map[string]any{"schemaVersion": 2, "manifests": index})
	if err != nil {
		return fmt.Errorf("image %s: %w", i.Names[0], err)
	}
	for _, f := range []struct {
		name    string
		content []byte
	}{{"oci-layout", []byte(`{"imageLayoutVersion":"1.0.0"}`)}, {"index.json", document}} {
		if err := archive.file(f.name, 0o644, f.content); err != nil {
			return fmt.Errorf("image %s: %w", i.Names[0], err)
		}
	}
	if err := archive.Close(); err != nil {
		return fmt.Errorf("image %s: %w", i.Names[0], err)
	}
	return out.Close()
}

// layer is the image's file system.
func (i Image) layer() ([]byte, error) {
	var out bytes.Buffer
	files := archive{tar.NewWriter(&out)}
	made := map[string]bool{".": true}
	var directories func(path string, mode int64) error
	directories = func(path string, mode int64) error {
		if made[path] {
			return nil
		}
		made[path] = true
		if err := directories(filepath.Dir(path), 0o755); err != nil {
			return err
		}
		return files.WriteHeader(&tar.Header{Typeflag: tar.TypeDir, Name: path + "/", Mode: mode})
	}
	for _, d := range []struct {
		path string
		mode int64
	}{{"etc", 0o755}, {"tmp", 0o1777}} {
		if err := directories(d.path, d.mode); err != nil {
			return nil, err
		}
	}
	if err := files.file("etc/passwd", 0o644, []byte("root:x:0:0:root:/:/\nnobody:x:65534:65534:nobody:/:/\n")); err != nil {
		return nil, err
	}
	var places []string
	for place := range i.Files {
		places = append(places, place)
	}
	slices.Sort(places)
	for _, place := range places {
		content, err := os.ReadFile(i.Files[place])
		if err != nil {
			return nil, err
		}
		path := strings.TrimPrefix(place, "/")
		if err := directories(filepath.Dir(path), 0o755); err != nil {
			return nil, err
		}
		if err := files.file(path, 0o755, content); err != nil {
			return nil, err
		}
	}
	if err := files.Close(); err != nil {
		return nil, err
	}
	return out.Bytes(), nil
}

// archive is a tar file being written.
type archive struct{ *tar.Writer }

func (a archive) file(name string, mode int64, content []byte) error {
	if err := a.WriteHeader(&tar.Header{Typeflag: tar.TypeReg, Name: name, Mode: mode, Size: int64(len(content))}); err != nil {
		return err
	}
	_, err := io.Copy(a, bytes.NewReader(content))
	return err
}

func (a archive) blob(mediaType string, content []byte) (descriptor, error) {
	sum := fmt.Sprintf("%x", sha256.Sum256(content))
	err := a.file("blobs/sha256/"+sum, 0o644, content)
	return descriptor{MediaType: mediaType, Digest: "sha256:" + sum, Size: int64(len(content))}, err
}

func (a archive) object(mediaType string, v any) (descriptor, error) {
	content, err := json.Marshal(v)
	if err != nil {
		return descriptor{}, err
	}
	return a.blob(mediaType, content)
}
