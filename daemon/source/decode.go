// SPDX-License-Identifier: Apache-2.0

package source

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"hash/maphash"
	"io"
	"reflect"
	"regexp"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"

	"go.yaml.in/yaml/v2"
	corev1 "k8s.io/api/core/v1"
	discoveryv1 "k8s.io/api/discovery/v1"
	networkingv1 "k8s.io/api/networking/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/util/validation"
	strictjson "sigs.k8s.io/json"
	policyv1beta1 "sigs.k8s.io/network-policy-api/apis/v1beta1"

	"github.com/mooring-cni/mooring/daemon/model"
)

// kind is what Mooring reads, in the order in which a delivery lists it.
type kind uint8

const (
	kindService kind = iota
	kindSlice
	kindPod
	kindNamespace
	kindNode
	kindPolicy
	kindClusterPolicy
)

var kinds = map[string]struct {
	kind       kind
	apiVersion string
}{
	"Service":       {kindService, "v1"},
	"EndpointSlice": {kindSlice, "discovery.k8s.io/v1"},
	"Pod":           {kindPod, "v1"},
	"Namespace":     {kindNamespace, "v1"},
	"Node":          {kindNode, "v1"},
	"NetworkPolicy": {kindPolicy, "networking.k8s.io/v1"},

	"ClusterNetworkPolicy": {kindClusterPolicy, "policy.networking.k8s.io/v1beta1"},
}

const kindNames = "Service, Pod, Namespace, Node (v1), EndpointSlice (discovery.k8s.io/v1), NetworkPolicy (networking.k8s.io/v1), ClusterNetworkPolicy (policy.networking.k8s.io/v1beta1) and List (v1)"

func (k kind) String() string {
	for name, known := range kinds {
		if known.kind == k {
			return name
		}
	}
	return "?"
}

func (k kind) namespaced() bool {
	return k != kindNamespace && k != kindNode && k != kindClusterPolicy
}

func (k kind) policy() bool { return k == kindPolicy || k == kindClusterPolicy }

// key identifies an object. Those without namespace have only a name.
type key struct {
	kind kind
	name model.Name
}

func (k key) String() string {
	if !k.kind.namespaced() {
		return k.kind.String() + " " + k.name.Name
	}
	return k.kind.String() + " " + k.name.String()
}

// object is one object of a manifest. Its value is a pointer to a noun of the
// model, or nil where Mooring has nothing to do with the object. An object
// that is refused has a key, and its definition before stays in use.
type object struct {
	key     key
	value   any
	refused bool
}

// document is what one document of a file holds. It is written once and may be
// shared by later states of the file.
type document struct {
	objects  []object
	problems []model.Problem
	// malformed documents are what the API server could not decode either:
	// broken syntax, no kind or name, a value of the wrong type. A bad value of
	// the right type is not.
	malformed bool
	items     []item // of lists
}

// item is an element of a list, a document of its own for those who read it.
type item struct {
	hash     uint64 // 0: not one that may be used again
	document *document
}

// parsed is a file's content.
type parsed struct {
	documents []*document
	byHash    map[uint64]*document
}

var hashSeed = maphash.MakeSeed()

// parse reads a file's content. Documents that were in before are not read
// again, so that a change costs what it changes.
func parse(file string, data []byte, before *parsed) *parsed {
	parts := split(data)
	p := &parsed{documents: make([]*document, len(parts)), byHash: make(map[uint64]*document, len(parts))}
	hashes := make([]uint64, len(parts))
	parallel(len(parts), func(i int) {
		hashes[i] = maphash.Bytes(hashSeed, parts[i])
		if p.documents[i] = before.known(hashes[i]); p.documents[i] == nil {
			p.documents[i] = parseDocument(file, parts[i], before)
		}
	})
	for i, d := range p.documents {
		p.remember(hashes[i], d)
	}
	return p
}

