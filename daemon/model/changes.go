// SPDX-License-Identifier: Apache-2.0

package model

import (
	"fmt"
	"strings"
)

// Changes is what a source of objects (a directory of manifests, the
// Kubernetes API) tells: the objects that became different since the delivery
// before. A nil value says that the object is gone. The first delivery with
// Synced holds everything there is; until then nothing may be concluded from
// an object's absence.
//
// The objects belong to all who receive them: nobody writes to them.
type Changes struct {
	Synced     bool
	Services   map[Name]*Service
	Slices     map[Name]*EndpointSlice
	Pods       map[Name]*Pod
	Namespaces map[string]*Namespace
	Nodes      map[string]*Node
	Policies   map[Name]*Policy

	ClusterPolicies map[string]*ClusterPolicy

	// Problems are all that the source has at this time, not only new ones.
	Problems []Problem
}

// Len counts the changed objects.
func (c *Changes) Len() int {
	return len(c.Services) + len(c.Slices) + len(c.Pods) + len(c.Namespaces) + len(c.Nodes) + len(c.Policies) + len(c.ClusterPolicies)
}

// Problem is something wrong with an object that somebody has to mend, while
// all that is sound about it stays in use.
type Problem struct {
	File     string // manifest; empty for objects of the API
	Document int    // in the file, from 1; 0: the file as a whole
	Object   string // "Service default/web", where it is known
	Field    string // "spec.ports[2].port", where it is one field
	Message  string // what is wrong and what helps
}

func (p Problem) String() string {
	var b strings.Builder
	b.WriteString(p.File)
	if p.Document > 0 {
		if p.File != "" {
			b.WriteString(" ")
		}
		fmt.Fprintf(&b, "document %d", p.Document)
	}
	for _, part := range []string{p.Object, p.Field, p.Message} {
		if part == "" {
			continue
		}
		if b.Len() > 0 {
			b.WriteString(": ")
		}
		b.WriteString(part)
	}
	return b.String()
}

// CompareProblems orders problems for people: by file, document and object.
func CompareProblems(a, b Problem) int {
	if c := strings.Compare(a.File, b.File); c != 0 {
		return c
	}
	if a.Document != b.Document {
		return a.Document - b.Document
	}
	if c := strings.Compare(a.Object, b.Object); c != 0 {
		return c
	}
	if c := strings.Compare(a.Field, b.Field); c != 0 {
		return c
	}
	return strings.Compare(a.Message, b.Message)
}
