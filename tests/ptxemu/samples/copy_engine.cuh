// Of the instructions that sm_90 added those that only these samples use, in the manner of
// primitives_sm90.cuh: bulk copies, stores by TMA, clusters.
#pragma once

#include "primitives_sm90.cuh"

// mbarrier.

/// Arrive at the barrier of another block of the cluster, given by cluster_address(). (PTX ISA:
/// mbarrier.arrive, .shared::cluster)
DEVICE void mbarrier_arrive_remote(uint32_t barrier) {
  asm volatile("mbarrier.arrive.release.cluster.shared::cluster.b64 _, [%0];" ::"r"(barrier)
               : "memory");
}

/// Arrive; the result names the phase that this arrival belongs to. (PTX ISA: mbarrier.arrive)
DEVICE uint64_t mbarrier_arrive_token(uint32_t barrier) {
  uint64_t token;
  asm volatile("mbarrier.arrive.shared::cta.b64 %0, [%1];" : "=l"(token) : "r"(barrier) : "memory");
  return token;
}

/// Whether that phase is over. (PTX ISA: mbarrier.test_wait)
DEVICE bool mbarrier_test(uint32_t barrier, uint64_t token) {
  uint32_t done;
  asm volatile(
      "{\n.reg .pred p;\n"
      "mbarrier.test_wait.shared::cta.b64 p, [%1], %2;\n"
      "selp.b32 %0, 1, 0, p;\n}"
      : "=r"(done)
      : "r"(barrier), "l"(token)
      : "memory");
  return done;
}

// Copies by the copy engine: stores are groups of the thread that starts them.

/// (PTX ISA: cp.async.bulk)
DEVICE void bulk_load(uint32_t to, const void* from, uint32_t bytes, uint32_t barrier) {
  asm volatile(
      "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::
          "r"(to),
      "l"(from), "r"(bytes), "r"(barrier)
      : "memory");
}

/// (PTX ISA: cp.async.bulk)
DEVICE void bulk_store(void* to, uint32_t from, uint32_t bytes) {
  asm volatile("cp.async.bulk.global.shared::cta.bulk_group [%0], [%1], %2;" ::"l"(to), "r"(from),
               "r"(bytes)
               : "memory");
}

/// (PTX ISA: cp.async.bulk.commit_group)
DEVICE void bulk_commit() { asm volatile("cp.async.bulk.commit_group;" ::: "memory"); }

/// Wait until at most `Pending` groups of stores have still to read their shared memory. (PTX ISA:
/// cp.async.bulk.wait_group)
template <int Pending>
DEVICE void bulk_wait_read() {
  asm volatile("cp.async.bulk.wait_group.read %0;" ::"n"(Pending) : "memory");
}

/// (PTX ISA: prefetch.tensormap)
DEVICE void tma_prefetch(const CUtensorMap* map) {
  asm volatile("prefetch.tensormap [%0];" ::"l"(map) : "memory");
}

/// A box of a tensor, at x of its innermost dimension. (PTX ISA: cp.async.bulk.tensor)
DEVICE void tma_load(uint32_t to, const CUtensorMap* map, int x, int y, uint32_t barrier) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes"
      " [%0], [%1, {%2, %3}], [%4];" ::"r"(to),
      "l"(map), "r"(x), "r"(y), "r"(barrier)
      : "memory");
}

DEVICE void tma_load(uint32_t to, const CUtensorMap* map, int x, int y, int z, uint32_t barrier) {
  asm volatile(
      "cp.async.bulk.tensor.3d.shared::cluster.global.mbarrier::complete_tx::bytes"
      " [%0], [%1, {%2, %3, %4}], [%5];" ::"r"(to),
      "l"(map), "r"(x), "r"(y), "r"(z), "r"(barrier)
      : "memory");
}

/// Load into every block of the cluster whose bit is set, at the same place in each, and complete
/// on the barrier at the same place. (PTX ISA: cp.async.bulk.tensor, .multicast::cluster)
DEVICE void tma_load_multicast(uint32_t to, const CUtensorMap* map, int x, int y, uint32_t barrier,
                               uint16_t blocks) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes"
      ".multicast::cluster [%0], [%1, {%2, %3}], [%4], %5;" ::"r"(to),
      "l"(map), "r"(x), "r"(y), "r"(barrier), "h"(blocks)
      : "memory");
}

/// The other way. (PTX ISA: cp.async.bulk.tensor)
DEVICE void tma_store(const CUtensorMap* map, int x, int y, uint32_t from) {
  asm volatile(
      "cp.async.bulk.tensor.2d.global.shared::cta.bulk_group [%0, {%1, %2}], [%3];" ::"l"(map),
      "r"(x), "r"(y), "r"(from)
      : "memory");
}

DEVICE void tma_store(const CUtensorMap* map, int x, int y, int z, uint32_t from) {
  asm volatile(
      "cp.async.bulk.tensor.3d.global.shared::cta.bulk_group [%0, {%1, %2, %3}], [%4];" ::"l"(map),
      "r"(x), "r"(y), "r"(z), "r"(from)
      : "memory");
}

DEVICE void tma_store(const CUtensorMap* map, int x, int y, int z, int w, uint32_t from) {
  asm volatile(
      "cp.async.bulk.tensor.4d.global.shared::cta.bulk_group [%0, {%1, %2, %3, %4}], [%5];" ::"l"(
          map),
      "r"(x), "r"(y), "r"(z), "r"(w), "r"(from)
      : "memory");
}

// Clusters.

/// (PTX ISA: %cluster_ctarank)
DEVICE uint32_t cluster_rank() {
  uint32_t rank;
  asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  return rank;
}

/// (PTX ISA: %cluster_nctarank)
DEVICE uint32_t cluster_size() {
  uint32_t size;
  asm volatile("mov.u32 %0, %%cluster_nctarank;" : "=r"(size));
  return size;
}

/// The address, in the window of the cluster, that `address` has in block `rank`.
DEVICE uint32_t cluster_address(uint32_t address, uint32_t rank) {
  uint32_t remote;
  asm volatile("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(remote) : "r"(address), "r"(rank));
  return remote;
}

/// (PTX ISA: ld, .shared::cluster)
DEVICE float cluster_load(uint32_t address) {
  float x;
  asm volatile("ld.shared::cluster.f32 %0, [%1];" : "=f"(x) : "r"(address) : "memory");
  return x;
}

/// Wait for all threads of the cluster, whose earlier writes are then visible. (PTX ISA:
/// barrier.cluster)
DEVICE void cluster_sync() {
  asm volatile("barrier.cluster.arrive.release.aligned;" ::: "memory");
  asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory");
}

/// Write four 8 x 8 matrices of 16-bit elements: the reverse of ldmatrix(). (PTX ISA: stmatrix)
DEVICE void stmatrix(uint32_t address, const uint32_t (&x)[4]) {
  asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(address),
               "r"(x[0]), "r"(x[1]), "r"(x[2]), "r"(x[3])
               : "memory");
}
