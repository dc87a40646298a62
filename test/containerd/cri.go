// SPDX-License-Identifier: Apache-2.0

package containerd

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"

	"github.com/mooring-cni/mooring/test/netns"
)

// client is the CRI client program and the calls that wait for its answers.
type client struct {
	in io.WriteCloser

	mutex   sync.Mutex
	last    int
	waiting map[int]chan reply
	err     error // of the program, once it has ended
}

type reply struct {
	ID       int             `json:"id"`
	Response json.RawMessage `json:"response"`
	Error    string          `json:"error"`
}

func newClient(t netns.T, program, socket string) *client {
	t.Helper()
	command := exec.Command(program, socket)
	command.Stderr = os.Stderr
	in, err := command.StdinPipe()
	if err != nil {
		t.Fatalf("start the CRI client: %v", err)
	}
	out, err := command.StdoutPipe()
	if err != nil {
		t.Fatalf("start the CRI client: %v", err)
	}
	if err := command.Start(); err != nil {
		t.Fatalf("start the CRI client: %v", err)
	}
	c := &client{in: in, waiting: map[int]chan reply{}}
	done := make(chan struct{})
	go func() {
		defer close(done)
		decoder := json.NewDecoder(out)
		for {
			var r reply
			err := decoder.Decode(&r)
			c.mutex.Lock()
			if err != nil {
				c.err = errors.Join(errors.New("the CRI client has ended"), command.Wait())
				for _, w := range c.waiting {
					close(w)
				}
				c.mutex.Unlock()
				return
			}
			c.waiting[r.ID] <- r
			delete(c.waiting, r.ID)
			c.mutex.Unlock()
		}
	}()
	t.Cleanup(func() {
		in.Close()
		<-done
	})
	return c
}

// Call calls a method of the CRI, "RuntimeService/Version", with a request and
// a response in the form of the messages' JSON.
func (r *Runtime) Call(method string, request, response any) error {
	c := r.client
	if request == nil {
		request = struct{}{}
	}
	answer := make(chan reply, 1)
	c.mutex.Lock()
	if c.err != nil {
		c.mutex.Unlock()
		return c.err
	}
	c.last++
	id := c.last
	c.waiting[id] = answer
	err := json.NewEncoder(c.in).Encode(map[string]any{"id": id, "method": method, "request": request})
	c.mutex.Unlock()
	if err != nil {
		return fmt.Errorf("%s: %w", method, err)
	}
	got, ok := <-answer
	if !ok {
		return fmt.Errorf("%s: %w", method, c.err)
	}
	if got.Error != "" {
		return fmt.Errorf("%s: %s", method, got.Error)
	}
	if response == nil {
		return nil
	}
	if err := json.Unmarshal(got.Response, response); err != nil {
		return fmt.Errorf("%s: read the response: %w", method, err)
	}
	return nil
}

// SandboxConfig is a pod as the CRI wants it, in the message's JSON form.
type SandboxConfig map[string]any

// Sandbox is the configuration of a pod of namespace default. More keys of the
// message may be set.
func (r *Runtime) Sandbox(name string) SandboxConfig {
	return SandboxConfig{
		"metadata":     map[string]any{"name": name, "namespace": "default", "uid": name + "-uid"},
		"hostname":     name,
		"logDirectory": filepath.Join(r.Dir, "logs", name),
		"linux":        map[string]any{"cgroupParent": r.Cgroup.Name + "/pods"},
	}
}

// RunSandbox makes a pod without containers and returns its ID.
func (r *Runtime) RunSandbox(config SandboxConfig) (string, error) {
	var response struct{ PodSandboxID string }
	err := r.Call("RuntimeService/RunPodSandbox", map[string]any{"config": config}, &response)
	return response.PodSandboxID, err
}

