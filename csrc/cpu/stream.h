// Stores that go past the caches: a result larger than these is written once and read from memory
// later, so fetching its lines before overwriting them would be a third of a copy's traffic.
#pragma once
#include "cpu/vec.h"

namespace pyfuse::cpu::PYFUSE_ISA {

// p is aligned to what a store writes: a vector, or half of one for the half types.
PYFUSE_INLINE void stream(float* p, vfloat v) {
#if defined(__AVX512F__)
  _mm512_stream_ps(p, (__m512)v);
#elif defined(__AVX2__)
  _mm256_stream_ps(p, (__m256)v);
#elif defined(__x86_64__)
  _mm_stream_ps(p, (__m128)v);
#else
  store(p, v);
#endif
}
PYFUSE_INLINE void stream(double* p, vdouble v) {
#if defined(__AVX512F__)
  _mm512_stream_pd(p, (__m512d)v);
#elif defined(__AVX2__)
  _mm256_stream_pd(p, (__m256d)v);
#elif defined(__x86_64__)
  _mm_stream_pd(p, (__m128d)v);
#else
  store(p, v);
#endif
}
template <class Half>
PYFUSE_INLINE void stream(Half* p, vfloat v) {
  alignas(PYFUSE_VECTOR_BYTES / 2) Half lane[width<Half>];
  store(lane, v);  // stays in a register
#if defined(__AVX512F__)
  _mm256_stream_si256(reinterpret_cast<__m256i*>(p), *reinterpret_cast<const __m256i*>(lane));
#elif defined(__AVX2__)
  _mm_stream_si128(reinterpret_cast<__m128i*>(p), *reinterpret_cast<const __m128i*>(lane));
#else
  memcpy(p, lane, sizeof lane);  // no streaming store is this narrow
#endif
}

// Makes the streamed stores before it visible to other threads before any store after it.
PYFUSE_INLINE void end_stream() {
#if defined(__x86_64__)
  _mm_sfence();
#endif
}

}  // namespace pyfuse::cpu::PYFUSE_ISA
