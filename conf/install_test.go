// SPDX-License-Identifier: Apache-2.0

package conf

import (
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
)

func TestInstallKeepsWhatWasEditedAndUninstallTakesTheRest(t *testing.T) {
	root := t.TempDir()
	built, units := filepath.Join(root, "built"), filepath.Join(root, "units")
	for _, dir := range []string{built, units} {
		if err := os.Mkdir(dir, 0o755); err != nil {
			t.Fatal(err)
		}
	}
	programs := []string{"mooringd", "mooring", "mooring-cni", "mooring-ipam"}
	for _, name := range programs {
		if err := os.WriteFile(filepath.Join(built, name), []byte("version 1"), 0o755); err != nil {
			t.Fatal(err)
		}
	}
	bin, plugins, netd, etc := filepath.Join(root, "bin"), filepath.Join(root, "opt"), filepath.Join(root, "net.d"), filepath.Join(root, "etc")
	run := func(action string) string {
		t.Helper()
		out, err := exec.Command("./install.sh", action, built, bin, plugins, netd, etc, units).CombinedOutput()
		if err != nil {
			t.Fatalf("%s: %v: %s", action, err, out)
		}
		return string(out)
	}
	run("install")
	conflist, config := filepath.Join(netd, "10-mooring.conflist"), filepath.Join(etc, "mooringd.yaml")
	for _, path := range []string{
		filepath.Join(bin, "mooringd"), filepath.Join(bin, "mooring"), filepath.Join(plugins, "mooring-cni"), filepath.Join(plugins, "mooring-ipam"),
		conflist, config, filepath.Join(units, "mooringd.service"),
	} {
		if _, err := os.Stat(path); err != nil {
			t.Errorf("after install: %v", err)
		}
	}
	if err := os.WriteFile(conflist, []byte("edited"), 0o644); err != nil {
		t.Fatal(err)
	}
	if out := run("install"); !strings.Contains(out, "is kept as it is") {
		t.Errorf("the second install says nothing of the edited file: %s", out)
	}
	if content, err := os.ReadFile(conflist); err != nil || string(content) != "edited" {
		t.Errorf("the edited file is now %q (%v)", content, err)
	}
	run("uninstall")
	for _, dir := range []string{bin, plugins, netd, units} {
		if left, err := os.ReadDir(dir); err != nil || len(left) > 0 {
			t.Errorf("after uninstall %s has %v (%v)", dir, left, err)
		}
	}
	if _, err := os.Stat(config); err != nil {
		t.Errorf("the configuration is gone: %v", err)
	}
}

// The unit starts what is installed, with the file that is installed, and waits
// for the daemon's word.
func TestUnitStartsWhatIsInstalled(t *testing.T) {
	unit, err := os.ReadFile("mooringd.service")
	if err != nil {
		t.Fatal(err)
	}
	for _, line := range []string{"Type=notify", "ExecStart=/usr/local/bin/mooringd --config " + DefaultConfig, "Restart=always"} {
		if !strings.Contains(string(unit), line+"\n") {
			t.Errorf("mooringd.service has no line %q", line)
		}
	}
}
