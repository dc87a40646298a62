//go:build ignore

// SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause
/* No program: the shared types, for bpf2go to read from BTF. */
#include "lib/abi.h"
#include "lib/maps.h"

/* Types that no map holds are kept by a use. */
struct event *unused_event __attribute__((unused));
struct sweep *unused_sweep __attribute__((unused));
struct clock *unused_clock __attribute__((unused));
enum hook_mode unused_hook_mode __attribute__((unused));
enum ct_tether unused_ct_tether __attribute__((unused));
enum socket_flags unused_socket_flags __attribute__((unused));
enum ct_type unused_ct_type __attribute__((unused));
enum ct_state unused_ct_state __attribute__((unused));
enum ct_flags unused_ct_flags __attribute__((unused));
enum svc_flags unused_svc_flags __attribute__((unused));
enum endpoint_limits unused_endpoint_limits __attribute__((unused));
enum node_flags unused_node_flags __attribute__((unused));
enum backend_state unused_backend_state __attribute__((unused));
enum drop_reason unused_drop_reason __attribute__((unused));
enum direction unused_direction __attribute__((unused));
enum ct_stat unused_ct_stat __attribute__((unused));
enum event_kind unused_event_kind __attribute__((unused));
enum policy_direction unused_policy_direction __attribute__((unused));
enum policy_number unused_policy_number __attribute__((unused));
enum sweep_proto unused_sweep_proto __attribute__((unused));