func (p *parsed) remember(hash uint64, d *document) {
	if hash != 0 {
		p.byHash[hash] = d
	}
	for _, item := range d.items {
		p.remember(item.hash, item.document)
	}
}

// known gives the document of the same content that was there before.
func (p *parsed) known(hash uint64) *document {
	if p == nil {
		return nil
	}
	return p.byHash[hash]
}

// parallel calls f for 0 to n-1 on all processors.
func parallel(n int, f func(int)) {
	const batch = 16
	workers := min(runtime.GOMAXPROCS(0), (n+batch-1)/batch)
	if workers <= 1 {
		for i := range n {
			f(i)
		}
		return
	}
	var next atomic.Int64
	var group sync.WaitGroup
	for range workers {
		group.Go(func() {
			for {
				end := int(next.Add(batch))
				for i := end - batch; i < min(end, n); i++ {
					f(i)
				}
				if end >= n {
					return
				}
			}
		})
	}
	group.Wait()
}

// split cuts a file into its documents; those without content are left out and
// not counted. The separators are YAML's own: a line that starts with "---" or
// "..." cannot be part of a document, whatever quotes or blocks are open.
func split(data []byte) [][]byte {
	data = bytes.TrimPrefix(data, []byte("\xef\xbb\xbf"))
	var parts [][]byte
	start, content := 0, false
	for at := 0; at < len(data); {
		end := len(data)
		if i := bytes.IndexByte(data[at:], '\n'); i >= 0 {
			end = at + i + 1
		}
		line := bytes.TrimRight(data[at:end], " \t\r\n")
		marker := len(line) >= 3 && (string(line[:3]) == "---" || string(line[:3]) == "...") && (len(line) == 3 || line[3] == ' ' || line[3] == '\t')
		if marker {
			if content {
				parts = append(parts, data[start:at])
			}
			start, content = at, false
			if line[0] == '.' {
				start = end
			}
			line = line[3:]
		}
		if line = bytes.TrimLeft(line, " \t"); len(line) > 0 && line[0] != '#' {
			content = true
		}
		at = end
	}
	if content {
		parts = append(parts, data[start:])
	}
	return parts
}

func parseDocument(file string, data []byte, before *parsed) *document {
	d := &document{}
	trimmed := bytes.TrimSpace(data)
	if len(trimmed) > 0 && (trimmed[0] == '{' || trimmed[0] == '[') {
		if values, err := jsonValues(trimmed); err == nil {
			for _, value := range values {
				d.parseObject(file, jsonText{all: value, head: value}, "", before)
			}
			return d
		}
		// Flow style YAML looks the same from outside.
	}
	if d.parseYAMLList(file, data, before) {
		return d
	}
	if len(data) > maxYAML {
		d.malformed = true
		d.problems = append(d.problems, model.Problem{Message: fmt.Sprintf("is larger than %d MiB and is not read; split it into several documents, or write it as JSON", maxYAML>>20)})
		return d
	}
	text, err := yamlToJSON(data, "document")
	if err != nil {
		d.malformed = true
		d.problems = append(d.problems, model.Problem{Message: yamlMessage(err, "document")})
		return d
	}
	d.parseObject(file, text, "", before)
	return d
}

// jsonText is a document, or an item of a list, as JSON.
type jsonText struct {
	all        []byte
	head       []byte   // with what struct head is read from, at least
	duplicates []string // messages on keys that occur twice, of which the last counts
}

// yamlToJSON turns a document, or an item of a list, into JSON.
func yamlToJSON(data []byte, part string) (jsonText, error) {
	if text, ok := plainToJSON(data, part); ok {
		return text, nil
	}
	var tree any
	var duplicates []string
	if err := yaml.UnmarshalStrict(data, &tree); err != nil {
		tree = nil
		if err := yaml.Unmarshal(data, &tree); err != nil {
			return jsonText{}, err
		}
		duplicates = yamlDuplicates(err, part)
	}
	if part == "item" {
		list, ok := tree.([]any)
		if !ok || len(list) != 1 {
			return jsonText{}, errors.New("is not an item")
		}
		tree = list[0]
	}
	all, err := appendJSON(make([]byte, 0, 2*len(data)), tree)
	return jsonText{all: all, head: all, duplicates: duplicates}, err
}

