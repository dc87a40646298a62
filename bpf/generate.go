// SPDX-License-Identifier: Apache-2.0

package bpf

// The compiler is pinned: another version makes other code, and CI compares.
//
//go:generate go tool bpf2go -cc clang-19 -strip llvm-strip-19 -cflags "-O2 -Wall -Werror -mcpu=v3 -Ilib -I/usr/include/x86_64-linux-gnu" -target bpfel -go-package bpf -type svc_slots -type event -type sweep -type clock abi abi.c
//go:generate go tool bpf2go -cc clang-19 -strip llvm-strip-19 -cflags "-O2 -Wall -Werror -Wno-unused-function -mcpu=v3 -Ilib -I/usr/include/x86_64-linux-gnu" -target bpfel -go-package bpf -no-global-types endpoint endpoint.c
//go:generate go tool bpf2go -cc clang-19 -strip llvm-strip-19 -cflags "-O2 -Wall -Werror -Wno-unused-function -mcpu=v3 -Ilib -I/usr/include/x86_64-linux-gnu" -target bpfel -go-package bpf -no-global-types sweep sweep.c
//go:generate go tool bpf2go -cc clang-19 -strip llvm-strip-19 -cflags "-O2 -Wall -Werror -Wno-unused-function -mcpu=v3 -Ilib -I/usr/include/x86_64-linux-gnu -D__TARGET_ARCH_x86" -target bpfel -go-package bpf -no-global-types sock sock.c
//go:generate go tool bpf2go -cc clang-19 -strip llvm-strip-19 -cflags "-O2 -Wall -Werror -Wno-unused-function -mcpu=v3 -Ilib -I/usr/include/x86_64-linux-gnu" -target bpfel -go-package bpf -no-global-types host host.c
//go:generate go tool bpf2go -cc clang-19 -strip llvm-strip-19 -cflags "-O2 -Wall -Werror -Wno-unused-function -mcpu=v3 -Ilib -I/usr/include/x86_64-linux-gnu" -target bpfel -go-package bpf -no-global-types overlay overlay.c
//go:generate go tool bpf2go -cc clang-19 -strip llvm-strip-19 -cflags "-O2 -Wall -Werror -Wno-unused-function -mcpu=v3 -Ilib -I/usr/include/x86_64-linux-gnu" -target bpfel -go-package bpf -no-global-types north north.c
//go:generate go tool bpf2go -cc clang-19 -strip llvm-strip-19 -cflags "-O2 -Wall -Werror -Wno-unused-function -mcpu=v3 -Ilib -I/usr/include/x86_64-linux-gnu" -target bpfel -go-package bpf -no-global-types xdp xdp.c
//go:generate go tool stringer -type abiDropReason -trimprefix abiDropReason -output drop_reason_string.go
//go:generate go tool stringer -type abiDirection -trimprefix abiDirection -output direction_string.go
