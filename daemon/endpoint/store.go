// SPDX-License-Identifier: Apache-2.0

package endpoint

import (
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strconv"
	"strings"

	"github.com/mooring-cni/mooring/daemon/model"
)

// store keeps a file for each endpoint: DIR/ID.json, written beside and
// renamed, so that a daemon killed at any moment finds each endpoint whole or
// not at all.
//
// There is no fsync, which would cost an ADD a millisecond on a good disk and
// a hundred on a bad one. Nothing needs it: an endpoint never outlives the
// kernel that holds its interface. A file that the power cut off is one of an
// endpoint that is gone.
type store struct{ dir string }

const suffix = ".json"

func (s store) path(id uint32) string {
	return filepath.Join(s.dir, strconv.FormatUint(uint64(id), 10)+suffix)
}

func (s store) write(e model.Endpoint) error {
	content, err := json.Marshal(e)
	if err != nil {
		return err
	}
	path := s.path(e.ID)
	if err := os.WriteFile(path+".new", append(content, '\n'), 0o600); err != nil {
		os.Remove(path + ".new")
		return err
	}
	return os.Rename(path+".new", path)
}

func (s store) remove(id uint32) error {
	if err := os.Remove(s.path(id)); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	return nil
}

// read returns what is stored. Files that cannot be an endpoint are removed
// and told.
func (s store) read() (endpoints []model.Endpoint, unsound []error, err error) {
	if err := os.MkdirAll(s.dir, 0o700); err != nil {
		return nil, nil, err
	}
	files, err := os.ReadDir(s.dir)
	if err != nil {
		return nil, nil, err
	}
	for _, file := range files {
		path := filepath.Join(s.dir, file.Name())
		if strings.HasSuffix(file.Name(), suffix+".new") {
			os.Remove(path) // of a daemon killed between write and rename
			continue
		}
		number, ok := strings.CutSuffix(file.Name(), suffix)
		if !ok {
			continue // not ours
		}
		e, err := readFile(path, number)
		if err != nil {
			unsound = append(unsound, fmt.Errorf("endpoint file %s forgotten: %w", path, err))
			os.Remove(path)
			continue
		}
		endpoints = append(endpoints, e)
	}
	return endpoints, unsound, nil
}

func readFile(path, number string) (e model.Endpoint, err error) {
	content, err := os.ReadFile(path)
	if err != nil {
		return e, err
	}
	if err := json.Unmarshal(content, &e); err != nil {
		return e, err
	}
	if strconv.FormatUint(uint64(e.ID), 10) != number {
		return e, fmt.Errorf("it holds endpoint %d", e.ID)
	}
	return e, validate(e)
}
