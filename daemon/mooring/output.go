// SPDX-License-Identifier: Apache-2.0

package main

import (
	"bufio"
	"encoding/json"
	"fmt"
	"io"
	"iter"
	"os"
	"strconv"
	"strings"
	"unicode/utf8"

	"github.com/spf13/cobra"
	"golang.org/x/sys/unix"
	"sigs.k8s.io/yaml"
)

// format is the value of -o.
type format string

const (
	asTable format = "table"
	asJSON  format = "json"
	asYAML  format = "yaml"
)

func (f *format) String() string { return string(*f) }
func (f *format) Type() string   { return "table|json|yaml" }
func (f *format) Set(s string) error {
	switch format(s) {
	case asTable, asJSON, asYAML:
		*f = format(s)
		return nil
	}
	return fmt.Errorf("table, json and yaml are known")
}

func outputFlag(command *cobra.Command) *format {
	f := asTable
	command.Flags().VarP(&f, "output", "o", "how to print")
	command.RegisterFlagCompletionFunc("output", cobra.FixedCompletions([]string{"table", "json", "yaml"}, cobra.ShellCompDirectiveNoFileComp))
	return &f
}

// printValue prints one object; people prints it for people.
func printValue(w io.Writer, f format, value any, people func(io.Writer)) error {
	switch f {
	case asJSON:
		text, err := json.MarshalIndent(value, "", "  ")
		if err != nil {
			return err
		}
		_, err = fmt.Fprintf(w, "%s\n", text)
		return err
	case asYAML:
		text, err := yaml.Marshal(value)
		if err != nil {
			return err
		}
		_, err = w.Write(text)
		return err
	}
	out := bufio.NewWriter(w)
	people(out)
	return out.Flush()
}

// column is a column of a table of T.
type column[T any] struct {
	title string
	cell  func(T) string
	right bool // numbers
	// On a terminal that is too narrow, columns with the highest number go
	// first; those with 0 stay and, where they are addresses, are shortened.
	expendable int
	shorten    bool
}

// sampleRows decide the widths of a table's columns; later rows that are wider
// stick out rather than wait for half a million others.
const sampleRows = 1000

// printList prints a list as it arrives. For people an empty one is said to be
// so, on stderr: stdout stays the list.
func printList[T any](w, stderr io.Writer, f format, rows iter.Seq2[T, error], columns []column[T], empty string) error {
	out := bufio.NewWriterSize(w, 1<<16)
	var err error
	switch f {
	case asJSON:
		err = listJSON(out, rows)
	case asYAML:
		err = listYAML(out, rows)
	default:
		err = listTable(out, stderr, rows, columns, terminalWidth(w), empty)
	}
	if flushErr := out.Flush(); err == nil {
		err = flushErr
	}
	return err
}

func listJSON[T any](out *bufio.Writer, rows iter.Seq2[T, error]) error {
	separator := "[\n  "
	for row, err := range rows {
		if err != nil {
			return err
		}
		text, err := json.Marshal(row)
		if err != nil {
			return err
		}
		out.WriteString(separator)
		if _, err := out.Write(text); err != nil {
			return err
		}
		separator = ",\n  "
	}
	if separator == "[\n  " {
		out.WriteString("[]\n")
	} else {
		out.WriteString("\n]\n")
	}
	return nil
}

func listYAML[T any](out *bufio.Writer, rows iter.Seq2[T, error]) error {
	none := true
	for row, err := range rows {
		if err != nil {
			return err
		}
		text, err := yaml.Marshal([]T{row})
		if err != nil {
			return err
		}
		if _, err := out.Write(text); err != nil {
			return err
		}
		none = false
	}
	if none {
		out.WriteString("[]\n")
	}
	return nil
}

