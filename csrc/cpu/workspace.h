// Scratch memory of one call, in cache-line-aligned pieces. Taken before any parallel region, since
// an exception must not leave one.
#pragma once
#include <stdint.h>
#include <stdlib.h>

#include "cpu/isa.h"

namespace pyfuse::cpu::PYFUSE_ISA {

class Workspace {
 public:
  explicit Workspace(int64_t bytes)
      : memory_(aligned_alloc(64, static_cast<size_t>(round_up(bytes > 0 ? bytes : 1)))) {
    if (memory_ == nullptr) out_of_memory(bytes);
  }
  ~Workspace() { free(memory_); }
  Workspace(const Workspace&) = delete;
  Workspace& operator=(const Workspace&) = delete;

  char* data() { return static_cast<char*>(memory_); }
  static int64_t round_up(int64_t bytes) { return (bytes + 63) / 64 * 64; }

 private:
  void* memory_;
};

// Hands out the pieces of a workspace in turn; with a null base it only adds up their sizes.
class Carver {
 public:
  explicit Carver(char* base) : base_(base) {}
  template <class T>
  T* take(int64_t count) {
    T* piece = reinterpret_cast<T*>(base_ + used_);
    used_ += Workspace::round_up(count * static_cast<int64_t>(sizeof(T)));
    return piece;
  }
  int64_t used() const { return used_; }

 private:
  char* base_;
  int64_t used_ = 0;
};

}  // namespace pyfuse::cpu::PYFUSE_ISA
