// SPDX-License-Identifier: Apache-2.0

package source

import (
	"bytes"
	"slices"
)

// plainToJSON is yamlToJSON for what nearly all manifests are written in: block
// mappings and sequences, flow collections, plain and quoted scalars of one line,
// comments, in printable ASCII. It gives false for all else, for whatever YAML
// would find wrong and for keys that occur twice: that is for a YAML reader, in
// eight times the time, of which 10,000 services have too little. What this one
// takes it takes as YAML does: FuzzPlain.
func plainToJSON(data []byte, part string) (jsonText, bool) {
	for _, c := range data {
		if (c < ' ' || c > '~') && c != '\n' {
			return jsonText{}, false
		}
	}
	r := plainReader{data: data, json: make([]byte, 0, len(data)), keys: make([][]byte, 0, 16)}
	r.line()
	if r.indent == 0 && string(bytes.TrimRight(r.rest(), " ")) == "---" {
		r.nextLine()
	}
	if r.indent < 0 {
		return jsonText{}, false
	}
	ok := false
	if part == "item" {
		ok = r.dash() && r.item(r.indent) // of a list of one
	} else {
		ok = !r.dash() && r.block(r.indent)
	}
	if !ok || r.indent >= 0 {
		return jsonText{}, false
	}
	if r.head == nil {
		return jsonText{all: r.json, head: r.json}, true
	}
	return jsonText{all: r.json, head: append(r.head, '}')}, true
}

// plainReader reads line by line; a line's place says what it is part of.
type plainReader struct {
	data   []byte
	at     int // what is read next; after line and nextLine the content of a line
	indent int // of that line; -1: there is none any more
	depth  int
	keys   [][]byte // of the mappings that are open
	json   []byte
	head   []byte // what struct head has of it; nil: the whole is not in block style
}

// How deep collections may be in each other, and how many keys one may have.
const (
	plainDepth = 64
	plainKeys  = 128
)

// line finds the content of this line or the first one after it that has any.
func (r *plainReader) line() {
	for {
		start := r.at
		for r.at < len(r.data) && r.data[r.at] == ' ' {
			r.at++
		}
		switch {
		case r.at == len(r.data):
			r.indent = -1
			return
		case r.data[r.at] == '\n':
			r.at++
		case r.data[r.at] == '#':
			r.at += len(r.rest())
		default:
			r.indent = r.at - start
			return
		}
	}
}

func (r *plainReader) nextLine() {
	r.at += len(r.rest())
	r.line()
}

// rest is what is left of the line.
func (r *plainReader) rest() []byte {
	if end := bytes.IndexByte(r.data[r.at:], '\n'); end >= 0 {
		return r.data[r.at : r.at+end]
	}
	return r.data[r.at:]
}

// blank tells whether a space or the end of the line is at a place.
func (r *plainReader) blank(at int) bool {
	return at >= len(r.data) || r.data[at] == ' ' || r.data[at] == '\n'
}

func (r *plainReader) spaces() {
	for r.at < len(r.data) && r.data[r.at] == ' ' {
		r.at++
	}
}

// over tells whether nothing but a comment is left of the line; a space is before it.
func (r *plainReader) over() bool {
	return r.at == len(r.data) || r.data[r.at] == '\n' || r.data[r.at] == '#'
}

func (r *plainReader) dash() bool {
	return r.at < len(r.data) && r.data[r.at] == '-' && r.blank(r.at+1)
}

// block reads the mapping or sequence that begins here, in this column.
func (r *plainReader) block(column int) bool {
	if r.depth++; r.depth > plainDepth {
		return false
	}
	defer func() { r.depth-- }()
	if r.dash() {
		return r.sequence(column)
	}
	if r.depth == 1 {
		r.head = append(make([]byte, 0, 256), '{')
	}
	r.json = append(r.json, '{')
	mine := len(r.keys)
	for {
		key := r.key()
		if key == nil || !r.open(key, mine) {
			return false
		}
		r.at += len(key) + 1
		from := len(r.json) - len(key) - len(`"":`)
		if !r.value(column, true) {
			return false
		}
		if r.depth == 1 && headKey(key) {
			r.lead(r.json[from:])
		}
		if r.indent != column {
			break
		}
		r.json = append(r.json, ',')
	}
	r.keys = r.keys[:mine]
	r.json = append(r.json, '}')
	return r.indent < column
}

