// SPDX-License-Identifier: Apache-2.0

// Command chart renders a Helm chart as `helm template --namespace kube-system`
// does, with values from standard input:
//
//	echo '{apiServer: {host: 192.0.2.1}}' | go run . DIRECTORY
package main

import (
	"fmt"
	"io"
	"os"
	"path"
	"slices"
	"strings"

	"helm.sh/helm/v3/pkg/chart/loader"
	"helm.sh/helm/v3/pkg/chartutil"
	"helm.sh/helm/v3/pkg/engine"
)

func main() {
	if len(os.Args) != 2 {
		fmt.Fprintln(os.Stderr, "usage: chart DIRECTORY <values.yaml")
		os.Exit(2)
	}
	if err := render(os.Args[1], os.Stdin, os.Stdout); err != nil {
		fmt.Fprintf(os.Stderr, "chart: %v\n", err)
		os.Exit(1)
	}
}

// order is that in which objects are to be made.
var order = []string{"rbac.yaml", "config.yaml", "daemonset.yaml", "uninstall.yaml"}

func render(directory string, in io.Reader, out io.Writer) error {
	chart, err := loader.Load(directory)
	if err != nil {
		return err
	}
	input, err := io.ReadAll(in)
	if err != nil {
		return err
	}
	given, err := chartutil.ReadValues(input)
	if err != nil {
		return fmt.Errorf("read values: %w", err)
	}
	release := chartutil.ReleaseOptions{Name: "mooring", Namespace: "kube-system", IsInstall: true}
	values, err := chartutil.ToRenderValues(chart, given, release, nil)
	if err != nil {
		return err
	}
	files, err := engine.Render(chart, values)
	if err != nil {
		return err
	}
	var names []string
	for name, content := range files {
		if strings.TrimSpace(content) != "" && path.Ext(name) == ".yaml" {
			names = append(names, name)
		}
	}
	place := func(name string) int { return slices.Index(order, path.Base(name)) }
	slices.SortFunc(names, func(a, b string) int { return place(a) - place(b) })
	for _, name := range names {
		if _, err := fmt.Fprintf(out, "---\n%s\n", strings.Trim(files[name], "\n")); err != nil {
			return err
		}
	}
	return nil
}