// parseYAMLList reads a list in block style item by item: as a whole, YAML takes
// forty times its size in memory, and the items that did not change would be
// read with those that did. It gives false, and has done nothing, where a list
// has to be read as a whole: its items share anchors, or are not YAML at all.
func (d *document) parseYAMLList(file string, data []byte, before *parsed) bool {
	top, parts, ok := cutYAMLList(data)
	if !ok {
		return false
	}
	text, err := yamlToJSON(top, "document")
	var h head
	if err != nil || len(text.duplicates) > 0 || strictjson.UnmarshalCaseSensitivePreserveInts(text.head, &h) != nil {
		return false
	}
	element, ok := h.element()
	if !ok || h.APIVersion != listVersion(element) || len(h.Items) > 0 {
		return false
	}
	items := make([]item, len(parts))
	var unreadable atomic.Bool
	parallel(len(parts), func(i int) {
		items[i] = before.item(element, parts[i], func(d *document) {
			text, err := yamlToJSON(parts[i], "item")
			if err != nil {
				unreadable.Store(true)
				d.malformed = true
				d.problems = append(d.problems, model.Problem{Message: yamlMessage(err, "item")})
				return
			}
			d.parseItem(file, text, element, before)
		})
	})
	if unreadable.Load() && len(data) <= maxYAML {
		return false
	}
	d.addItems(h.Kind, items)
	return true
}

// cutYAMLList cuts a document in block style at the items of its list. Where a
// quote or a bracket is open across a cut, the parts are not YAML.
func cutYAMLList(data []byte) (top []byte, items [][]byte, ok bool) {
	const key = "items:"
	from := 0
	if !bytes.HasPrefix(data, []byte(key)) {
		if from = bytes.Index(data, []byte("\n"+key)) + 1; from == 0 {
			return nil, nil, false
		}
	}
	for _, end := range []string{"\u0085", "\u2028", "\u2029"} {
		if bytes.Contains(data, []byte(end)) {
			return nil, nil, false // YAML knows more ends of a line than this does
		}
	}
	if bytes.Count(data, []byte("\r")) != bytes.Count(data, []byte("\r\n")) {
		return nil, nil, false
	}
	start, indent, end := -1, -1, len(data) // of the item, of all items, of the list
	opening, first := 0, true
	for at := from; at < len(data); {
		next := len(data)
		if i := bytes.IndexByte(data[at:], '\n'); i >= 0 {
			next = at + i + 1
		}
		line := bytes.TrimRight(data[at:next], " \t\r\n")
		content := bytes.TrimLeft(line, " ")
		depth := len(line) - len(content)
		dash := len(content) > 0 && content[0] == '-' && (len(content) == 1 || content[1] == ' ')
		switch {
		case first:
			if string(line) != key {
				return nil, nil, false
			}
			first = false
		case len(content) == 0 || content[0] == '#':
		case dash && (indent < 0 || depth == indent):
			if start >= 0 {
				items = append(items, data[start:at])
			} else {
				opening = at
			}
			start, indent = at, depth
		case indent < 0:
			return nil, nil, false
		case depth > indent:
		case depth > 0 || dash:
			return nil, nil, false
		default:
			end = at
		}
		if end < len(data) {
			break
		}
		at = next
	}
	if start < 0 {
		return nil, nil, false
	}
	items = append(items, data[start:end])
	return slices.Concat(data[:opening], data[end:]), items, true
}

