// SPDX-License-Identifier: Apache-2.0

package node

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"strings"
)

const sysctlRoot = "/proc/sys/"

// setSysctls makes the node a router for the families that pods have. What is
// right already is not written, so that a read-only /proc/sys is good enough
// for a node that somebody else prepared.
func setSysctls(v4, v6 bool, uplinks []Uplink) (problems []string) {
	set := func(key, value string) {
		if err := setSysctl(key, value); err != nil {
			problems = append(problems, err.Error())
		}
	}
	if v4 {
		set("net/ipv4/ip_forward", "1")
	}
	if v6 {
		// A router ignores router advertisements unless accept_ra is 2: without
		// this the node would lose its own default route some minutes later.
		for _, u := range uplinks {
			key := "net/ipv6/conf/" + u.Name + "/accept_ra"
			if value, err := readSysctl(key); err == nil && value == "1" {
				set(key, "2")
			}
		}
		set("net/ipv6/conf/all/forwarding", "1")
	}
	return problems
}

// Prepare makes the machine a router of every family that it has, as the manager
// does for those that its pods have: where the daemon itself may not write
// sysctls, as in a container, somebody with more rights does this before.
func Prepare(devices []string) error {
	uplinks, _, err := Uplinks(devices)
	if err != nil {
		return err
	}
	var errs []error
	for _, problem := range setSysctls(hasFamily("ipv4"), hasFamily("ipv6"), uplinks) {
		errs = append(errs, errors.New(problem))
	}
	return errors.Join(errs...)
}

func hasFamily(name string) bool {
	_, err := os.Stat(sysctlRoot + "net/" + name + "/conf")
	return err == nil
}

func readSysctl(key string) (string, error) {
	content, err := os.ReadFile(sysctlRoot + key)
	return strings.TrimSpace(string(content)), err
}

func setSysctl(key, value string) error {
	name := strings.ReplaceAll(key, "/", ".")
	was, err := readSysctl(key)
	if err == nil && was == value {
		return nil
	}
	if err == nil {
		err = os.WriteFile(sysctlRoot+key, []byte(value), 0o644)
	}
	if errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("sysctl %s is not there: does this kernel have the protocol?", name)
	}
	if err != nil {
		return fmt.Errorf("sysctl -w %s=%s: %w; set it before mooringd starts", name, value, err)
	}
	return nil
}