func headKey(key []byte) bool {
	switch string(key) {
	case "apiVersion", "kind", "metadata", "items":
		return true
	}
	return false
}

// lead puts a key and its value into the head.
func (r *plainReader) lead(member []byte) {
	if len(r.head) > 1 {
		r.head = append(r.head, ',')
	}
	r.head = append(r.head, member...)
}

// sequence reads one in block style. Where a mapping in the same column goes on
// after it, that is the caller's.
func (r *plainReader) sequence(column int) bool {
	r.json = append(r.json, '[')
	for {
		if !r.item(column) {
			return false
		}
		if r.indent != column || !r.dash() {
			break
		}
		r.json = append(r.json, ',')
	}
	r.json = append(r.json, ']')
	return true
}

// item reads an element of a sequence in this column.
func (r *plainReader) item(column int) bool {
	dash := r.at
	r.at++
	r.spaces()
	if !r.over() && r.key() != nil {
		return r.block(column+r.at-dash) && r.indent <= column
	}
	return r.value(column, false)
}

// value reads what a key of a mapping in this column has, or a dash, up to the
// next line with content. A sequence may be in the column of its key.
func (r *plainReader) value(column int, key bool) bool {
	r.spaces()
	if !r.over() {
		if !r.inline(false) {
			return false
		}
		end := r.at
		if r.spaces(); !r.over() || !r.blank(end) {
			return false
		}
		r.nextLine()
		return r.indent <= column // else the scalar goes on
	}
	r.nextLine()
	switch {
	case r.indent > column:
		return r.block(r.indent) && r.indent <= column
	case key && r.indent == column && r.dash():
		return r.sequence(column)
	}
	r.json = append(r.json, "null"...)
	return true
}

// key gives the key that is here, if it is one of plain text.
func (r *plainReader) key() []byte {
	end := r.at
	for end < len(r.data) && wordByte[r.data[end]] {
		end++
	}
	if end == len(r.data) || r.data[end] != ':' || !r.blank(end+1) {
		return nil
	}
	key := r.data[r.at:end]
	if len(key) == 0 || len(key) > 512 || !letter(key[0]) || plainWord(key) != "" {
		return nil
	}
	return key
}

// open writes a key, unless its mapping has it already: its keys begin at mine.
func (r *plainReader) open(key []byte, mine int) bool {
	for _, other := range r.keys[mine:] {
		if bytes.Equal(other, key) {
			return false
		}
	}
	if len(r.keys)-mine >= plainKeys {
		return false
	}
	r.keys = append(r.keys, key)
	r.json = append(append(append(r.json, '"'), key...), '"', ':')
	return true
}

// inline reads a scalar or a collection in flow style.
func (r *plainReader) inline(flow bool) bool {
	if r.at == len(r.data) {
		return false
	}
	switch c := r.data[r.at]; c {
	case '[', '{':
		if r.depth++; r.depth > plainDepth {
			return false
		}
		defer func() { r.depth-- }()
		if c == '[' {
			return r.collection(']', func() bool { return r.inline(true) })
		}
		mine := len(r.keys)
		defer func() { r.keys = r.keys[:mine] }()
		return r.collection('}', func() bool {
			key := r.key()
			if key == nil || !r.open(key, mine) {
				return false
			}
			r.at += len(key) + 1
			r.spaces()
			return r.inline(true)
		})
	case '"', '\'':
		text := r.rest()[1:]
		end := bytes.IndexByte(text, c)
		if end < 0 || c == '"' && bytes.IndexByte(text[:end], '\\') >= 0 || end+1 < len(text) && text[end+1] == c {
			return false
		}
		r.at += end + 2
		return r.text(text[:end])
	}
	if flow {
		return r.plain(r.flowWord())
	}
	return r.plain(r.plainLine())
}

