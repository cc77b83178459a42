// Attention of few queries over a cache; see attention_decode.h.
#include "cpu/attention_decode.h"

#include "cpu/parallel.h"

namespace pyfuse::cpu::PYFUSE_ISA {
namespace {

template <class T>
void decode(const DecodeParams& p) {
  const int64_t step = Decode<T>::most_queries(p);
  for (int64_t m = 0; m < p.queries; m += step) {
    const Decode<T> pass(p, m, p.queries - m < step ? p.queries - m : step);
    const int count = pass.threads();
    Workspace memory(pass.size(count));
    const auto shared = pass.set_up(memory.data(), count);
    parallel_for(pass.tasks(), count,
                 [&](int64_t i, int thread) { pass.run_task(shared, i, thread); });
  }
}

}  // namespace

void attention_decode(const DecodeParams& p) {
  switch (p.dtype) {
    case DType::f32:
      return decode<float>(p);
    case DType::bf16:
      return decode<bf16>(p);
    case DType::f16:
      return decode<f16>(p);
    case DType::f64:
      return decode<double>(p);
  }
  bad_switch_value("attention_decode: dtype", static_cast<int>(p.dtype));
}

}  // namespace pyfuse::cpu::PYFUSE_ISA
