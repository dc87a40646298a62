// SPDX-License-Identifier: Apache-2.0

// Package house tests the rules that hold between the rooms of this repository:
// who imports whom, under which licence a file is, and that the documents name
// what exists.
package house