// appendJSON writes what YAML holds as JSON, by the same rules as
// sigs.k8s.io/yaml and therefore kubectl, in a quarter of its time: of 10,000
// services' load that is a fifth.
func appendJSON(b []byte, value any) ([]byte, error) {
	switch v := value.(type) {
	case nil:
		return append(b, "null"...), nil
	case bool:
		return strconv.AppendBool(b, v), nil
	case int:
		return strconv.AppendInt(b, int64(v), 10), nil
	case int64:
		return strconv.AppendInt(b, v, 10), nil
	case uint64:
		return strconv.AppendUint(b, v, 10), nil
	case string:
		return appendJSONString(b, v)
	case []any:
		b = append(b, '[')
		for i, element := range v {
			if i > 0 {
				b = append(b, ',')
			}
			var err error
			if b, err = appendJSON(b, element); err != nil {
				return nil, err
			}
		}
		return append(b, ']'), nil
	case map[any]any:
		b = append(b, '{')
		for name, element := range v {
			if b[len(b)-1] != '{' {
				b = append(b, ',')
			}
			text, err := keyText(name)
			if err != nil {
				return nil, err
			}
			if b, err = appendJSONString(b, text); err != nil {
				return nil, err
			}
			b = append(b, ':')
			if b, err = appendJSON(b, element); err != nil {
				return nil, err
			}
		}
		return append(b, '}'), nil
	}
	text, err := json.Marshal(value) // floats; infinities are refused
	if err != nil {
		return nil, &notJSON{"value", value}
	}
	return append(b, text...), nil
}

func appendJSONString(b []byte, s string) ([]byte, error) {
	for i := range len(s) {
		if c := s[i]; c < 0x20 || c >= 0x7f || c == '"' || c == '\\' {
			text, err := json.Marshal(s)
			return append(b, text...), err
		}
	}
	b = append(b, '"')
	b = append(b, s...)
	return append(b, '"'), nil
}

// keyText is a key that YAML takes for something else than text.
func keyText(name any) (string, error) {
	switch k := name.(type) {
	case string:
		return k, nil
	case bool, int, int64, uint64:
		return fmt.Sprint(k), nil
	case float64:
		return strconv.FormatFloat(k, 'g', -1, 64), nil
	}
	return "", &notJSON{"key", name}
}

// notJSON is what YAML can say and JSON cannot.
type notJSON struct {
	what  string
	value any
}

func (e *notJSON) Error() string {
	return fmt.Sprintf("has the %s %v, which objects of the API cannot have", e.what, e.value)
}

func jsonValues(data []byte) ([]json.RawMessage, error) {
	if json.Valid(data) {
		return []json.RawMessage{data}, nil
	}
	var values []json.RawMessage
	decoder := json.NewDecoder(bytes.NewReader(data))
	for {
		var value json.RawMessage
		if err := decoder.Decode(&value); errors.Is(err, io.EOF) {
			return values, nil
		} else if err != nil {
			return nil, err
		}
		values = append(values, value)
	}
}

var yamlLine = regexp.MustCompile(`^yaml: (?:line (\d+): )?`)

func yamlMessage(err error, part string) string {
	if unwritable := (*notJSON)(nil); errors.As(err, &unwritable) {
		return unwritable.Error()
	}
	text := err.Error()
	m := yamlLine.FindStringSubmatch(text)
	if m == nil {
		return "is not YAML: " + text
	}
	text = text[len(m[0]):]
	if m[1] == "" {
		return "is not YAML: " + text
	}
	return "is not YAML: line " + m[1] + " of the " + part + ": " + text
}

var yamlDuplicate = regexp.MustCompile(`line (\d+): key "(.*?)" already set in map`)

// yamlDuplicates are the messages for keys that occur twice.
func yamlDuplicates(err error, part string) []string {
	var messages []string
	for _, m := range yamlDuplicate.FindAllStringSubmatch(err.Error(), -1) {
		messages = append(messages, fmt.Sprintf("key %q occurs twice, again in line %s of the %s", m[2], m[1], part))
	}
	if len(messages) == 0 {
		messages = append(messages, err.Error())
	}
	return messages
}

