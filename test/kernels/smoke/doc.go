// SPDX-License-Identifier: Apache-2.0

// Package smoke holds the kernel matrix's own tests: that a guest has what the
// project's tests need, and the kernel facts on which the conntrack hooks stand.
// They run in every kernel of the matrix, and on the machine's own.
package smoke
