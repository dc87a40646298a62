// SPDX-License-Identifier: Apache-2.0

package source

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"fmt"
	"log/slog"
	"maps"
	"slices"
	"strings"
	"sync"
	"time"

	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/client-go/rest"

	"github.com/mooring-cni/mooring/daemon/model"
)

const (
	// The API server keeps an Event for an hour, unless it is told otherwise.
	eventLife = time.Hour
	// After a refusal; the next try of a whole list is no sooner.
	eventRetry = 15 * time.Second
	// What the API accepts as an Event's message, in bytes.
	maxEventMessage = 1024
	// Events of one node: problems beyond these are in status only.
	maxEvents = 500
	// Of an Event's name, what remains for its object's.
	maxEventName = 200
)

// announcer makes Events of what is wrong with objects, for those who look at
// the object ("kubectl describe") and not at a node.
//
// The name of an Event follows from what it says: of all the nodes that find
// the same fault with an object, one tells it.
type announcer struct {
	client  rest.Interface
	node    string
	changed func()
	log     *slog.Logger
	wake    chan struct{}

	mutex   sync.Mutex
	wanted  map[string]*corev1.Event
	told    map[string]time.Time
	trouble string
}

func newAnnouncer(client rest.Interface, node string, changed func(), log *slog.Logger) *announcer {
	return &announcer{client: client, node: node, changed: changed, log: log, wake: make(chan struct{}, 1), told: make(map[string]time.Time)}
}

// set says what is wrong at this time.
func (a *announcer) set(problems []model.Problem, identify func(string) (*corev1.ObjectReference, bool)) {
	wanted := make(map[string]*corev1.Event)
	for _, p := range problems {
		if len(wanted) == maxEvents {
			break
		}
		if object, ok := identify(p.Object); ok {
			e := a.event(p, object)
			wanted[e.Name] = e
		}
	}
	a.mutex.Lock()
	defer a.mutex.Unlock()
	a.wanted = wanted
	for name := range a.told {
		if wanted[name] == nil {
			delete(a.told, name)
		}
	}
	for name := range wanted {
		if a.told[name].IsZero() {
			select {
			case a.wake <- struct{}{}:
			default:
			}
			break
		}
	}
}

func (a *announcer) event(p model.Problem, object *corev1.ObjectReference) *corev1.Event {
	message := p.Message
	if p.Field != "" {
		message = p.Field + ": " + message
	}
	if len(message) > maxEventMessage {
		message = strings.ToValidUTF8(message[:maxEventMessage-3], "") + "..."
	}
	namespace := object.Namespace
	if namespace == "" {
		namespace = metav1.NamespaceDefault
	}
	sum := sha256.Sum256([]byte(object.Kind + "\n" + string(object.UID) + "\n" + message))
	return &corev1.Event{
		ObjectMeta:          metav1.ObjectMeta{Namespace: namespace, Name: fmt.Sprintf("%.*s.%s", maxEventName, object.Name, hex.EncodeToString(sum[:8]))},
		InvolvedObject:      *object,
		Type:                corev1.EventTypeWarning,
		Reason:              object.Kind + "Problem",
		Message:             message,
		Count:               1,
		Source:              corev1.EventSource{Component: "mooringd", Host: a.node},
		ReportingController: "mooring/mooringd",
		ReportingInstance:   a.node,
	}
}

// run tells what is wanted and not told until ctx is done.
func (a *announcer) run(ctx context.Context) {
	retry := time.NewTicker(eventRetry)
	defer retry.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case <-a.wake:
		case <-retry.C:
		}
		a.tell(ctx, time.Now())
	}
}

func (a *announcer) tell(ctx context.Context, now time.Time) {
	a.mutex.Lock()
	var due []*corev1.Event
	for _, name := range slices.Sorted(maps.Keys(a.wanted)) {
		if at, told := a.told[name]; !told || now.Sub(at) > eventLife {
			due = append(due, a.wanted[name])
		}
	}
	a.mutex.Unlock()
	for _, e := range due {
		stamped := *e
		stamped.FirstTimestamp, stamped.LastTimestamp = metav1.NewTime(now), metav1.NewTime(now)
		err := a.client.Post().Namespace(e.Namespace).Resource("events").Body(&stamped).Do(ctx).Error()
		if ctx.Err() != nil {
			return
		}
		// Another node was first, or the object's namespace is on its way out.
		if apierrors.IsAlreadyExists(err) || apierrors.IsNotFound(err) || apierrors.HasStatusCause(err, corev1.NamespaceTerminatingCause) {
			err = nil
		}
		if a.fail(err); err != nil {
			return
		}
		a.mutex.Lock()
		if a.wanted[e.Name] != nil {
			a.told[e.Name] = now
		}
		a.mutex.Unlock()
	}
}

// fail takes note of a refusal, or of its end.
func (a *announcer) fail(err error) {
	message := ""
	if err != nil {
		message = fmt.Sprintf("what is wrong with objects is only in status: %v", err)
	}
	a.mutex.Lock()
	before := a.trouble
	a.trouble = message
	a.mutex.Unlock()
	if before != message {
		if message != "" {
			a.log.Warn("Events are not accepted", "error", err)
		}
		a.changed()
	}
}

func (a *announcer) ailment() string {
	a.mutex.Lock()
	defer a.mutex.Unlock()
	return a.trouble
}
