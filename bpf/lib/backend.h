/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/* Frontends and their backends, for every hook: no packet is needed to ask here. */
#ifndef MOORING_BACKEND_H
#define MOORING_BACKEND_H

#include "pkt.h"
#include "config.h"

ALWAYS struct svc *svc_find(const struct addr *addr, __be16 port, __u8 proto)
{
	struct svc_key key = { .addr = *addr, .port = port, .proto = proto };

	return bpf_map_lookup_elem(&mooring_services, &key);
}

ALWAYS struct backend *backend_at(__u32 index)
{
	return bpf_map_lookup_elem(&mooring_backends, &index);
}

/* A backend that an earlier decision named, while it is still the same one. */
ALWAYS struct backend *backend_of(__u32 index, __u32 generation)
{
	struct backend *b = index ? backend_at(index) : NULL;

	if (!b || b->state == BACKEND_FREE || b->generation != generation)
		return NULL;
	return b;
}

ALWAYS __u32 svc_pick(const struct svc_slots *slots)
{
	__u32 index = slots->first + bpf_get_prandom_u32() % slots->count;
	__u32 *backend = bpf_map_lookup_elem(&mooring_slots, &index);

	return backend ? *backend : 0;
}

#endif