// maxYAML is how large one document or item may be that has to be read as a
// whole: etcd takes no object of more than 1.5 MiB, and YAML forty times its
// size in memory.
const maxYAML = 8 << 20

// head is what all objects have.
type head struct {
	APIVersion string            `json:"apiVersion"`
	Kind       string            `json:"kind"`
	Metadata   headMetadata      `json:"metadata"`
	Items      []json.RawMessage `json:"items"`
}

type headMetadata struct {
	Name      string `json:"name"`
	Namespace string `json:"namespace"`
}

// parseObject reads one object, or the objects of a list. Items of a typed list
// may leave out their kind.
func (d *document) parseObject(file string, text jsonText, inherited string, before *parsed) {
	var h head
	r := &report{}
	if inherited != "" {
		h.Kind, h.APIVersion = inherited, kinds[inherited].apiVersion
	}
	if err := strictjson.UnmarshalCaseSensitivePreserveInts(text.head, &h); err != nil {
		typeErr := (*json.UnmarshalTypeError)(nil)
		switch {
		case !errors.As(err, &typeErr):
			r.add("", "is not JSON: %v", err)
		case typeErr.Field == "":
			r.add("", "is %s, not an object with apiVersion and kind", article(typeErr.Value))
		case strings.HasPrefix(typeErr.Field, "items"):
			r.add("items", "is %s, want a list", article(typeErr.Value))
		}
		d.malformed = true
		if len(r.problems) > 0 {
			d.problems = append(d.problems, r.problems...)
			return
		}
		// What has the wrong type is empty now, and said below.
	}
	if element, list := h.element(); list {
		d.parseList(file, &h, element, text.duplicates, before)
		return
	}
	known, ok := kinds[h.Kind]
	r.object = strings.TrimSpace(h.Kind + " " + displayName(h.Metadata, ok && !known.kind.namespaced()))
	defer func() {
		d.problems = append(d.problems, r.problems...)
		d.malformed = d.malformed || len(r.broken) > 0
	}()
	d.malformed = d.malformed || h.Kind == "" || ok && (h.APIVersion == "" || h.Metadata.Name == "")
	switch {
	case h.Kind == "":
		r.add("kind", "is missing or not text; Mooring reads %s", kindNames)
		return
	case !ok:
		r.add("kind", "%s (%s) is not read, the object is left out; Mooring reads %s", h.Kind, h.APIVersion, kindNames)
		return
	case h.APIVersion == "":
		r.add("apiVersion", "is missing or not text; want %s for %s", known.apiVersion, h.Kind)
		return
	case h.APIVersion != known.apiVersion:
		r.add("apiVersion", "%s is not read, the object is left out; want %s for %s", h.APIVersion, known.apiVersion, h.Kind)
		return
	case h.Metadata.Name == "":
		r.add("metadata.name", "is missing or not text")
		return
	}
	k := key{known.kind, model.Name{Name: h.Metadata.Name}}
	if known.kind.namespaced() {
		k.name = nameOf(&metav1.ObjectMeta{Name: h.Metadata.Name, Namespace: h.Metadata.Namespace})
	}
	for _, part := range []struct{ field, value string }{{"metadata.name", k.name.Name}, {"metadata.namespace", k.name.Namespace}} {
		if part.value == "" {
			continue
		}
		if errs := validation.IsDNS1123Subdomain(part.value); len(errs) > 0 {
			r.add(part.field, "%q is not a name: %s", part.value, errs[0])
			return
		}
	}
	for _, duplicate := range text.duplicates {
		r.add("", "%s; the last one counts", duplicate)
	}
	value, taken := convert(file, known.kind, text.all, r)
	d.objects = append(d.objects, object{key: k, value: value, refused: !taken})
}

