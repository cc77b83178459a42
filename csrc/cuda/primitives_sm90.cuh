// The instructions that sm_90 added and these kernels use, one function each: barriers in shared
// memory, TMA, warps of different roles. Shared memory is named by shared_address().
#pragma once

#include <cuda.h>

#include "primitives.cuh"

// mbarrier: counts arrivals of threads and bytes of copies; each completion ends a phase.

/// (PTX ISA: mbarrier.init)
DEVICE void mbarrier_init(uint32_t barrier, uint32_t arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(arrivals) : "memory");
}

/// Make initialised barriers visible to the copy engine and to the cluster. (PTX ISA:
/// fence.mbarrier_init)
DEVICE void mbarrier_init_fence() {
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}

/// (PTX ISA: mbarrier.arrive)
DEVICE void mbarrier_arrive(uint32_t barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(barrier) : "memory");
}

/// Arrive, and let the phase also wait for `bytes` of copies. (PTX ISA: mbarrier.arrive,
/// .expect_tx)
DEVICE void mbarrier_arrive_expect(uint32_t barrier, uint32_t bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes)
               : "memory");
}

/// Wait for the end of a phase: the first, third, ... have parity 0, the others 1. On a fresh
/// barrier parity 1 counts as over. (PTX ISA: mbarrier.try_wait)
DEVICE void mbarrier_wait(uint32_t barrier, uint32_t parity) {
  uint32_t done = 0;
  while (!done) {
    asm volatile(
        "{\n.reg .pred p;\n"
        "mbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2;\n"
        "selp.b32 %0, 1, 0, p;\n}"
        : "=r"(done)
        : "r"(barrier), "r"(parity)
        : "memory");
  }
}

// Copies by the copy engine. One thread starts them; they complete on a barrier.

/// Order this thread's accesses to shared memory before the copy engine's. (PTX ISA:
/// fence.proxy.async)
DEVICE void async_fence() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

/// A box of a tensor of rank 4. (PTX ISA: cp.async.bulk.tensor)
DEVICE void tma_load(uint32_t to, const CUtensorMap* map, int x, int y, int z, int w,
                     uint32_t barrier) {
  asm volatile(
      "cp.async.bulk.tensor.4d.shared::cluster.global.mbarrier::complete_tx::bytes"
      " [%0], [%1, {%2, %3, %4, %5}], [%6];" ::"r"(to),
      "l"(map), "r"(x), "r"(y), "r"(z), "r"(w), "r"(barrier)
      : "memory");
}

// Warps of different roles.

/// Whether this lane is the one that acts for its warp. (PTX ISA: elect.sync)
DEVICE bool elect_one() {
  uint32_t elected;
  asm volatile(
      "{\n.reg .pred p;\n"
      "elect.sync _|p, 0xffffffff;\n"
      "selp.b32 %0, 1, 0, p;\n}"
      : "=r"(elected));
  return elected;
}

/// A barrier of some of the block's warps; 0 is that of __syncthreads(). (PTX ISA: bar.sync)
DEVICE void named_barrier(int id, int threads) {
  asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory");
}

/// Arrive there without waiting. (PTX ISA: bar.arrive)
DEVICE void named_barrier_arrive(int id, int threads) {
  asm volatile("bar.arrive %0, %1;" ::"r"(id), "r"(threads) : "memory");
}
