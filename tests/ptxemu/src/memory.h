// The memory of the device: separate allocations in one 64-bit address space.
//
// Allocation k owns the addresses from (k + 1) << 40 on: an index that runs off its end, even by 4
// GiB, meets nothing, and finding an address takes one shift. Below 1 << 40 lie the generic windows
// of the other spaces.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "types.h"

namespace ptxemu {

constexpr int kAllocationShift = 40;
constexpr uint64_t kWindow =
    1ull << 32;  // generic addresses of shared, local, param and constant memory
constexpr uint64_t kSharedWindow = 1 * kWindow, kLocalWindow = 2 * kWindow,
                   kParamWindow = 3 * kWindow, kConstWindow = 4 * kWindow;
/// In a shared address, the rank of the block in its cluster, plus one; 0 is the block itself.
constexpr int kClusterShift = 24;

enum : uint8_t { kUndefined = 1, kHole = 2 };  // bits of a shadow byte; 0 is ordinary memory

/// Who wrote a unit of global memory last in this launch.
struct WriteTag {
  uint32_t cluster = 0;  // its number; 0: nobody
  uint32_t stamp = 0;
  int instruction = -1;
  uint32_t era : 29, atomic : 1;
  uint32_t same_within : 1,
      same_across : 1;  // others wrote the same value, unordered: of the cluster, or of others
};

struct Allocation {
  uint8_t* host = nullptr;
  uint64_t base = 0, size = 0;
  std::string name;
  uint8_t* shadow = nullptr;  // one byte for each byte, null: all ordinary
  WriteTag* tags = nullptr;   // by unit, from that of `base` on; null: not written in this launch
};

class Memory {
 public:
  Memory() = default;
  Memory(const Memory&) = delete;
  Memory& operator=(const Memory&) = delete;
  ~Memory();

  /// Makes host memory addressable; it is used in place. Returns its device address, which is
  /// congruent to the host's modulo 4096, so that alignment means the same.
  uint64_t add(void* host, uint64_t size, const std::string& name);
  /// The same at the start of the allocation's addresses, which are known beforehand: of a module's
  /// variables.
  uint64_t add_variable(void* host, uint64_t size, const std::string& name);
  static uint64_t variable_address(uint64_t index) { return (index + 1) << kAllocationShift; }
  /// Memory of the device's own, undefined or zero.
  uint64_t allocate(uint64_t size, uint64_t align, const std::string& name, bool undefined);
  /// Marks bytes with kUndefined or kHole, or with 0 as ordinary again.
  void mark(uint64_t address, uint64_t size, uint8_t flags);

  /// Makes room for the tags of an allocation, in units of 1 << shift bytes.
  void add_tags(Allocation& allocation, int shift);

  /// The allocation that holds the address's range; null outside of all.
  Allocation* find(uint64_t address) {
    const uint64_t k = address >> kAllocationShift;
    return k == 0 || k > allocations_.size() ? nullptr : &allocations_[k - 1];
  }
  /// Why an access is not allowed: "4 bytes that end 8 bytes past the end of q (4096 bytes)".
  std::string describe(uint64_t address, uint64_t size) const;

 private:
  uint64_t add_at(void* host, uint64_t size, const std::string& name, uint64_t offset);

  std::vector<Allocation> allocations_;
  std::vector<std::pair<void*, uint64_t>> maps_;  // to unmap
};

}  // namespace ptxemu
