#include "shared.h"

#include <algorithm>
#include <cstring>

namespace ptxemu {

SharedMemory::SharedMemory(uint64_t size, int granule) : size_(size), granule_(granule), shift_(0) {
  while (1 << shift_ < granule) ++shift_;
  const uint64_t granules = (size >> shift_) + 1;
  bytes_.assign(size + 16, 0xff);  // NaN in every floating-point format
  writer_.resize(granules);
  reader_.resize(granules);
  other_reader_.resize(granules);
  writer_instruction_.assign(granules, -1);
  co_writers_.resize(granules);
  pending_.resize(granules);
  defined_.resize(granules);
  atomic_.resize(granules);
}

void SharedMemory::forget() {
  std::fill(writer_.begin(), writer_.end(), 0);
  std::fill(reader_.begin(), reader_.end(), 0);
  std::fill(other_reader_.begin(), other_reader_.end(), 0);
  strong_reader_.clear();
}

void SharedMemory::read_hazard(const Access& access, uint64_t g, Stamp writer,
                               HazardInfo& found) const {
  if (found.hazard != Hazard::None) return;
  if (access.atomic && atomic_[g]) return;
  if (co_writers_[g] >> (warp_of(access.self) % 32) & 1) return;
  found = {Hazard::ReadAfterWrite, writer, writer_instruction_[g],
           static_cast<uint32_t>(g << shift_)};
}

void SharedMemory::write_hazard(const Access& access, uint64_t g, HazardInfo& found) const {
  if (found.hazard != Hazard::None) return;
  const auto at = static_cast<uint32_t>(g << shift_);
  if (pending_[g]) {
    found = {Hazard::Pending, writer_[g], writer_instruction_[g], at};
  } else if (!(access.atomic && atomic_[g]) && !ordered(access, writer_[g])) {
    found = {Hazard::WriteAfterWrite, writer_[g], writer_instruction_[g], at};
  } else if (!ordered(access, reader_[g])) {
    found = {Hazard::WriteAfterRead, reader_[g], -1, at};
  } else if (!ordered(access, other_reader_[g])) {
    found = {Hazard::WriteAfterRead, other_reader_[g], -1, at};
  } else if (!access.atomic && !strong_reader_.empty()) {
    const auto reader = strong_reader_.find(g);
    if (reader != strong_reader_.end() && !ordered(access, reader->second))
      found = {Hazard::WriteAfterRead, reader->second, -1, at};
  }
}

HazardInfo SharedMemory::write(const Access& access, uint64_t at, uint64_t size,
                               const void* value) {
  HazardInfo found;
  const auto* source = static_cast<const uint8_t*>(value);
  for (uint64_t g = at >> shift_, end = (at + size - 1) >> shift_; g <= end; ++g) {
    const uint64_t first = std::max(at, g << shift_), last = std::min(at + size, (g + 1) << shift_);
    const bool same = defined_[g] && !pending_[g] &&
                      std::memcmp(bytes_.data() + first, source + (first - at), last - first) == 0;
    if (same && !ordered(access, writer_[g])) {
      co_writers_[g] |= 1u << (warp_of(access.self) % 32) | 1u << (warp_of(writer_[g]) % 32);
    } else {
      if (!same) write_hazard(access, g, found);
      co_writers_[g] = 0;
    }
    writer_[g] = access.self;
    writer_instruction_[g] = access.instruction;
    atomic_[g] = access.atomic;
    defined_[g] = 1;
  }
  std::memcpy(bytes_.data() + at, value, size);
  return found;
}

HazardInfo SharedMemory::begin_async_write(const Access& issuer, uint64_t at, uint64_t size) {
  HazardInfo found;
  for (uint64_t g = at >> shift_, end = (at + size - 1) >> shift_; g <= end; ++g) {
    write_hazard(issuer, g, found);
    if (!pending_[g]) ++pending_total_;
    pending_[g] = 1;
    writer_instruction_[g] = issuer.instruction;
  }
  return found;
}

void SharedMemory::end_async_write(uint64_t at, uint64_t size, const void* value, Stamp writer,
                                   int instruction) {
  for (uint64_t g = at >> shift_, end = (at + size - 1) >> shift_; g <= end; ++g) {
    if (pending_[g]) --pending_total_;
    pending_[g] = 0;
    writer_[g] = writer;
    writer_instruction_[g] = instruction;
    co_writers_[g] = 0;
    atomic_[g] = 0;
    defined_[g] = 1;
  }
  std::memcpy(bytes_.data() + at, value, size);
}

HazardInfo SharedMemory::begin_async_read(const Access& access, uint64_t at, uint64_t size) {
  Access unfinished = access;
  HazardInfo found = read(unfinished, at, size);
  const Stamp open = stamp(kMaxClock, warp_of(access.self), lane_of(access.self));
  for (uint64_t g = at >> shift_, end = (at + size - 1) >> shift_; g <= end; ++g) reader_[g] = open;
  return found;
}

void SharedMemory::end_async_read(uint64_t at, uint64_t size, Stamp reader) {
  const auto close = [&](Stamp& slot) {
    if (clock_of(slot) == kMaxClock && warp_of(slot) == warp_of(reader)) slot = reader;
  };
  for (uint64_t g = at >> shift_, end = (at + size - 1) >> shift_; g <= end; ++g) {
    close(reader_[g]);
    close(other_reader_[g]);
  }
}

}  // namespace ptxemu
