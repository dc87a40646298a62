// SPDX-License-Identifier: Apache-2.0

//go:build root

package cni

import (
	"os"
	"testing"

	"github.com/mooring-cni/mooring/test/cnitool"
	"github.com/mooring-cni/mooring/test/scenario"
)

func TestMain(m *testing.M) {
	code := m.Run()
	scenario.RemovePrograms()
	os.Exit(code)
}

func TestADDAndDELTakeNoLongerThanThoseOfBridge(t *testing.T) {
	references, err := cnitool.References()
	if err != nil {
		t.Fatal(err)
	}
	node := scenario.NewNode(t)
	node.Up()
	r := Measure(t, node.Node, node.Programs, references, 15)
	t.Logf("\n%s", r)
	if r.ADDRatio() > 1 || r.DELRatio() > 1 {
		t.Errorf("slower than bridge with host-local:\n%s", r)
	}
}
