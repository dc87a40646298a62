// SPDX-License-Identifier: Apache-2.0

package policy

import (
	"crypto/sha256"
	"encoding/binary"
)

// ID names an identity, a ruleset or a profile in the datapath's maps. It
// follows from what it names, so a restarted daemon finds in the maps what it
// would write, and no number means something else than a moment before.
type ID uint64

// The numbers that the programs know. What they read as zero was not written
// yet, or is gone: it denies.
const (
	None ID = 0

	Host ID = 1 // identity: this node itself, always allowed
	Open ID = 1 // ruleset: nothing is enforced
	All  ID = 1 // profile: every port of every protocol

	firstID ID = 16
)

// An identity's lowest two bits are its group: whether it is a pod, and its
// family. Most identities of a group have one verdict in a ruleset. It is
// written once, under the identity that Common gives, and the others beside it.
const groups = 4

// Common is who stands for the identities of i's group in a ruleset's verdicts.
func (i ID) Common() ID { return groups | i%groups }

// numbers gives every content its number and no two contents the same.
type numbers struct {
	byContent map[string]ID
	taken     map[ID]string
}

func newNumbers() *numbers {
	return &numbers{byContent: make(map[string]ID), taken: make(map[ID]string)}
}

func (n *numbers) of(content string) ID { return n.in(0, content) }

// in gives a number of a group.
func (n *numbers) in(group ID, content string) ID {
	if id, ok := n.byContent[content]; ok {
		return id
	}
	sum := sha256.Sum256([]byte(content))
	id := ID(binary.BigEndian.Uint64(sum[:]))
	for id = id - id%groups + group; id < firstID || n.taken[id] != ""; {
		id += groups
	}
	n.byContent[content], n.taken[id] = id, content
	return id
}

func (n *numbers) release(id ID) {
	delete(n.byContent, n.taken[id])
	delete(n.taken, id)
}
