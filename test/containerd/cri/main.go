// SPDX-License-Identifier: Apache-2.0

// Command cri speaks the Container Runtime Interface for programs that do not
// want to link it: a request is a line of JSON on standard input, an answer is
// one on standard output, in the order in which the runtime answers.
//
//	{"id": 1, "method": "RuntimeService/RunPodSandbox", "request": {"config": {...}}}
//	{"id": 1, "response": {"podSandboxId": "..."}}
//	{"id": 1, "error": "rpc error: ..."}
//
// Messages are the protocol buffers' own JSON form.
package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"strings"
	"sync"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/protobuf/encoding/protojson"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/reflect/protoreflect"
	"google.golang.org/protobuf/reflect/protoregistry"
	runtime "k8s.io/cri-api/pkg/apis/runtime/v1"
)

// limit is more than a runtime needs for anything that tests ask of it.
const limit = 4 * time.Minute

// A question is a line of the input.
type question struct {
	ID      int             `json:"id"`
	Method  string          `json:"method"`
	Request json.RawMessage `json:"request"`
}

// An answer is a line of the output.
type answer struct {
	ID       int             `json:"id"`
	Response json.RawMessage `json:"response,omitempty"`
	Error    string          `json:"error,omitempty"`
}

func main() {
	if len(os.Args) != 2 {
		fmt.Fprintln(os.Stderr, "usage: cri SOCKET")
		os.Exit(2)
	}
	if err := serve(os.Args[1], os.Stdin, os.Stdout); err != nil {
		fmt.Fprintln(os.Stderr, "cri:", err)
		os.Exit(1)
	}
}

func serve(socket string, in io.Reader, out io.Writer) error {
	connection, err := grpc.NewClient("unix://"+socket, grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		return fmt.Errorf("dial %s: %w", socket, err)
	}
	defer connection.Close()

	var running sync.WaitGroup
	defer running.Wait()
	var mutex sync.Mutex
	encoder, decoder := json.NewEncoder(out), json.NewDecoder(in)
	for {
		var q question
		if err := decoder.Decode(&q); errors.Is(err, io.EOF) {
			return nil
		} else if err != nil {
			return fmt.Errorf("read a request: %w", err)
		}
		running.Go(func() {
			a := answer{ID: q.ID}
			response, err := call(connection, q)
			if err != nil {
				a.Error = err.Error()
			}
			a.Response = response
			mutex.Lock()
			defer mutex.Unlock()
			encoder.Encode(a)
		})
	}
}

func call(connection *grpc.ClientConn, q question) (json.RawMessage, error) {
	service, method, _ := strings.Cut(q.Method, "/")
	name := protoreflect.FullName("runtime.v1." + service)
	descriptor := runtime.File_staging_src_k8s_io_cri_api_pkg_apis_runtime_v1_api_proto
	found := descriptor.Services().ByName(name.Name())
	if found == nil || found.Methods().ByName(protoreflect.Name(method)) == nil {
		return nil, fmt.Errorf("the runtime interface has no method %q", q.Method)
	}
	m := found.Methods().ByName(protoreflect.Name(method))
	request, err := message(m.Input())
	if err != nil {
		return nil, err
	}
	response, err := message(m.Output())
	if err != nil {
		return nil, err
	}
	if len(q.Request) > 0 {
		if err := protojson.Unmarshal(q.Request, request); err != nil {
			return nil, fmt.Errorf("read the request of %s: %w", q.Method, err)
		}
	}
	ctx, cancel := context.WithTimeout(context.Background(), limit)
	defer cancel()
	// A runtime that has just been killed is waited for.
	if err := connection.Invoke(ctx, "/"+string(name)+"/"+method, request, response, grpc.WaitForReady(true)); err != nil {
		return nil, err
	}
	return protojson.Marshal(response)
}

func message(d protoreflect.MessageDescriptor) (proto.Message, error) {
	t, err := protoregistry.GlobalTypes.FindMessageByName(d.FullName())
	if err != nil {
		return nil, fmt.Errorf("message %s: %w", d.FullName(), err)
	}
	return t.New().Interface(), nil
}
