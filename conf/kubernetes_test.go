// SPDX-License-Identifier: Apache-2.0

package conf

import (
	"encoding/json"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"go.yaml.in/yaml/v3"
)

// object is what the tests look at of a manifest.
type object struct {
	Kind     string
	Metadata struct{ Name string }
	Data     map[string]string
	Spec     struct {
		Template struct {
			Spec struct {
				HostNetwork    bool        `yaml:"hostNetwork"`
				InitContainers []container `yaml:"initContainers"`
				Containers     []container
			}
		}
	}
}

type container struct {
	Name            string
	SecurityContext struct {
		Privileged   bool
		Capabilities struct{ Add, Drop []string }
	} `yaml:"securityContext"`
}

func manifests(t *testing.T, name string) (objects []object) {
	t.Helper()
	content, err := os.ReadFile(filepath.Join("kubernetes", name))
	if err != nil {
		t.Fatal(err)
	}
	for document := range strings.SplitSeq(string(content), "\n---\n") {
		var o object
		if err := yaml.Unmarshal([]byte(document), &o); err != nil {
			t.Fatalf("%s: %v\n%s", name, err, document)
		}
		if o.Kind != "" {
			objects = append(objects, o)
		}
	}
	return objects
}

func TestManifestsHoldWhatOurReadersAccept(t *testing.T) {
	t.Setenv("KUBERNETES_SERVICE_HOST", "192.0.2.1")
	t.Setenv("KUBERNETES_SERVICE_PORT", "6443")
	found := 0
	for _, o := range manifests(t, "mooring.yaml") {
		if o.Kind != "ConfigMap" {
			continue
		}
		found++
		path := filepath.Join(t.TempDir(), "mooringd.yaml")
		if err := os.WriteFile(path, []byte(o.Data["mooringd.yaml"]), 0o644); err != nil {
			t.Fatal(err)
		}
		config, err := Load(path, nil)
		if err != nil {
			t.Fatalf("mooringd.yaml: %v", err)
		}
		var list struct{ Plugins []json.RawMessage }
		if err := json.Unmarshal([]byte(o.Data["10-mooring.conflist"]), &list); err != nil || len(list.Plugins) == 0 {
			t.Fatalf("10-mooring.conflist: %v", err)
		}
		var stanza map[string]any
		if err := json.Unmarshal(list.Plugins[0], &stanza); err != nil {
			t.Fatal(err)
		}
		stanza["name"], stanza["cniVersion"] = "mooring", "1.0.0" // as the runtime adds them
		stdin, err := json.Marshal(stanza)
		if err != nil {
			t.Fatal(err)
		}
		plugin, err := ParseNetConf(stdin)
		if err != nil {
			t.Fatalf("10-mooring.conflist: %v", err)
		}
		if plugin.Socket != config.Socket || plugin.BPFFS != config.BPFFS {
			t.Errorf("the plugin looks at %s and %s, the daemon is at %s and %s", plugin.Socket, plugin.BPFFS, config.Socket, config.BPFFS)
		}
	}
	if found != 1 {
		t.Errorf("%d ConfigMaps", found)
	}
}

// Only what mounts and sets sysctls is privileged, and it ends.
func TestDaemonRunsWithNamedCapabilities(t *testing.T) {
	found := 0
	for _, o := range manifests(t, "mooring.yaml") {
		if o.Kind != "DaemonSet" {
			continue
		}
		found++
		pod := o.Spec.Template.Spec
		for _, c := range append(pod.Containers, pod.InitContainers...) {
			if c.SecurityContext.Privileged != (c.Name == "prepare") {
				t.Errorf("container %s: privileged: %v", c.Name, c.SecurityContext.Privileged)
			}
			if dropped := strings.Join(c.SecurityContext.Capabilities.Drop, " "); !c.SecurityContext.Privileged && dropped != "ALL" {
				t.Errorf("container %s drops %s", c.Name, dropped)
			}
		}
		if len(pod.Containers) != 2 || len(pod.InitContainers) != 2 || !pod.HostNetwork {
			t.Errorf("%d containers, %d before them, hostNetwork: %v", len(pod.Containers), len(pod.InitContainers), pod.HostNetwork)
		}
	}
	if found != 1 {
		t.Errorf("%d DaemonSets", found)
	}
	for _, o := range manifests(t, "uninstall.yaml") {
		if o.Kind != "DaemonSet" || o.Metadata.Name != "mooring-uninstall" {
			t.Errorf("uninstall.yaml holds %s %s", o.Kind, o.Metadata.Name)
		}
	}
}
