// SPDX-License-Identifier: Apache-2.0

package endpoint

import (
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// Kernel is the interfaces of the network namespace in which it was made.
type Kernel struct{ handle *netlink.Handle }

// NewKernel opens the current network namespace's interfaces.
func NewKernel() (*Kernel, error) {
	handle, err := netlink.NewHandle(unix.NETLINK_ROUTE)
	if err != nil {
		return nil, fmt.Errorf("open netlink: %w", err)
	}
	return &Kernel{handle: handle}, nil
}

// Close ends it.
func (k *Kernel) Close() { k.handle.Close() }

// Exists implements Links.
func (k *Kernel) Exists(name string, index int) (bool, error) {
	link, err := k.handle.LinkByIndex(index)
	var gone netlink.LinkNotFoundError
	if errors.As(err, &gone) || errors.Is(err, unix.ENODEV) {
		return false, nil
	}
	if err != nil {
		return false, err
	}
	return link.Attrs().Name == name, nil
}

// Watch tells the registry of interfaces that vanish, so that a pod whose
// network namespace was deleted without a DEL leaves nothing behind. It
// returns when ctx is done.
func (r *Registry) Watch(ctx context.Context) error {
	for {
		if err := r.watch(ctx); ctx.Err() == nil {
			// The kernel drops messages when a burst overruns the socket's buffer.
			r.log.Warn("watch interfaces: starting again", "error", err)
		}
		select {
		case <-ctx.Done():
			return nil
		case <-time.After(time.Second):
		}
	}
}

func (r *Registry) watch(ctx context.Context) error {
	updates := make(chan netlink.LinkUpdate, 256)
	stop := make(chan struct{})
	defer func() {
		close(stop)
		go func() { // the subscription may be about to deliver one more
			for range updates {
			}
		}()
	}()
	failed := make(chan error, 1)
	err := netlink.LinkSubscribeWithOptions(updates, stop, netlink.LinkSubscribeOptions{
		ReceiveBufferSize: 1 << 20,
		ErrorCallback: func(err error) {
			select {
			case failed <- err:
			default:
			}
		},
	})
	if err != nil {
		close(updates)
		return fmt.Errorf("subscribe to interfaces: %w", err)
	}
	// What vanished before there was a subscription is found by looking.
	r.Resync()
	for {
		select {
		case <-ctx.Done():
			return nil
		case err := <-failed:
			return err
		case update, open := <-updates:
			if !open {
				return errors.New("the subscription ended")
			}
			if update.Header.Type == unix.RTM_DELLINK {
				r.LinkGone(int(update.Index))
			}
		}
	}
}