func displayName(m headMetadata, clusterScoped bool) string {
	switch {
	case m.Name == "":
		return ""
	case clusterScoped:
		return m.Name
	}
	return nameOf(&metav1.ObjectMeta{Name: m.Name, Namespace: m.Namespace}).String()
}

// element gives the kind of a list's items, "" where each has its own.
func (h *head) element() (string, bool) {
	element, list := strings.CutSuffix(h.Kind, "List")
	_, typed := kinds[element]
	return element, list && (element == "" || typed)
}

func listVersion(element string) string {
	if element == "" {
		return "v1"
	}
	return kinds[element].apiVersion
}

func (d *document) parseList(file string, h *head, element string, duplicates []string, before *parsed) {
	if want := listVersion(element); h.APIVersion != want {
		d.problems = append(d.problems, model.Problem{Object: h.Kind, Field: "apiVersion", Message: fmt.Sprintf("is %q; want %s for %s", h.APIVersion, want, h.Kind)})
		return
	}
	if len(duplicates) > 0 {
		before = nil // whose they are is not known: no item is as it was
	}
	items := make([]item, len(h.Items))
	parallel(len(h.Items), func(i int) {
		items[i] = before.item(element, h.Items[i], func(d *document) {
			d.parseItem(file, jsonText{all: h.Items[i], head: h.Items[i], duplicates: duplicates}, element, before)
		})
		if len(duplicates) > 0 {
			items[i].hash = 0
		}
	})
	d.addItems(h.Kind, items)
}

// item gives an item as it was read before, or reads it.
func (p *parsed) item(element string, data []byte, read func(*document)) item {
	var h maphash.Hash
	h.SetSeed(hashSeed)
	h.WriteString("item of " + element + "\n")
	h.Write(data)
	i := item{h.Sum64(), p.known(h.Sum64())}
	if i.document == nil {
		i.document = &document{}
		read(i.document)
	}
	return i
}

func (d *document) parseItem(file string, text jsonText, element string, before *parsed) {
	if string(text.all) == "null" {
		d.malformed = true
		d.problems = append(d.problems, model.Problem{Message: "is empty"})
		return
	}
	d.parseObject(file, text, element, before)
}

func (d *document) addItems(list string, items []item) {
	for i, item := range items {
		d.objects = append(d.objects, item.document.objects...)
		for _, p := range item.document.problems {
			if p.Object == "" {
				p.Object = list + " " + at("items", i)
			}
			d.problems = append(d.problems, p)
		}
		d.malformed = d.malformed || item.document.malformed
	}
	d.items = append(d.items, items...)
}

// convert decodes and converts an object of a known kind; false refuses it.
func convert(file string, k kind, data []byte, r *report) (any, bool) {
	switch k {
	case kindService:
		var o corev1.Service
		if !decode(data, &o, r) {
			return nil, false
		}
		if s := convertService(&o, r); s != nil {
			s.File = file
			return s, true
		}
	case kindSlice:
		// Endpoints are large, and a list that grows is copied again and again.
		o := discoveryv1.EndpointSlice{Endpoints: make([]discoveryv1.Endpoint, 0, bytes.Count(data, []byte(`"addresses":`)))}
		if !decode(data, &o, r) {
			return nil, false
		}
		if r.breaks("metadata.labels") {
			return nil, false
		}
		if s := convertSlice(&o, r); s != nil {
			return s, true
		}
	case kindPod:
		var o corev1.Pod
		// Losing one label would change what selects the pod.
		if !decode(data, &o, r) || r.breaks("metadata.labels") {
			return nil, false
		}
		return convertPod(&o, r), true
	case kindNamespace:
		var o corev1.Namespace
		if !decode(data, &o, r) || r.breaks("metadata.labels") {
			return nil, false
		}
		return convertNamespace(&o), true
	case kindNode:
		var o corev1.Node
		if !decode(data, &o, r) {
			return nil, false
		}
		return convertNode(&o, r), true
	case kindPolicy:
		var o networkingv1.NetworkPolicy
		if !decode(data, &o, r) {
			return nil, false
		}
		if r.misspelt() {
			return nil, false
		}
		policy, ok := convertPolicy(&o, r)
		if !ok {
			r.add("", "the policy is refused")
			return nil, false
		}
		return policy, true
	case kindClusterPolicy:
		var o policyv1beta1.ClusterNetworkPolicy
		if !decode(data, &o, r) || r.misspelt() {
			return nil, false
		}
		policy, ok := convertClusterPolicy(&o, r)
		if !ok {
			r.add("", "the policy is refused")
			return nil, false
		}
		return policy, true
	}
	return nil, true
}

