// SPDX-License-Identifier: Apache-2.0

package bpf

import "testing"

func TestGenerations(t *testing.T) {
	const low, epoch = 1<<generationBits - 1, 1 << generationBits
	for _, test := range []struct {
		from   uint32
		forget bool
		want   uint32
	}{
		{0, false, 1},
		{1, false, 2},
		{low, false, 1},
		{3 * epoch, false, 3*epoch + 1},
		{3*epoch + low, false, 3*epoch + 1},
		{1, true, epoch + 2},
		{low, true, epoch + 1},
		{255*epoch + 7, true, 8},
	} {
		if got := next(test.from, test.forget); got != test.want {
			t.Errorf("after %#x, forget %v: %#x, want %#x", test.from, test.forget, got, test.want)
		}
	}
}