func listTable[T any](out *bufio.Writer, stderr io.Writer, rows iter.Seq2[T, error], columns []column[T], width int, empty string) error {
	var (
		sample [][]string
		layout *layout
		err    error
	)
	begin := func() {
		titles := make([]string, len(columns))
		for i, c := range columns {
			titles[i] = c.title
		}
		layout = fit(columns, append(sample, titles), width)
		layout.print(out, titles)
		for _, row := range sample {
			layout.print(out, row)
		}
	}
	for row, rowErr := range rows {
		if rowErr != nil {
			err = rowErr
			break
		}
		cells := make([]string, len(columns))
		for i, c := range columns {
			cells[i] = c.cell(row)
		}
		if layout != nil {
			if err = layout.print(out, cells); err != nil {
				break
			}
			continue
		}
		if sample = append(sample, cells); len(sample) == sampleRows {
			begin()
		}
	}
	if layout == nil && len(sample) > 0 {
		begin()
	}
	if err == nil && len(sample) == 0 {
		fmt.Fprintln(stderr, empty)
	}
	return err
}

// layout says how wide each column is; 0 leaves it out.
type layout struct {
	widths []int
	right  []bool
}

// gap stands between columns.
const gap = "  "

// fit finds the widths that hold the cells, or that the terminal holds.
func fit[T any](columns []column[T], cells [][]string, terminal int) *layout {
	l := &layout{widths: make([]int, len(columns)), right: make([]bool, len(columns))}
	for i, c := range columns {
		l.right[i] = c.right
		for _, row := range cells {
			l.widths[i] = max(l.widths[i], utf8.RuneCountInString(row[i]))
		}
	}
	if terminal <= 0 {
		return l
	}
	for l.total() > terminal {
		victim, rank := -1, 0
		for i, c := range columns {
			if l.widths[i] > 0 && c.expendable > rank {
				victim, rank = i, c.expendable
			}
		}
		if victim < 0 {
			break
		}
		l.widths[victim] = 0
	}
	const narrowest = 12
	for l.total() > terminal {
		widest := -1
		for i, c := range columns {
			if c.shorten && l.widths[i] > narrowest && (widest < 0 || l.widths[i] > l.widths[widest]) {
				widest = i
			}
		}
		if widest < 0 {
			break
		}
		l.widths[widest]--
	}
	return l
}

func (l *layout) total() int {
	sum := -len(gap)
	for _, w := range l.widths {
		if w > 0 {
			sum += w + len(gap)
		}
	}
	return sum
}

func (l *layout) print(out *bufio.Writer, cells []string) error {
	var line strings.Builder
	for i, w := range l.widths {
		if w == 0 {
			continue
		}
		if line.Len() > 0 {
			line.WriteString(gap)
		}
		cell := cells[i]
		pad := w - utf8.RuneCountInString(cell)
		if pad < 0 && l.shortened(i) {
			cell, pad = middle(cell, w), 0
		}
		space := strings.Repeat(" ", max(pad, 0))
		if l.right[i] {
			line.WriteString(space + cell)
		} else {
			line.WriteString(cell + space)
		}
	}
	_, err := out.WriteString(strings.TrimRight(line.String(), " ") + "\n")
	return err
}

func (l *layout) shortened(i int) bool { return l.widths[i] > 0 }

// middle shortens an address in its middle: its beginning says whose it is, its
// end which one.
func middle(s string, width int) string {
	runes := []rune(s)
	if len(runes) <= width {
		return s
	}
	head := (width - 1) / 2
	tail := width - 1 - head
	return string(runes[:head]) + "…" + string(runes[len(runes)-tail:])
}

// terminalWidth is 0 where nobody looks: a pipe gets every column in full.
func terminalWidth(w io.Writer) int {
	file, ok := w.(*os.File)
	if !ok {
		return 0
	}
	size, err := unix.IoctlGetWinsize(int(file.Fd()), unix.TIOCGWINSZ)
	if err != nil || size.Col == 0 {
		return 0
	}
	return int(size.Col)
}

// sequence makes a list of a slice and an error.
func sequence[T any](list []T, err error) iter.Seq2[T, error] {
	return func(yield func(T, error) bool) {
		if err != nil {
			var zero T
			yield(zero, err)
			return
		}
		for _, e := range list {
			if !yield(e, nil) {
				return
			}
		}
	}
}

// orDash keeps a table's columns apart where there is nothing to say.
func orDash(s string) string {
	if s == "" {
		return "-"
	}
	return s
}

func number[N ~int | ~int64 | ~uint32 | ~uint64](n N) string { return strconv.FormatInt(int64(n), 10) }
