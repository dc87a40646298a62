// SPDX-License-Identifier: Apache-2.0

// Package source tells where Kubernetes objects come from: a directory of
// manifests here, the API server beside it. Both turn objects into the nouns
// of daemon/model by the same conversion and deliver them as changes. It is
// the only package that knows Kubernetes' Go types.
package source

import "github.com/mooring-cni/mooring/daemon/model"

// Sink takes what a source delivers, one call at a time, in order. It is called
// from the source's own goroutine: while it works, the source waits.
type Sink func(model.Changes)