// RunContainer makes and starts a container of the image of app in a pod.
func (r *Runtime) RunContainer(sandbox string, config SandboxConfig, args ...string) (string, error) {
	if err := os.MkdirAll(config["logDirectory"].(string), 0o755); err != nil {
		return "", fmt.Errorf("make a directory for logs: %w", err)
	}
	var response struct{ ContainerID string }
	err := r.Call("RuntimeService/CreateContainer", map[string]any{
		"podSandboxId": sandbox, "sandboxConfig": config,
		"config": map[string]any{
			"metadata": map[string]any{"name": "app"}, "image": map[string]any{"image": AppImage},
			"args": args, "logPath": "app.log", "linux": map[string]any{},
		},
	}, &response)
	if err != nil {
		return "", err
	}
	return response.ContainerID, r.Call("RuntimeService/StartContainer", map[string]any{"containerId": response.ContainerID}, nil)
}

// Exec runs a command in a container and returns what it printed.
func (r *Runtime) Exec(container string, args ...string) (string, error) {
	var response struct {
		Stdout, Stderr []byte
		ExitCode       int
	}
	err := r.Call("RuntimeService/ExecSync", map[string]any{"containerId": container, "cmd": args, "timeout": "600"}, &response)
	if err == nil && response.ExitCode != 0 {
		err = fmt.Errorf("%s: exit code %d: %s", strings.Join(args, " "), response.ExitCode, response.Stderr)
	}
	return string(response.Stdout), err
}

// Addresses are a pod's, as the runtime knows them from the plugin's result.
func (r *Runtime) Addresses(sandbox string) ([]string, error) {
	type address struct{ IP string }
	var response struct {
		Status struct {
			Network struct {
				IP            string
				AdditionalIPs []address
			}
		}
	}
	if err := r.Call("RuntimeService/PodSandboxStatus", map[string]any{"podSandboxId": sandbox}, &response); err != nil {
		return nil, err
	}
	all := []string{response.Status.Network.IP}
	for _, a := range response.Status.Network.AdditionalIPs {
		all = append(all, a.IP)
	}
	return all, nil
}

// Stop stops a pod: DEL is called.
func (r *Runtime) Stop(sandbox string) error {
	return r.Call("RuntimeService/StopPodSandbox", map[string]any{"podSandboxId": sandbox}, nil)
}

// Remove stops and removes a pod.
func (r *Runtime) Remove(sandbox string) error {
	if err := r.Stop(sandbox); err != nil {
		return err
	}
	return r.Call("RuntimeService/RemovePodSandbox", map[string]any{"podSandboxId": sandbox}, nil)
}

// Sandboxes lists the pods that the runtime knows.
func (r *Runtime) Sandboxes() ([]string, error) {
	var response struct{ Items []struct{ ID string } }
	if err := r.Call("RuntimeService/ListPodSandbox", nil, &response); err != nil {
		return nil, err
	}
	var ids []string
	for _, item := range response.Items {
		ids = append(ids, item.ID)
	}
	return ids, nil
}

// NetworkReady is the runtime's condition of that name, and why it is not met.
func (r *Runtime) NetworkReady() (ready bool, reason string, err error) {
	var response struct {
		Status struct {
			Conditions []struct {
				Type    string
				Status  bool
				Message string
			}
		}
	}
	if err := r.Call("RuntimeService/Status", nil, &response); err != nil {
		return false, "", err
	}
	for _, c := range response.Status.Conditions {
		if c.Type == "NetworkReady" {
			return c.Status, c.Message, nil
		}
	}
	return false, "", errors.New("the runtime reports no condition NetworkReady")
}

// removeSandboxes ends all pods, so that DEL is called for what a failed test
// has left.
func (r *Runtime) removeSandboxes(t netns.T) {
	select {
	case <-r.process.Done():
		return // killed by the test; the cgroup's end is the pods'
	default:
	}
	ids, err := r.Sandboxes()
	if err != nil {
		t.Logf("list the pods that are left: %v", err)
	}
	for _, id := range ids {
		if err := r.Remove(id); err != nil {
			t.Logf("remove pod %s: %v", id, err)
		}
	}
}
