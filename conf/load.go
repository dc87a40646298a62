// SPDX-License-Identifier: Apache-2.0

package conf

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"os"
	"slices"
	"strconv"
	"strings"

	"github.com/spf13/pflag"
	"go.yaml.in/yaml/v3"
)

// Error is a value that cannot be used, and where it stands.
type Error struct {
	File string // empty when a flag or a default is at fault
	Line int    // 0 when the whole file is
	Flag string // without dashes; empty when the file is at fault
	Key  string
	Msg  string // ends with the accepted values
}

func (e *Error) Error() string {
	var where []string
	switch {
	case e.Flag != "":
		where = append(where, "--"+e.Flag)
	case e.Line > 0:
		where = append(where, e.File+":"+strconv.Itoa(e.Line))
	case e.File != "":
		where = append(where, e.File)
	}
	if e.Key != "" && e.Flag == "" {
		where = append(where, e.Key)
	}
	return strings.Join(append(where, e.Msg), ": ")
}

// RegisterFlags adds a flag for every key. Load takes those that were given.
func RegisterFlags(flags *pflag.FlagSet) {
	defaults := Default()
	for i := range options {
		o := &options[i]
		f := flags.VarPF(&flag{option: o, values: o.get(&defaults)}, flagName(o.key), "", o.usage)
		if o.key == "masquerade" {
			f.NoOptDefVal = "true"
		}
	}
}

// flag is the value of one key on the command line.
type flag struct {
	*option
	values []string
	given  bool
}

func (f *flag) String() string {
	if f.option == nil { // pflag asks a zero value whether the default is worth printing
		return ""
	}
	return strings.Join(f.values, ",")
}

func (f *flag) Type() string {
	switch {
	case f.list:
		return "list"
	case f.key == "masquerade":
		return "bool"
	}
	return "string"
}

// Set checks at once, so that a wrong flag is wrong usage. A list flag that is
// given again adds to the list.
func (f *flag) Set(s string) error {
	values := []string{s}
	if f.list {
		values = split(s)
		if f.given {
			values = append(slices.Clone(f.values), values...)
		}
	}
	if err := f.set(new(Config), values); err != nil {
		return fmt.Errorf("%w; accepted: %s", err, f.accepted)
	}
	f.values, f.given = values, true
	return nil
}

func split(s string) []string {
	if s == "" {
		return nil
	}
	values := strings.Split(s, ",")
	for i := range values {
		values[i] = strings.TrimSpace(values[i])
	}
	return values
}

// Load reads the file at path (none when path is empty), lets the given flags
// win over it, and checks the whole. flags may be nil.
func Load(path string, flags *pflag.FlagSet) (Config, error) {
	c := Default()
	origin := map[string]Error{}
	if path != "" {
		data, err := os.ReadFile(path)
		if err != nil {
			return Config{}, fmt.Errorf("read the configuration: %w", err)
		}
		if err := c.decode(path, data, origin); err != nil {
			return Config{}, err
		}
	}
	if err := c.apply(flags, origin); err != nil {
		return Config{}, err
	}
	if c.NodeName == "" {
		hostname, err := os.Hostname()
		if err != nil {
			return Config{}, fmt.Errorf("nodeName is the hostname, which is not known: %w", err)
		}
		// Kubernetes has node names in lower case.
		c.NodeName = strings.ToLower(hostname)
	}
	if err := c.Validate(); err != nil {
		var e *Error
		if errors.As(err, &e) {
			at := origin[e.Key]
			e.File, e.Line, e.Flag = at.File, at.Line, at.Flag
			if e.File == "" && e.Flag == "" {
				e.File = path
			}
		}
		return Config{}, err
	}
	return c, nil
}

// apply sets what the command line gives.
func (c *Config) apply(flags *pflag.FlagSet, origin map[string]Error) error {
	if flags == nil {
		return nil
	}
	var err error
	flags.Visit(func(f *pflag.Flag) {
		given, ours := f.Value.(*flag)
		if !ours || err != nil {
			return
		}
		at := Error{Flag: f.Name, Key: given.key}
		origin[given.key] = at
		if e := given.set(c, given.values); e != nil {
			at.Msg = fmt.Sprintf("%v; accepted: %s", e, given.accepted)
			err = &at
		}
	})
	return err
}

// decode reads the YAML document data of the file path into c, and notes where
// each key stands.
func (c *Config) decode(path string, data []byte, origin map[string]Error) error {
	decoder := yaml.NewDecoder(bytes.NewReader(data))
	var document yaml.Node
	if err := decoder.Decode(&document); err != nil {
		if errors.Is(err, io.EOF) {
			return nil
		}
		return syntax(path, err)
	}
	var second yaml.Node
	switch err := decoder.Decode(&second); {
	case err == nil:
		return &Error{File: path, Line: second.Line, Msg: "a second YAML document; accepted: one"}
	case !errors.Is(err, io.EOF):
		return syntax(path, err)
	}
	if len(document.Content) == 0 {
		return nil
	}
	return c.section(path, "", document.Content[0], origin)
}

