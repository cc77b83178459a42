// A warp's own way from the cache into shared memory: 16 keys at a time and their values, several
// such tiles under way while earlier ones are used.
#pragma once

#include "cache.cuh"
#include "tile.cuh"

namespace pyfuse::cuda {

/// Of the keys [low, high) the warp takes 16 of every 16 WARPS. Lane i knows where key i of a step
/// lies, lane 16 + i where its value lies.
template <typename T, int D>
struct CacheRing {
  static constexpr DecodeRing SIZES{sizeof(T), D};
  static constexpr int BYTES = SIZES.warp_bytes(), SLOT = SIZES.slot, SLOTS = SIZES.slots;
  static constexpr int STRIDE = 16 * SIZES.warps;  // keys from step to step
  using Keys = Tile<T, D, 16>;
  using Copy = Copier<Keys, 32>;
  static_assert(Keys::BYTES == SLOT && (Copy::LOADED & (Copy::LOADED - 1)) == 0);

  const AttentionDecode& p;
  const Cache<T> cache;
  char* const start;
  const uint32_t address, own_chunk;  // own_chunk: the first of what this lane copies
  const int lane, low, high;
  int next;                    // the first key of the step whose keys are copied next
  int64_t page = 0;            // of this lane's key there
  const char* from = nullptr;  // this lane's row in the step whose keys were copied last
  bool copying = false;        // whether there were such keys
  int filled = BYTES - 2 * SLOT, keys = 0;  // the slots of the keys copied last and of those in use

  DEVICE CacheRing(const AttentionDecode& p, char* start, int warp, int b, int hk, int length,
                   int low, int high)
      : p(p),
        cache(p, b, hk, length, threadIdx.x % 32 < 16),
        start(start),
        address(shared_address(start)),
        own_chunk(address + Keys::at(Copy::row(), Copy::chunk())),
        lane(threadIdx.x % 32),
        low(low),
        high(high),
        next(low / STRIDE * STRIDE + 16 * warp) {
    look_up();
  }

  static DEVICE int after(int slot) { return slot + 2 * SLOT == BYTES ? 0 : slot + 2 * SLOT; }
  DEVICE int values() const { return keys + SLOT; }
  DEVICE void advance() { keys = after(keys); }

  /// Start copying the keys of the next step.
  DEVICE void copy_keys() {
    filled = after(filled);
    copying = next < high;
    if (copying) {
      const int n = next + lane % 16;
      from = static_cast<const char*>(p.q);  // of what is not there nothing is read
      if (there(n))
        from = n >= cache.shift ? cache.given + (n - cache.shift) * cache.given_bytes
                                : cache.row(n, page);
      copy(filled, next, 0, p.d);
      next += STRIDE;
      look_up();
    }
    cp_async_commit();
  }

  /// The values of the keys that were copied last.
  DEVICE void copy_values() {
    if (copying) copy(filled + SLOT, next - STRIDE, 16, p.dv);
    cp_async_commit();
  }

  /// Which of the values in use are not finite, bit i for row i: a weight of 0 would not stop them,
  /// so they become zeros.
  DEVICE uint32_t clear_spoilt_values() const {
    char* const tile = start + values();
    const int row = lane % 16;
    bool bad = false;
    for (int c = lane / 16; c < Keys::ROW_CHUNKS; c += 2)
      bad |= !all_finite(*reinterpret_cast<const uint4*>(tile + Keys::at(row, c)), T());
    uint32_t spoilt = __ballot_sync(~0u, bad);
    spoilt = (spoilt | spoilt >> 16) & 0xffffu;
    if (spoilt == 0) return 0;
    for (int c = lane / 16; c < Keys::ROW_CHUNKS; c += 2) {
      if (spoilt >> row & 1) *reinterpret_cast<uint4*>(tile + Keys::at(row, c)) = uint4{};
    }
    __syncwarp();
    return spoilt;
  }

 private:
  DEVICE bool there(int n) const { return n >= low && n < high; }

  /// Ask the table for the page of this lane's key of the next step, long before it is needed.
  DEVICE void look_up() {
    const int n = next + lane % 16;
    if (there(n) && n < cache.shift) page = cache.page_of(n);
  }

  DEVICE const char* other_lane(int lane) const {
    return reinterpret_cast<const char*>(
        __shfl_sync(~0u, reinterpret_cast<unsigned long long>(from), lane));
  }

  /// Copy the rows of the keys from n on, whose places the lanes from `source` on know, into a
  /// slot: zeros for those that are not there, and beyond the row's elements.
  DEVICE void copy(int slot, int n, int source, int elements) const {
    if (!p.aligned) return copy_elements(start + slot, n, source, elements);
    const int bytes = elements * int(sizeof(T));
#pragma unroll
    for (int i = 0; i < 16; i += Copy::LOADED) {
      const int row = i + Copy::row();
      const char* const x = other_lane(source + row) + Copy::chunk() * 16;
      // at(row, chunk), since i and row() have no bit in common
      const uint32_t to = ((own_chunk + slot) ^ Keys::at(i, 0) % Keys::ROW) + i * Keys::ROW;
#pragma unroll
      for (int c = 0; c < Keys::ROW_CHUNKS; c += Copy::ACROSS)
        cp_async_or_zero(to + c / Keys::CHUNKS * Keys::PANEL, x + c * 16,
                         there(n + row) && (c + Copy::chunk()) * 16 < bytes);
    }
  }

  /// The same, done when it returns, for rows that lie anywhere.
  DEVICE void copy_elements(char* tile, int n, int source, int elements) const {
#pragma unroll 1
    for (int row = 0; row < 16; ++row) {
      const auto* const x = reinterpret_cast<const T*>(other_lane(source + row));
#pragma unroll 1
      for (int d = lane; d < D; d += 32) {
        char* const to = tile + Keys::at(row, d / Keys::PER_CHUNK);
        reinterpret_cast<T*>(to)[d % Keys::PER_CHUNK] =
            there(n + row) && d < elements ? x[d] : T(0.0f);
      }
    }
  }
};

}  // namespace pyfuse::cuda
