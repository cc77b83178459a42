// Fresh memory costs a page fault for every 4 KiB that is first written: four times the writing
// itself. With pages of 2 MiB that is gone.
#pragma once
#include <cstdint>
#if defined(__linux__)
#include <sys/mman.h>
#include <unistd.h>
#endif

namespace pyfuse {

// Advice about memory that will be written from end to end. Less than 8 MiB is left alone: malloc
// mostly gives such a block memory that was in use before.
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