// syntax turns "yaml: line 3: did not find ..." into the form of other errors.
func syntax(path string, err error) error {
	msg := strings.TrimPrefix(err.Error(), "yaml: ")
	line := 0
	if rest, found := strings.CutPrefix(msg, "line "); found {
		number, text, _ := strings.Cut(rest, ": ")
		if n, err := strconv.Atoi(number); err == nil {
			line, msg = n, text
		}
	}
	return &Error{File: path, Line: line, Msg: "not YAML: " + msg}
}

// section reads the mapping whose keys all begin with prefix.
func (c *Config) section(path, prefix string, node *yaml.Node, origin map[string]Error) error {
	node = resolve(node)
	if isNull(node) { // every key of the section is commented out
		return nil
	}
	if node.Kind != yaml.MappingNode {
		return &Error{File: path, Line: node.Line, Key: strings.TrimSuffix(prefix, "."), Msg: "not a mapping; accepted keys: " + strings.Join(children(prefix), ", ")}
	}
	seen := map[string]int{}
	for i := 0; i+1 < len(node.Content); i += 2 {
		name, value := node.Content[i], resolve(node.Content[i+1])
		key := prefix + name.Value
		at := Error{File: path, Line: name.Line, Key: key}
		refuse := func(format string, args ...any) error {
			at.Msg = fmt.Sprintf(format, args...)
			return &at
		}
		if name.Kind != yaml.ScalarNode || !slices.Contains(children(prefix), name.Value) {
			return refuse("unknown key; accepted keys: %s", strings.Join(children(prefix), ", "))
		}
		if line, twice := seen[name.Value]; twice {
			return refuse("set twice, first in line %d; accepted: once", line)
		}
		seen[name.Value] = name.Line

		n := slices.IndexFunc(options, func(o option) bool { return o.key == key })
		if n < 0 {
			if err := c.section(path, key+".", value, origin); err != nil {
				return err
			}
			continue
		}
		o := &options[n]
		values, err := scalars(value, o.list)
		if err == nil {
			err = o.set(c, values)
		}
		if err != nil {
			return refuse("%v; accepted: %s", err, o.accepted)
		}
		origin[key] = at
	}
	return nil
}

// children lists the keys that can stand below prefix, in the table's order.
func children(prefix string) []string {
	var names []string
	for _, o := range options {
		if rest, found := strings.CutPrefix(o.key, prefix); found {
			name, _, _ := strings.Cut(rest, ".")
			if !slices.Contains(names, name) {
				names = append(names, name)
			}
		}
	}
	return names
}

// scalars reads the value of a key: one scalar, or a list of them where the key
// is a list.
func scalars(node *yaml.Node, list bool) ([]string, error) {
	switch {
	case isNull(node):
		return nil, errors.New("no value")
	case list && node.Kind == yaml.SequenceNode:
		var values []string
		for _, item := range node.Content {
			item = resolve(item)
			if item.Kind != yaml.ScalarNode || isNull(item) {
				return nil, fmt.Errorf("line %d holds no single value", item.Line)
			}
			values = append(values, item.Value)
		}
		return values, nil
	case list && node.Kind == yaml.ScalarNode:
		return split(node.Value), nil
	case node.Kind == yaml.SequenceNode:
		return nil, errors.New("a list")
	case node.Kind != yaml.ScalarNode:
		return nil, errors.New("a mapping")
	}
	return []string{node.Value}, nil
}

func resolve(node *yaml.Node) *yaml.Node {
	if node.Kind == yaml.AliasNode {
		return node.Alias
	}
	return node
}

func isNull(node *yaml.Node) bool {
	return node.Kind == yaml.ScalarNode && node.Tag == "!!null"
}

// Validate checks every value by itself and all of them together.
func (c Config) Validate() error {
	for _, o := range options {
		scratch := c
		if err := o.set(&scratch, o.get(&c)); err != nil {
			return &Error{Key: o.key, Msg: fmt.Sprintf("%v; accepted: %s", err, o.accepted)}
		}
	}
	switch {
	case c.Manifests != "" && c.Kubeconfig != "":
		return &Error{Key: "manifests", Msg: "kubeconfig is set too; accepted: exactly one of manifests and kubeconfig"}
	case c.Manifests == "" && c.Kubeconfig == "" && !InCluster():
		return &Error{Key: "manifests", Msg: "no source of services: this is not a pod of a cluster; accepted: exactly one of manifests (a directory) and kubeconfig (a file)"}
	case c.Manifests != "" && len(c.PodCIDRs) == 0:
		return &Error{Key: "podCIDRs", Msg: "not set, and with manifests there is no Node object to take them from; accepted: " + c.accepted("podCIDRs")}
	}
	return nil
}

func (Config) accepted(key string) string {
	return options[slices.IndexFunc(options, func(o option) bool { return o.key == key })].accepted
}
