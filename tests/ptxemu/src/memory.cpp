#include "memory.h"

#include <sys/mman.h>

#include <cstdio>
#include <cstring>
#include <new>

namespace ptxemu {
namespace {

// Pages come into being when they are touched: the shadow of a huge tensor costs what is used of
// it.
void* map_pages(uint64_t size) {
  void* pages = mmap(nullptr, size, PROT_READ | PROT_WRITE,
                     MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (pages == MAP_FAILED) throw std::bad_alloc();
  return pages;
}

}  // namespace

Memory::~Memory() {
  for (const auto& [pages, size] : maps_) munmap(pages, size);
}

uint64_t Memory::add(void* host, uint64_t size, const std::string& name) {
  return add_at(host, size, name, reinterpret_cast<uint64_t>(host) & 4095);
}

uint64_t Memory::add_variable(void* host, uint64_t size, const std::string& name) {
  return add_at(host, size, name, 0);
}

uint64_t Memory::add_at(void* host, uint64_t size, const std::string& name, uint64_t offset) {
  Allocation a;
  a.host = static_cast<uint8_t*>(host);
  a.base = variable_address(allocations_.size()) + offset;
  a.size = size;
  a.name = name;
  allocations_.push_back(a);
  return a.base;
}

uint64_t Memory::allocate(uint64_t size, uint64_t align, const std::string& name, bool undefined) {
  const uint64_t mapped = size + align;
  auto* pages = static_cast<uint8_t*>(map_pages(mapped));
  maps_.emplace_back(pages, mapped);
  (void)align;  // pages are aligned to 4096
  const uint64_t address = add(pages, size, name);
  if (undefined) {
    std::memset(pages, 0xff, size);  // NaN in every floating-point format
    mark(address, size, kUndefined);
  }
  return address;
}

void Memory::mark(uint64_t address, uint64_t size, uint8_t flags) {
  Allocation* a = find(address);
  if (a == nullptr || address < a->base || address - a->base + size > a->size)
    throw std::out_of_range("mark: " + describe(address, size));
  if (size == 0 || (a->shadow == nullptr && flags == 0)) return;
  if (a->shadow == nullptr) {
    a->shadow = static_cast<uint8_t*>(map_pages(a->size));
    maps_.emplace_back(a->shadow, a->size);
  }
  std::memset(a->shadow + (address - a->base), flags, size);
}

void Memory::add_tags(Allocation& allocation, int shift) {
  const uint64_t bytes = ((allocation.size >> shift) + 2) * sizeof(WriteTag);
  allocation.tags = static_cast<WriteTag*>(map_pages(bytes));
  maps_.emplace_back(allocation.tags, bytes);
}

std::string Memory::describe(uint64_t address, uint64_t size) const {
  const auto at = static_cast<unsigned long long>(address),
             bytes = static_cast<unsigned long long>(size);
  char text[256];
  if (address < 4096) {
    std::snprintf(text, sizeof text, "%llu bytes at address 0x%llx: a null pointer", bytes, at);
    return text;
  }
  // The nearest allocation says most: an index that is off by little, or by 2^32, starts from
  // there.
  const Allocation* near = nullptr;
  int64_t distance = 0;
  for (const Allocation& a : allocations_) {
    const int64_t before = static_cast<int64_t>(a.base - address);
    const int64_t past = static_cast<int64_t>(address + size - (a.base + a.size));
    const int64_t d = before > 0 ? -before : past > 0 ? past : 0;
    if (near == nullptr || std::abs(d) < std::abs(distance)) near = &a, distance = d;
  }
  constexpr int64_t kFar = int64_t{1} << (kAllocationShift - 1);
  const auto by = static_cast<long long>(std::abs(distance));
  if (near == nullptr || by > kFar) {
    std::snprintf(text, sizeof text, "%llu bytes at address 0x%llx, which is in no allocation",
                  bytes, at);
  } else if (distance == 0) {
    std::snprintf(text, sizeof text, "byte %lld of %s, which no argument gave access to",
                  static_cast<long long>(address - near->base), near->name.c_str());
  } else {
    std::snprintf(text, sizeof text, "%llu bytes that %s %lld bytes %s of %s (%llu bytes)", bytes,
                  distance < 0 ? "begin" : "end", by,
                  distance < 0 ? "before the start" : "past the end", near->name.c_str(),
                  static_cast<unsigned long long>(near->size));
  }
  return text;
}

}  // namespace ptxemu
