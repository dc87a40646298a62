// SPDX-License-Identifier: Apache-2.0

package kernels

import (
	"bufio"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path"
	"path/filepath"
	"slices"
	"strings"
)

// An image collects what becomes the guest's root file system. The guest has a
// merged /usr whatever the machine has: /bin, /sbin, /lib and /lib64 are links.
type image struct {
	files map[string]file
}

type file struct {
	mode fs.FileMode
	// One of the two: bytes (a link's target, for a symbolic link) or a path.
	data []byte
	from string
}

func newImage() *image {
	im := &image{files: map[string]file{}}
	for _, d := range []string{"bin", "sbin", "lib", "lib64"} {
		im.mkdir("/usr/" + d)
		im.files["/"+d] = file{mode: fs.ModeSymlink | 0o777, data: []byte("usr/" + d)}
	}
	return im
}

// inGuest maps a machine's path to the guest's merged /usr.
func inGuest(name string) string {
	name = path.Clean("/" + name)
	for _, d := range []string{"/bin/", "/sbin/", "/lib/", "/lib64/"} {
		if strings.HasPrefix(name, d) {
			return "/usr" + name
		}
	}
	return name
}

func (im *image) mkdir(name string) {
	for name != "/" {
		if _, ok := im.files[name]; ok {
			return
		}
		im.files[name] = file{mode: fs.ModeDir | 0o755}
		name = path.Dir(name)
	}
}

func (im *image) write(name string, mode fs.FileMode, data []byte) {
	name = inGuest(name)
	im.mkdir(path.Dir(name))
	im.files[name] = file{mode: mode, data: data}
}

func (im *image) link(name, target string) {
	im.write(name, fs.ModeSymlink|0o777, []byte(target))
}

// copy adds a file, or everything below a directory, as name.
func (im *image) copy(name, from string) error {
	return filepath.WalkDir(from, func(p string, d fs.DirEntry, err error) error {
		if err != nil {
			return fmt.Errorf("take %s into the guest: %w", from, err)
		}
		rel, err := filepath.Rel(from, p)
		if err != nil {
			return fmt.Errorf("take %s into the guest: %w", p, err)
		}
		to := inGuest(path.Join(name, filepath.ToSlash(rel)))
		info, err := os.Stat(p)
		if err != nil {
			return fmt.Errorf("take %s into the guest: %w", p, err)
		}
		if info.IsDir() {
			im.mkdir(to)
			return nil
		}
		im.mkdir(path.Dir(to))
		im.files[to] = file{mode: info.Mode().Perm(), from: p}
		return nil
	})
}

// save writes the image as an uncompressed cpio archive ("newc"), which the
// kernel unpacks into its first root file system: an emulated processor takes
// longer to inflate than to read.
func (im *image) save(to string) (err error) {
	out, err := os.Create(to)
	if err != nil {
		return fmt.Errorf("write the guest's image: %w", err)
	}
	defer func() {
		if closing := out.Close(); err == nil && closing != nil {
			err = fmt.Errorf("write the guest's image: %w", closing)
		}
	}()
	w := &cpio{w: bufio.NewWriterSize(out, 1<<20)}
	names := make([]string, 0, len(im.files))
	for name := range im.files {
		names = append(names, name)
	}
	// Sorted, a directory comes before what is in it, as the kernel needs it.
	slices.Sort(names)
	for _, name := range names {
		if err := w.add(name, im.files[name]); err != nil {
			return fmt.Errorf("write %s to the guest's image: %w", name, err)
		}
	}
	if err := w.close(); err != nil {
		return fmt.Errorf("write the guest's image: %w", err)
	}
	return nil
}

type cpio struct {
	w     *bufio.Writer
	inode int
	at    int64
}

const (
	cpioDir  = 0o040000
	cpioFile = 0o100000
	cpioLink = 0o120000
)

func (c *cpio) add(name string, f file) error {
	mode := uint32(f.mode.Perm())
	switch {
	case f.mode&fs.ModeDir != 0:
		mode |= cpioDir
	case f.mode&fs.ModeSymlink != 0:
		mode |= cpioLink
	default:
		mode |= cpioFile
	}
	if f.from == "" {
		return c.entry(strings.TrimPrefix(name, "/"), mode, int64(len(f.data)), strings.NewReader(string(f.data)))
	}
	in, err := os.Open(f.from)
	if err != nil {
		return err
	}
	defer in.Close()
	info, err := in.Stat()
	if err != nil {
		return err
	}
	return c.entry(strings.TrimPrefix(name, "/"), mode, info.Size(), in)
}

func (c *cpio) entry(name string, mode uint32, size int64, body io.Reader) error {
	c.inode++
	// Magic, inode, mode, uid, gid, links, mtime, size, device and special device
	// (major and minor each), the name's size with its NUL, no checksum.
	n, err := fmt.Fprintf(c.w, "070701%08x%08x%08x%08x%08x%08x%08x%08x%08x%08x%08x%08x%08x%s\x00",
		c.inode, mode, 0, 0, 1, 0, size, 0, 0, 0, 0, len(name)+1, 0, name)
	if err != nil {
		return err
	}
	c.at += int64(n)
	if err := c.pad(); err != nil {
		return err
	}
	copied, err := io.Copy(c.w, body)
	if err != nil {
		return err
	}
	if copied != size {
		return fmt.Errorf("changed from %d to %d bytes while it was read", size, copied)
	}
	c.at += copied
	return c.pad()
}

// pad fills up to the next multiple of four.
func (c *cpio) pad() error {
	for c.at%4 != 0 {
		if err := c.w.WriteByte(0); err != nil {
			return err
		}
		c.at++
	}
	return nil
}

func (c *cpio) close() error {
	if err := c.entry("TRAILER!!!", 0, 0, strings.NewReader("")); err != nil {
		return err
	}
	return c.w.Flush()
}