// collection reads what is between brackets, which end in the same line.
func (r *plainReader) collection(closing byte, element func() bool) bool {
	r.json = append(r.json, r.data[r.at])
	r.at++
	r.spaces()
	for first := true; ; first = false {
		if r.at < len(r.data) && r.data[r.at] == closing && first {
			break
		}
		if !element() {
			return false
		}
		r.spaces()
		if r.at == len(r.data) {
			return false
		}
		if r.data[r.at] == closing {
			break
		}
		if r.data[r.at] != ',' {
			return false
		}
		r.json = append(r.json, ',')
		r.at++
		r.spaces()
	}
	r.at++
	r.json = append(r.json, closing)
	return true
}

// flowWord is a plain scalar between brackets, without spaces.
func (r *plainReader) flowWord() []byte {
	start := r.at
	for ; r.at < len(r.data); r.at++ {
		c := r.data[r.at]
		if !wordByte[c] && (c != ':' || r.at+1 == len(r.data) || !wordByte[r.data[r.at+1]] && r.data[r.at+1] != ':') {
			break
		}
	}
	return r.data[start:r.at]
}

// plainLine is a plain scalar that takes the line, up to a comment.
func (r *plainReader) plainLine() []byte {
	text := r.rest()
	if comment := bytes.Index(text, []byte(" #")); comment >= 0 {
		text = text[:comment]
	}
	text = bytes.TrimRight(text, " ")
	if bytes.Contains(text, []byte(": ")) || bytes.HasSuffix(text, []byte(":")) {
		return nil
	}
	r.at += len(text)
	return text
}

// plain writes what a plain scalar means, where that is certain.
func (r *plainReader) plain(text []byte) bool {
	switch {
	case len(text) == 0:
		return false
	case letter(text[0]), text[0] == '/', text[0] == '_':
		switch word := plainWord(text); word {
		case "":
			return r.text(text)
		case "true", "false", "null":
			r.json = append(r.json, word...)
			return true
		}
		return false
	case text[0] >= '0' && text[0] <= '9':
		switch plainNumber(text) {
		case 'n':
			r.json = append(r.json, text...)
			return true
		case 's':
			return r.text(text)
		}
	}
	return false
}

func (r *plainReader) text(text []byte) bool {
	var err error
	r.json, err = appendJSONString(r.json, string(text))
	return err == nil
}

func letter(c byte) bool { return c|0x20 >= 'a' && c|0x20 <= 'z' }

// wordByte are letters, digits and what names have besides.
var wordByte = func() (set [256]bool) {
	for c := range set {
		set[c] = letter(byte(c)) || c >= '0' && c <= '9' || slices.Contains([]byte("-_./"), byte(c))
	}
	return set
}()

// plainWord is the text, if YAML takes it for something else than text.
func plainWord(text []byte) string {
	switch word := string(text); word {
	case "y", "Y", "yes", "Yes", "YES", "on", "On", "ON", "n", "N", "no", "No", "NO", "off", "Off", "OFF",
		"true", "True", "TRUE", "false", "False", "FALSE", "null", "Null", "NULL":
		return word
	}
	return ""
}

// plainNumber tells of what begins with a digit whether it is certainly a number,
// 'n', or text, 's': no number of YAML, nor a time, has these characters.
func plainNumber(text []byte) byte {
	digits, dots, dashes, colons, slashes, letters := 0, 0, 0, 0, 0, 0
	for _, c := range text {
		switch {
		case c >= '0' && c <= '9':
			digits++
		case c == '.':
			dots++
		case c == '-':
			dashes++
		case c == ':':
			colons++
		case c == '/':
			slashes++
		case bytes.IndexByte([]byte("abcdefABCDEFoOtTxXzZ"), c) >= 0:
		case letter(c):
			letters++
		default:
			return 0
		}
	}
	switch {
	case digits == len(text) && (text[0] != '0' || len(text) == 1) && len(text) <= 18:
		return 'n'
	case digits+dots == len(text) && dots > 1, letters > 0, dashes > 3, dashes == 0 && colons+slashes > 0:
		return 's'
	}
	return 0
}
