// LayerNorm and RMSNorm, backward. With n = (z - mean) · rstd and g = dy · weight
//   dz' = rstd · (g - mean(g) - n · mean(g · n)) + dz      (RMSNorm: without mean and mean(g))
//   dweight = sum over the rows of dy · n,  dbias = sum of dy
// Nothing but z is kept from the forward: the statistics of a row that is read anyway cost less
// than their way through memory. The gradients of the parameters are summed over blocks of rows
// whose size depends on the tensors' sizes alone, and these sums pairwise, so that the result does
// not depend on the number of threads.
#include "cpu/norm_gradient_rows.h"
#include "cpu/parallel.h"
#include "cpu/workspace.h"

namespace pyfuse::cpu::PYFUSE_ISA {
namespace {

using namespace norm_gradients;

constexpr int64_t max_blocks = 128;     // of rows: enough for any number of threads,
constexpr int64_t min_block_rows = 16;  // each so large that its sums are small beside it
constexpr int64_t leaf_rows = 64;       // are added up one after the other
constexpr int64_t min_chunk = 256;      // columns of a task that adds the blocks up

// to += from, for d elements.
template <class C>
PYFUSE_INLINE void add_to(const C* from, int64_t d, C* to) {
  for_vectors<C, 1>(d, [&](const auto& at, int) { at.put(to, at(to) + at(from)); });
}

// The rows [begin, end), at most leaf_rows; they are added to scratch's sums.
template <bool rms, class C>
void add_leaf(const NormGradientParams& p, const Call<C>& call, const Scratch<C>& scratch,
              int64_t begin, int64_t end) {
  if (call.parameters)
    for (int64_t i = 0; i < p.d; ++i) scratch.dweight[i] = scratch.dbias[i] = C(0);
  int64_t row = begin;
  if (!p.row_by_row)
    for (; row + together <= end; row += together)
      backward_together<rms, together>(p, call, scratch, row);
  for (; row < end; ++row) backward_together<rms, 1>(p, call, scratch, row);
}

// The rows [begin, end) of one block; their sums go to dweight and dbias.
template <bool rms, class C>
void add_block(const NormGradientParams& p, const Call<C>& call, Scratch<C>& scratch, int64_t begin,
               int64_t end, C* dweight, C* dbias) {
  C *const leaf_dweight = scratch.dweight, *const leaf_dbias = scratch.dbias;
  scratch.dweight = dweight, scratch.dbias = dbias;  // of the first leaf at once
  for (int64_t leaf = begin; leaf < end || leaf == begin; leaf += leaf_rows) {
    add_leaf<rms>(p, call, scratch, leaf, leaf + leaf_rows < end ? leaf + leaf_rows : end);
    if (leaf > begin && call.parameters) {
      add_to(scratch.dweight, p.d, dweight);
      add_to(scratch.dbias, p.d, dbias);
    }
    scratch.dweight = leaf_dweight, scratch.dbias = leaf_dbias;
  }
  if (p.stream) end_stream();
}

// result = the sum of the blocks' rows, stride apart, in columns [first, first + count).
template <class C>
void add_blocks(C* sums, int64_t blocks, int64_t stride, int64_t first, int64_t count, DType dtype,
                void* result) {
  if (result == nullptr) return;
  sums += first;
  for (int64_t step = 1; step < blocks; step *= 2)
    for (int64_t b = 0; b + step < blocks; b += 2 * step)
      add_to(sums + (b + step) * stride, count, sums + b * stride);
  with_type(dtype, [&](auto type) {
    auto* to = static_cast<decltype(type)*>(result) + first;
    for (int64_t i = 0; i < count; ++i) from_compute(sums[i], to[i]);
  });
}

template <bool rms, class C>
void backward(const NormGradientParams& p) {
  const int64_t bytes = sizeof(C), size = Workspace::round_up(p.d * bytes) / bytes;
  int64_t block = (p.rows + max_blocks - 1) / max_blocks;
  if (block < min_block_rows) block = min_block_rows;
  if (block < norm_block / p.d) block = norm_block / p.d;
  const int64_t blocks = p.rows > 0 ? (p.rows + block - 1) / block : 1;  // an empty sum is 0
  const bool parameters = p.dweight != nullptr || p.dbias != nullptr;
  const int64_t sums_rows = parameters ? 2 * blocks : 0;
  Workspace memory((1 + sums_rows + p.threads * Scratch<C>::rows) * size * bytes);
  C* const base = reinterpret_cast<C*>(memory.data());
  C* const dweight = base + size;  // of block 0; then dbias, and so on for the others
  const Call<C> call = call_of(p, base);
  parallel_for(blocks, p.threads, [&](int64_t b, int thread) {
    Scratch<C> scratch(base + (1 + sums_rows + thread * Scratch<C>::rows) * size, size);
    const int64_t end = (b + 1) * block < p.rows ? (b + 1) * block : p.rows;
    C* const sums = dweight + 2 * b * size;
    add_block<rms>(p, call, scratch, b * block, end, sums, sums + size);
  });
  if (!parameters) return;
  const int64_t chunk = norm_block / blocks > min_chunk ? norm_block / blocks : min_chunk;
  parallel_for((p.d + chunk - 1) / chunk, p.threads, [&](int64_t task, int) {
    const int64_t first = task * chunk, count = first + chunk < p.d ? chunk : p.d - first;
    add_blocks(dweight, blocks, 2 * size, first, count, p.weight_dtype, p.dweight);
    add_blocks(dweight + size, blocks, 2 * size, first, count, p.bias_dtype, p.dbias);
  });
}

}  // namespace

void norm_gradient(const NormGradientParams& p) {
  const bool rms = p.kind != NormKind::layer;
  if (p.dtype == DType::f64)
    rms ? backward<true, double>(p) : backward<false, double>(p);
  else
    rms ? backward<true, float>(p) : backward<false, float>(p);
}

}  // namespace pyfuse::cpu::PYFUSE_ISA
