// Picks the instruction set once. Compiled with baseline flags: it runs before anything is known.
#include "cpu/isa.h"

#include <atomic>
#include <cstdlib>
#include <stdexcept>

#define PYFUSE_DECLARE(ISA)                                      \
  namespace pyfuse::cpu::ISA {                                   \
  void attention(const AttentionParams&);                        \
  void attention_decode(const DecodeParams&);                    \
  void attention_gradient(const AttentionGradientParams&);       \
  void attention_score_gradient(const AttentionGradientParams&); \
  void decode_step(const StepParams&);                           \
  void dropout(const DropoutParams&);                            \
  void embed(const EmbedParams&);                                \
  void embed_gradient(const EmbedGradientParams&);               \
  void linear(const LinearParams*, int);                         \
  void linear_packed(const LinearParams&);                       \
  void pack_linear(const LinearParams&);                         \
  void norm(const NormParams&);                                  \
  void norm_gradient(const NormGradientParams&);                 \
  void rope(const RopeParams&);                                  \
  void row_sums(const RowSumsParams&);                           \
  void sample(const SampleParams&);                              \
  static const Kernels table = {attention,                       \
                                attention_decode,                \
                                attention_gradient,              \
                                attention_score_gradient,        \
                                decode_step,                     \
                                dropout,                         \
                                embed,                           \
                                embed_gradient,                  \
                                linear,                          \
                                linear_packed,                   \
                                pack_linear,                     \
                                norm,                            \
                                norm_gradient,                   \
                                rope,                            \
                                row_sums,                        \
                                sample};                         \
  }

// CMake's list of what this binary carries, best first: X(avx512) X(avx2) X(baseline).
#define X PYFUSE_DECLARE
PYFUSE_ISAS
#undef X

namespace pyfuse::cpu {
namespace {

struct Isa {
  const char* name;
  const Kernels* table;
  bool (*runs_here)();
};

[[maybe_unused]] bool has_baseline() { return true; }
#if defined(__x86_64__)
[[maybe_unused]] bool has_avx2() {
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
         __builtin_cpu_supports("f16c");
}
[[maybe_unused]] bool has_avx512() {
  return has_avx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
}
[[maybe_unused]] bool has_avx512_bf16() {
  return has_avx512() && __builtin_cpu_supports("avx512bf16");
}
#elif defined(__aarch64__)
[[maybe_unused]] bool has_neon() { return true; }
#endif

const Isa isas[] = {
#define X(ISA) {#ISA, &ISA::table, has_##ISA},
    PYFUSE_ISAS
#undef X
};

const Isa& find(const std::string& name) {
  std::string known;
  for (const Isa& isa : isas) {
    if (name == isa.name) {
      if (!isa.runs_here()) throw std::invalid_argument("PYFUSE_ISA: this CPU has no " + name);
      return isa;
    }
    known += known.empty() ? isa.name : std::string(", ") + isa.name;
  }
  throw std::invalid_argument("PYFUSE_ISA: got '" + name + "', needs one of " + known);
}

const Isa& best() {
  const char* forced = std::getenv("PYFUSE_ISA");
  if (forced != nullptr && *forced != '\0') return find(forced);
  for (const Isa& isa : isas)
    if (isa.runs_here()) return isa;
  throw std::runtime_error("pyfuse: no instruction set of this build runs on this CPU");
}

std::atomic<const Isa*> chosen{nullptr};  // set once, then only by select_isa

const Isa& current() {
  const Isa* isa = chosen.load(std::memory_order_acquire);
  if (isa == nullptr) {
    isa = &best();
    chosen.store(isa, std::memory_order_release);
  }
  return *isa;
}

}  // namespace

const Kernels& kernels() { return *current().table; }
std::string isa() { return current().name; }
void select_isa(const std::string& name) { chosen.store(&find(name), std::memory_order_release); }

std::vector<std::string> available_isas() {
  std::vector<std::string> names;
  for (const Isa& isa : isas)
    if (isa.runs_here()) names.emplace_back(isa.name);
  return names;
}

void bad_switch_value(const char* what, int value) {
  throw std::invalid_argument(std::string(what) + ": no case for " + std::to_string(value));
}

void out_of_memory(int64_t bytes) {
  throw std::runtime_error("pyfuse: no memory for a workspace of " + std::to_string(bytes) +
                           " bytes");
}

}  // namespace pyfuse::cpu
