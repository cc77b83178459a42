// Splitting loops over threads. The number of threads is an argument of every call: there is no
// static state that a fork or a second calling thread could break.
#pragma once
#include <stdint.h>
#if defined(_OPENMP)
#include <omp.h>
#endif

namespace pyfuse::cpu::PYFUSE_ISA {

// body(i, thread) for i in [0, n), handed out in order to whichever thread is free; 0 <= thread <
// threads. Which thread runs an i must not matter to its result.
template <class Body>
inline void parallel_for(int64_t n, [[maybe_unused]] int threads, const Body& body) {
#if defined(_OPENMP)
  if (threads > 1 && n > 1) {
#pragma omp parallel for schedule(dynamic, 1) num_threads(threads)
    for (int64_t i = 0; i < n; ++i) body(i, omp_get_thread_num());
    return;
  }
#endif
  for (int64_t i = 0; i < n; ++i) body(i, 0);
}

// A kernel of many short loops starts its threads once: `body` runs on each of them, and `share`
// within it divides a loop among them; nobody goes on before all of it is done.
template <class Body>
inline void as_team([[maybe_unused]] int threads, const Body& body) {
#pragma omp parallel num_threads(threads) if (threads > 1)
  body();
}
template <class Body>
inline void share(int64_t n, const Body& body) {
#if defined(_OPENMP)
#pragma omp for schedule(dynamic, 1)
  for (int64_t i = 0; i < n; ++i) body(i, omp_get_thread_num());
#else
  for (int64_t i = 0; i < n; ++i) body(i, 0);
#endif
}

}  // namespace pyfuse::cpu::PYFUSE_ISA
