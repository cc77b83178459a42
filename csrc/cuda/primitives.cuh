// The instructions of sm_80 and later that CUDA C++ has no name for, one function each: the only
// inline PTX of these kernels. Beside each the section of the PTX ISA that it comes from
// (docs.nvidia.com/cuda/parallel-thread-execution).
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

#define DEVICE __device__ __forceinline__

using bf16 = __nv_bfloat16;
using fp16 = __half;
using f16 = fp16;
using f32 = float;

/// A pointer into shared memory as the 32-bit address that the instructions below take.
DEVICE uint32_t shared_address(const void* pointer) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
}

/// Makes the compiler forget what it knows of x: what follows is computed of it here, and not kept
/// in registers from one round of a loop to the next.
DEVICE void forget(uint32_t& x) { asm volatile("" : "+r"(x)); }

/// Start copying 16 bytes from global to shared memory, past L1 and the registers. (PTX ISA:
/// cp.async)
DEVICE void cp_async(uint32_t to, const void* from) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(to), "l"(from) : "memory");
}

/// The same, but zeros where `inside` is false: nothing is then read.
DEVICE void cp_async_or_zero(uint32_t to, const void* from, bool inside) {
  const int bytes = inside ? 16 : 0;
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(from), "r"(bytes)
               : "memory");
}

/// The same of 4 bytes, which may lie anywhere. (PTX ISA: cp.async, .ca)
DEVICE void cp_async4_or_zero(uint32_t to, const void* from, bool inside) {
  const int bytes = inside ? 4 : 0;
  asm volatile("cp.async.ca.shared.global [%0], [%1], 4, %2;" ::"r"(to), "l"(from), "r"(bytes)
               : "memory");
}

/// Close a group: the copies that this thread started since the last one. (PTX ISA:
/// cp.async.commit_group)
DEVICE void cp_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }

/// Wait until at most `Pending` groups of this thread are on their way. Other threads' copies are
/// visible only after a barrier that follows this.
/// (PTX ISA: cp.async.wait_group)
template <int Pending>
DEVICE void cp_async_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(Pending) : "memory");
}

/// 8 and 16 bytes of shared memory. (PTX ISA: ld, st)
DEVICE uint2 load_shared8(uint32_t address) {
  uint2 x;
  asm volatile("ld.shared.v2.u32 {%0, %1}, [%2];" : "=r"(x.x), "=r"(x.y) : "r"(address) : "memory");
  return x;
}

DEVICE uint4 load_shared16(uint32_t address) {
  uint4 x;
  asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(x.x), "=r"(x.y), "=r"(x.z), "=r"(x.w)
               : "r"(address)
               : "memory");
  return x;
}

/// Four matrices of 8 rows x 16 bytes. Lane 8i + r brings the address of row r of matrix i; then
/// lane 4r + c holds word c of row r of each (as 16-bit elements: columns 2c and 2c + 1).
/// (PTX ISA: Warp-level matrix load instruction, ldmatrix)
DEVICE void ldmatrix(uint32_t (&x)[4], uint32_t address) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(x[0]), "=r"(x[1]), "=r"(x[2]), "=r"(x[3])
               : "r"(address)
               : "memory");
}

/// The same for 16-bit elements, each matrix transposed: lane 4c + r holds rows 2r and 2r + 1 of
/// column c.
DEVICE void ldmatrix_transposed(uint32_t (&x)[4], uint32_t address) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(x[0]), "=r"(x[1]), "=r"(x[2]), "=r"(x[3])
               : "r"(address)
               : "memory");
}

/// c [16, 8] += a [16, 16] b [16, 8]. With g = lane / 4 and t = lane % 4 a lane holds
///   c: (g, 2t) (g, 2t+1) (g+8, 2t) (g+8, 2t+1)
///   a: (g, 2t..) (g+8, 2t..) (g, 2t+8..) (g+8, 2t+8..)   each word two neighbouring columns
///   b: (2t.., g) (2t+8.., g)                             each word two neighbouring rows
/// (PTX ISA: Matrix Fragments for mma.m16n8k16)
DEVICE void mma(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, bf16) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
      "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

DEVICE void mma(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, fp16) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 "
      "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

/// c [16, 8] += a [16, 8] b [8, 8] in tf32:  a: (g, t) (g+8, t) (g, t+4) (g+8, t+4);  b: (t, g)
/// (t+4, g). (PTX ISA: Matrix Fragments for mma.m16n8k8)
DEVICE void mma(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, float) {
  asm("mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 "
      "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

/// The nearest number with tf32's ten bits of mantissa; ties go away from zero. cvt.rna.tf32 does
/// the same and keeps NaN apart, in four instructions for these two: here a NaN of all ones is 0.
DEVICE uint32_t to_tf32(float x) { return (__float_as_uint(x) + 0x1000) & ~0x1fffu; }

/// The same for every x. (PTX ISA: cvt, .rna and .tf32)
DEVICE uint32_t to_tf32_or_nan(float x) {
  uint32_t y;
  asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(y) : "f"(x));
  return y;
}

/// 2^x to about two ulp; results below the normal range are 0. (PTX ISA: ex2.approx.ftz.f32)
DEVICE float exp2_approx(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

/// Two neighbouring elements in one word, the first in the low half.
DEVICE uint32_t pack(float first, float second, bf16) {
  const __nv_bfloat162 pair = __floats2bfloat162_rn(first, second);
  return reinterpret_cast<const uint32_t&>(pair);
}

DEVICE uint32_t pack(float first, float second, fp16) {
  const __half2 pair = __floats2half2_rn(first, second);
  return reinterpret_cast<const uint32_t&>(pair);
}

/// The two of such a word.
DEVICE float2 unpack(uint32_t raw, bf16) {
  return __bfloat1622float2(reinterpret_cast<const __nv_bfloat162&>(raw));
}

DEVICE float2 unpack(uint32_t raw, fp16) {
  return __half22float2(reinterpret_cast<const __half2&>(raw));
}
