# syntax=docker/dockerfile:1
# SPDX-License-Identifier: Apache-2.0
#
#   docker buildx build --platform linux/amd64,linux/arm64 --build-arg VERSION=v0.1.0 -t REPOSITORY:TAG .
#
# Static programs, and iptables for the masquerade; no shell, nothing else.

FROM --platform=$BUILDPLATFORM golang:1.26-bookworm AS build
ARG TARGETARCH
ARG VERSION=unknown
WORKDIR /src
COPY go.mod go.sum ./
RUN go mod download
COPY . .
ENV CGO_ENABLED=0 GOARCH=$TARGETARCH
RUN go build -trimpath -buildvcs=false -ldflags "-s -w -X main.version=$VERSION" -o /out/ ./plugins/... ./daemon/mooringd ./daemon/mooring
# What CNI itself brings, for nodes that have none of it.
RUN for plugin in main/loopback meta/portmap meta/bandwidth; do \
      go install -trimpath -ldflags "-s -w" github.com/containernetworking/plugins/plugins/$plugin@v1.9.1 || exit 1; \
    done && find /go/bin -type f -exec cp {} /out/ \;

FROM debian:bookworm-slim AS iptables
RUN apt-get update && apt-get install -y --no-install-recommends iptables
COPY conf/kubernetes/iptables-root.sh /
RUN /iptables-root.sh /iptables

FROM scratch
COPY --from=iptables /iptables/ /
COPY --from=build /out/mooringd /out/mooring /
COPY --from=build /out/mooring-cni /out/mooring-ipam /cni/
COPY --from=build /out/loopback /out/portmap /out/bandwidth /cni/standard/
ENV PATH=/usr/sbin:/
ENTRYPOINT ["/mooringd"]
