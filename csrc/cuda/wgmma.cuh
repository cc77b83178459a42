// wgmma of sm_90a: products of a warpgroup (four warps) that run asynchronously.
//
// Rows of accumulators and left operands belong to the warps in turn, 16 each, with the layout of
// mma() in primitives.cuh. Between a fence and the wait for its group nobody may touch the
// registers that a product uses.
#pragma once

#include "primitives_sm90.cuh"

/// Give registers of this warpgroup back, or take them. (PTX ISA: setmaxnreg)
template <int Registers>
DEVICE void registers_down_to() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(Registers));
}

template <int Registers>
DEVICE void registers_up_to() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(Registers));
}

/// Order earlier accesses to accumulators and left operands before the next products. (PTX ISA:
/// wgmma.fence)
DEVICE void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }

/// Close a group: the products since the last one. (PTX ISA: wgmma.commit_group)
DEVICE void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }

/// Wait until at most `Pending` groups of products run. (PTX ISA: wgmma.wait_group)
template <int Pending>
DEVICE void wgmma_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(Pending) : "memory");
}

/// Keep the compiler from moving accesses to accumulators across this point.
template <int PARTS>
DEVICE void pin(float (&x)[PARTS][4]) {
  for (auto& part : x) {
    for (float& value : part) asm volatile("" : "+f"(value)::"memory");
  }
}

/// A tile of 128-byte rows in shared memory, aligned to 1024 bytes and swizzled by 128 bytes:
/// 1024 bytes from one group of eight rows to the next. Bits 0..13 address / 16, 16..29 the offset
/// between panels of such rows / 16, of which only wgmma_nn() takes more than one, 32..45 that
/// between groups / 16, 62..63 the swizzle. (PTX ISA: Matrix Descriptor Format)
DEVICE uint64_t matrix_descriptor(uint32_t address, uint32_t panel = 16) {
  return (address & 0x3ffff) >> 4 | uint64_t(panel >> 4) << 16 | uint64_t(1024 >> 4) << 32 |
         uint64_t(1) << 62;
}

#define PART(x, i) "+f"(x[i][0]), "+f"(x[i][1]), "+f"(x[i][2]), "+f"(x[i][3])
#define PARTS_8(x, i)                                                                         \
  PART(x, i), PART(x, i + 1), PART(x, i + 2), PART(x, i + 3), PART(x, i + 4), PART(x, i + 5), \
      PART(x, i + 6), PART(x, i + 7)
#define FIRST_32                                                                     \
  "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, " \
  "%18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31"
#define NEXT_32                                                                           \
  "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, %48, " \
  "%49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"

// (PTX ISA: wgmma.mma_async, and Register Fragments for wgmma.mma_async.m64nNk16)
#define WGMMA(T, TYPE)                                                                           \
  /** c [64, 128] = a [64, 16] bᵀ [16, 128], plus c where accumulate; both from shared memory, \
      with the 16 side by side in a row. */                                                      \
  DEVICE void wgmma_nt(float (&c)[16][4], uint64_t a, uint64_t b, int accumulate, T) {           \
    asm volatile(                                                                                \
        "{\n.reg .pred p;\nsetp.ne.b32 p, %66, 0;\n"                                             \
        "wgmma.mma_async.sync.aligned.m64n128k16.f32." TYPE "." TYPE " {" FIRST_32 ", " NEXT_32  \
        "}, %64, %65, p, 1, 1, 0, 0;\n}"                                                         \
        : PARTS_8(c, 0), PARTS_8(c, 8)                                                           \
        : "l"(a), "l"(b), "r"(accumulate));                                                      \
  }                                                                                              \
  /** c [64, 64] += a [64, 16] b [16, 64], a from registers, b with the 64 in a row. */          \
  DEVICE void wgmma_nn(float (&c)[8][4], const uint32_t (&a)[4], uint64_t b, T) {                \
    asm volatile("wgmma.mma_async.sync.aligned.m64n64k16.f32." TYPE "." TYPE " {" FIRST_32       \
                 "}, {%32, %33, %34, %35}, %36, 1, 1, 1, 1;"                                     \
                 : PARTS_8(c, 0)                                                                 \
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));                          \
  }                                                                                              \
  /** The same for c [64, 128] and b [16, 128], of which each 64 are a panel. */                 \
  DEVICE void wgmma_nn(float (&c)[16][4], const uint32_t (&a)[4], uint64_t b, T) {               \
    asm volatile("wgmma.mma_async.sync.aligned.m64n128k16.f32." TYPE "." TYPE " {" FIRST_32      \
                 ", " NEXT_32 "}, {%64, %65, %66, %67}, %68, 1, 1, 1, 1;"                        \
                 : PARTS_8(c, 0), PARTS_8(c, 8)                                                  \
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));                          \
  }

WGMMA(bf16, "bf16")
WGMMA(fp16, "f16")

#undef PART
#undef PARTS_8
#undef FIRST_32
#undef NEXT_32
#undef WGMMA
