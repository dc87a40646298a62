// SPDX-License-Identifier: Apache-2.0

package bench

import (
	"encoding/json"
	"fmt"
	"io"
	"os"
	"runtime"
	"strings"
	"text/tabwriter"
	"time"

	"golang.org/x/sys/unix"
)

// Report is bench.json.
type Report struct {
	Time   time.Time   `json:"time"`
	Kernel string      `json:"kernel"`
	CPU    string      `json:"cpu"`
	CPUs   int         `json:"cpus"`
	Rounds int         `json:"rounds"`
	Sets   []SetReport `json:"sets"`
}

// SetReport is one set's rows.
type SetReport struct {
	Name  string `json:"name"`
	Title string `json:"title"`
	Rows  []Row  `json:"rows"`
}

// NewReport says where and when.
func NewReport(rounds int) *Report {
	r := &Report{Time: time.Now().UTC().Truncate(time.Second), CPUs: runtime.NumCPU(), Rounds: rounds}
	var u unix.Utsname
	if unix.Uname(&u) == nil {
		r.Kernel = unix.ByteSliceToString(u.Release[:])
	}
	info, _ := os.ReadFile("/proc/cpuinfo")
	for line := range strings.Lines(string(info)) {
		if name, value, ok := strings.Cut(line, ":"); ok && strings.TrimSpace(name) == "model name" {
			r.CPU = strings.TrimSpace(value)
			break
		}
	}
	return r
}

// Write writes bench.json.
func (r *Report) Write(path string) error {
	text, err := json.MarshalIndent(r, "", "  ")
	if err != nil {
		return err
	}
	if err := os.WriteFile(path, append(text, '\n'), 0o644); err != nil {
		return fmt.Errorf("write the report: %w", err)
	}
	return nil
}

// Head is the line above the tables.
func (r *Report) Head(w io.Writer) {
	fmt.Fprintf(w, "Linux %s, %s, %d CPUs, %d rounds\n", r.Kernel, r.CPU, r.CPUs, r.Rounds)
}

// Table prints a set for people.
func (s SetReport) Table(w io.Writer) {
	fmt.Fprintf(w, "\n%s: %s\n", s.Name, s.Title)
	t := tabwriter.NewWriter(w, 0, 0, 2, ' ', 0)
	fmt.Fprintln(t, "  \tbest\tmedian\tunit\tratio\tto\tpromised\t\tpeers")
	for _, r := range s.Rows {
		ratio, kept := "", ""
		if r.Against != "" {
			ratio = fmt.Sprintf("%.2f", r.Ratio)
		}
		if r.Kept != nil {
			kept = map[bool]string{true: "kept", false: "MISSED"}[*r.Kept]
		}
		fmt.Fprintf(t, "  %s\t%s\t%s\t%s\t%s\t%s\t%s\t%s\t%s\n", r.Name, figure(r.Best), figure(r.Median), r.Unit, ratio, r.Against, r.Promise, kept, r.Peer)
	}
	t.Flush()
}

func figure(f float64) string {
	switch {
	case f >= 1000:
		return fmt.Sprintf("%.0f", f)
	case f >= 10:
		return fmt.Sprintf("%.1f", f)
	}
	return fmt.Sprintf("%.2f", f)
}