// misspelt refuses a policy that decoding found something wrong in. A misspelt
// "from" would allow everybody: whatever a policy says that is not understood
// makes all of it unsound.
func (r *report) misspelt() bool {
	for _, p := range r.problems {
		if !strings.HasPrefix(p.Field, "metadata.") {
			r.add("", "the policy is refused: a part that is not understood could allow what it should not")
			return true
		}
	}
	return false
}

// decode reads JSON into an API type. Unknown and repeated fields are problems
// and ignored; a value of the wrong type is a problem and takes the innermost
// list element or map, or else the field, with it.
func decode(data []byte, into any, r *report) bool {
	strict, err := strictjson.UnmarshalStrict(data, into)
	if err != nil {
		var tree any
		decoder := json.NewDecoder(bytes.NewReader(data))
		decoder.UseNumber()
		if treeErr := decoder.Decode(&tree); treeErr != nil {
			r.add("", "is not JSON: %v", treeErr)
			return false
		}
		r.broken = make(map[string]bool)
		tree, _ = r.mend(tree, reflect.TypeOf(into).Elem(), "")
		mended, marshalErr := json.Marshal(tree)
		if marshalErr != nil {
			r.add("", "cannot be read: %v", marshalErr)
			return false
		}
		reflect.ValueOf(into).Elem().SetZero()
		if strict, err = strictjson.UnmarshalStrict(mended, into); err != nil {
			r.add("", "cannot be read: %v", err)
			return false
		}
	}
	for _, e := range strict {
		field, message := strictProblem(e.Error())
		r.add(field, "%s", message)
	}
	return true
}

var strictError = regexp.MustCompile(`^(unknown|duplicate) field "(.*)"$`)

func strictProblem(text string) (field, message string) {
	m := strictError.FindStringSubmatch(text)
	switch {
	case m == nil:
		return "", text
	case m[1] == "unknown":
		return m[2], "is not a field of this kind; ignored"
	}
	return m[2], "occurs twice; the last one counts"
}

var unmarshaler = reflect.TypeFor[json.Unmarshaler]()

// mend takes out of a decoded JSON value what does not fit a type, and reports
// it with its whole path, which the decoder's own error does not have. It gives
// false where the value itself cannot stay.
func (r *report) mend(value any, t reflect.Type, path string) (any, bool) {
	if value == nil {
		return nil, true
	}
	if reflect.PointerTo(t).Implements(unmarshaler) {
		text, err := json.Marshal(value)
		if err == nil {
			err = json.Unmarshal(text, reflect.New(t).Interface())
		}
		if err != nil {
			r.breakAt(path, "%s is not a value for it", text)
			return nil, false
		}
		return value, true
	}
	switch t.Kind() {
	case reflect.Pointer:
		return r.mend(value, t.Elem(), path)
	case reflect.Struct:
		fields, ok := value.(map[string]any)
		if !ok {
			r.breakAt(path, "%s, want an object", describe(value))
			return nil, false
		}
		return r.mendFields(fields, t, path)
	case reflect.Map:
		entries, ok := value.(map[string]any)
		if !ok {
			r.breakAt(path, "%s, want an object", describe(value))
			return nil, false
		}
		whole := true
		for _, name := range sortedKeys(entries) {
			if _, ok := r.mend(entries[name], t.Elem(), path+"["+name+"]"); !ok {
				whole = false
			}
		}
		// Half a selector or half the labels are not what was meant.
		return entries, whole
	case reflect.Slice:
		if t.Elem().Kind() == reflect.Uint8 {
			break
		}
		elements, ok := value.([]any)
		if !ok {
			r.breakAt(path, "%s, want a list", describe(value))
			return nil, false
		}
		for i := range elements {
			element, ok := r.mend(elements[i], t.Elem(), at(path, i))
			if !ok || elements[i] == nil {
				// The place stays, so that the others keep their numbers.
				element = reflect.Zero(t.Elem()).Interface()
				if !r.broken[at(path, i)] {
					r.broken[at(path, i)] = true
					if ok {
						r.add(at(path, i), "is empty")
					}
				}
			}
			elements[i] = element
		}
		return elements, true
	}
	return r.mendScalar(value, t, path)
}

