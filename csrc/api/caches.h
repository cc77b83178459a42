// How large results are best written: past the caches, into pages of 2 MiB.
#pragma once
#include <pyfuse/params.h>

#include <cstdint>
#if defined(__linux__)
#include <sys/mman.h>
#include <unistd.h>
#endif

namespace pyfuse {

// What a call can count on of the last cache, which other work shares. The system is not asked:
// glibc's answer is the sum over the package, ten times what one core gets.
constexpr int64_t cache_bytes = int64_t{16} << 20;

// Whether rows of so many bytes can go past the caches: whole lines only.
inline bool takes_streams(const void* rows, int64_t row_bytes) {
  return row_bytes % 64 == 0 && reinterpret_cast<uintptr_t>(rows) % 64 == 0;
}

inline int64_t size_of(DType dtype) {
  return dtype == DType::f64 ? 8 : dtype == DType::f32 ? 4 : 2;
}

// Advice about memory that will be written from end to end: fresh memory costs a page fault for
// every 4 KiB that is first written, four times the writing itself; with pages of 2 MiB that is
// gone. Less than 8 MiB is left alone: malloc mostly gives such a block memory that was in use
// before.
inline void prefer_huge_pages([[maybe_unused]] void* memory, [[maybe_unused]] int64_t bytes) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  if (bytes < int64_t{8} << 20) return;
  const uintptr_t page = static_cast<uintptr_t>(sysconf(_SC_PAGESIZE));
  const uintptr_t begin = (reinterpret_cast<uintptr_t>(memory) + page - 1) / page * page;
  const uintptr_t end =
      (reinterpret_cast<uintptr_t>(memory) + static_cast<uintptr_t>(bytes)) / page * page;
  // A kernel without huge pages says no, and the memory is what it was.
  (void)madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
#endif
}

}  // namespace pyfuse
