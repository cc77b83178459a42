// The instruction sets that this binary carries, and the one that runs.
#pragma once
#include <pyfuse/params.h>

#include <string>
#include <vector>

namespace pyfuse::cpu {

constexpr int packed_linear_panel = 64;  // outputs of a panel of a packed weight, on every machine

// The kernels of one instruction set. Every source in csrc/cpu that CMake compiles per instruction
// set defines one of these functions in its namespace pyfuse::cpu::<isa>.
struct Kernels {
  void (*attention)(const AttentionParams&);
  void (*attention_decode)(const DecodeParams&);
  void (*attention_gradient)(const AttentionGradientParams&);
  void (*attention_score_gradient)(const AttentionGradientParams&);
  void (*decode_step)(const StepParams&);
  void (*dropout)(const DropoutParams&);
  void (*embed)(const EmbedParams&);
  void (*embed_gradient)(const EmbedGradientParams&);
  void (*linear)(const LinearParams* layers, int count);  // of one dtype, side by side
  void (*linear_packed)(const LinearParams&);             // w as pack_linear left it
  void (*pack_linear)(const LinearParams&);               // from w [N, K] to y [N/64][K][64]
  void (*norm)(const NormParams&);
  void (*norm_gradient)(const NormGradientParams&);
  void (*rope)(const RopeParams&);
  void (*row_sums)(const RowSumsParams&);
  void (*sample)(const SampleParams&);
};

const Kernels& kernels();                   // of the chosen instruction set
std::string isa();                          // its name
void select_isa(const std::string& name);   // throws std::invalid_argument if this machine lacks it
std::vector<std::string> available_isas();  // built in and runnable here, best first

[[noreturn]] void bad_switch_value(const char* what, int value);  // the default of every switch
[[noreturn]] void out_of_memory(int64_t bytes);

}  // namespace pyfuse::cpu
