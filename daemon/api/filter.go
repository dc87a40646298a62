// SPDX-License-Identifier: Apache-2.0

package api

import (
	"fmt"
	"net/http"
	"net/url"
	"strings"

	"github.com/mooring-cni/mooring/daemon/model"
)

// Filter narrows the list of connections; the zero value takes all.
type Filter struct {
	Pod      model.Name // connections of this pod's endpoint
	Service  model.Name // connections to this service's frontends
	Protocol string     // TCP, UDP, ICMP or ICMPv6, in any case
}

// ParseName reads "namespace/name".
func ParseName(s string) (model.Name, error) {
	namespace, name, ok := strings.Cut(s, "/")
	if !ok || namespace == "" || name == "" || strings.Contains(name, "/") {
		return model.Name{}, fmt.Errorf("%q is not NAMESPACE/NAME", s)
	}
	return model.Name{Namespace: namespace, Name: name}, nil
}

// ParseProtocol reads a protocol's name as connections carry it.
func ParseProtocol(s string) (string, error) {
	for _, p := range []model.Protocol{model.TCP, model.UDP, model.ICMP, model.ICMPv6} {
		if strings.EqualFold(s, p.String()) {
			return p.String(), nil
		}
	}
	return "", fmt.Errorf("%q is not a protocol: TCP, UDP, ICMP or ICMPv6", s)
}

func (f Filter) query() string {
	q := url.Values{}
	if f.Pod != (model.Name{}) {
		q.Set("pod", f.Pod.String())
	}
	if f.Service != (model.Name{}) {
		q.Set("service", f.Service.String())
	}
	if f.Protocol != "" {
		q.Set("protocol", f.Protocol)
	}
	if len(q) == 0 {
		return ""
	}
	return "?" + q.Encode()
}

func parseFilter(q url.Values) (Filter, error) {
	var f Filter
	for key, values := range q {
		var err error
		switch value := values[len(values)-1]; key {
		case "pod":
			f.Pod, err = ParseName(value)
		case "service":
			f.Service, err = ParseName(value)
		case "protocol":
			f.Protocol, err = ParseProtocol(value)
		default:
			err = fmt.Errorf("unknown parameter: pod, service and protocol are known")
		}
		if err != nil {
			return Filter{}, Errorf(http.StatusBadRequest, "%s: %v", key, err)
		}
	}
	return f, nil
}