func (r *report) mendFields(fields map[string]any, t reflect.Type, path string) (any, bool) {
	element := strings.HasSuffix(path, "]")
	whole := true
	for i := range t.NumField() {
		name, options, _ := strings.Cut(t.Field(i).Tag.Get("json"), ",")
		if name == "" && (t.Field(i).Anonymous || options == "inline") {
			if _, ok := r.mendFields(fields, t.Field(i).Type, path); !ok {
				whole = false
			}
			continue
		}
		value, present := fields[name]
		if name == "" || name == "-" || !present {
			continue
		}
		field := name
		if path != "" {
			field = path + "." + name
		}
		mended, ok := r.mend(value, t.Field(i).Type, field)
		if !ok {
			delete(fields, name)
			whole = false
			continue
		}
		fields[name] = mended
	}
	// An element of a list goes as a whole: a port without its protocol, an
	// endpoint without its condition would say something else.
	return fields, whole || !element && !strings.Contains(path, "]")
}

func (r *report) mendScalar(value any, t reflect.Type, path string) (any, bool) {
	fits := false
	want := t.Kind().String()
	switch t.Kind() {
	case reflect.String:
		_, fits = value.(string)
		want = "text"
		if n, number := value.(json.Number); number {
			want = `text: "` + n.String() + `", with quotes`
		} else if b, boolean := value.(bool); boolean {
			want = `text: "` + strconv.FormatBool(b) + `", with quotes`
		}
	case reflect.Bool:
		_, fits = value.(bool)
		want = "true or false, without quotes"
	case reflect.Int, reflect.Int32, reflect.Int64:
		want = "a whole number, without quotes"
		if n, number := value.(json.Number); number {
			_, err := strconv.ParseInt(n.String(), 10, t.Bits())
			fits = err == nil
		}
	default:
		text, err := json.Marshal(value)
		fits = err == nil && json.Unmarshal(text, reflect.New(t).Interface()) == nil
	}
	if !fits {
		r.breakAt(path, "%s, want %s", describe(value), want)
	}
	return value, fits
}

func (r *report) breakAt(path, format string, args ...any) {
	r.broken[path] = true
	r.add(path, format, args...)
}

func describe(value any) string {
	switch v := value.(type) {
	case map[string]any:
		return "is an object"
	case []any:
		return "is a list"
	case string:
		return "is the text " + strconv.Quote(v)
	case json.Number:
		return "is the number " + v.String()
	case bool:
		return "is " + strconv.FormatBool(v)
	}
	return "is empty"
}

// article names what the decoder calls by JSON's own words.
func article(value string) string {
	switch value {
	case "object":
		return "an object"
	case "array":
		return "a list"
	case "string":
		return "text"
	}
	return "a " + value
}

func sortedKeys(m map[string]any) []string {
	names := make([]string, 0, len(m))
	for name := range m {
		names = append(names, name)
	}
	slices.Sort(names)
	return names
}
