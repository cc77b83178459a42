// Helps an opcode's decode function to turn a statement into an instruction: it hands out modifiers
// and operands, and whatever is not asked for is refused.
#pragma once

#include <algorithm>
#include <initializer_list>
#include <set>
#include <string>
#include <vector>

#include "program.h"

namespace ptxemu {

/// Gives constants and special registers their rows in a function's frame.
class Rows {
 public:
  explicit Rows(Function& function);
  Operand reg(int index) const { return function_.register_places[index]; }
  Operand constant(uint64_t bits, int bytes);
  Operand predicate(bool value);
  Operand special(SpecialKind kind, int bytes);
  Operand local_address(uint64_t offset, int bytes);
  Operand scratch(int bytes);  // for results that nobody wants

 private:
  Operand add(int bytes_per_lane);
  uint8_t* bytes(Operand o) {
    return function_.constants.data() + (o.at - function_.register_bytes);
  }

  Function& function_;
  std::map<std::pair<uint64_t, int>, Operand> constants_;
  std::map<std::pair<SpecialKind, int>, Operand> specials_;
  std::map<std::pair<uint64_t, int>, Operand> locals_;
};

class Decoder {
 public:
  Decoder(Module& module, Function& function, const FunctionAst& ast, Rows& rows,
          const Statement& statement, Inst& inst)
      : inst(inst),
        module(module),
        function(function),
        ast(ast),
        statement_(statement),
        rows_(rows) {}

  Inst& inst;
  Module& module;
  Function& function;
  const FunctionAst& ast;

  // ---- modifiers
  void set_modifiers(std::vector<std::string> words);
  bool take(const char* modifier);
  /// The index of the one that is there; refuses if none is and `otherwise` is negative.
  int take_one(std::initializer_list<const char*> modifiers, int otherwise = -1);
  /// The next type modifier, in the order in which they stand.
  Type take_type();
  /// The same without taking it; None if there is none.
  Type peek_type() const;
  /// The first modifier that is left; refuses if there is none.
  std::string take_next();
  bool has_more() const { return !modifiers_.empty(); }
  void ignore(std::initializer_list<const char*> modifiers);  // hints without meaning here
  void finish();                                              // refuses what is left

  // ---- operands
  size_t args() const { return statement_.args.size(); }
  void need_args(size_t least, size_t most);
  const Arg& arg(size_t n) const;
  /// A destination or source of exactly this type's width.
  Operand dst(const Arg& a, Type type);
  Operand src(const Arg& a, Type type);
  /// Of any register at least as wide; gives its width in bytes.
  Operand wide_dst(const Arg& a, Type type, int& bytes);
  Operand wide_src(const Arg& a, Type type, int& bytes);
  Operand predicate(const Arg& a, bool& negated);
  Operand plain_predicate(const Arg& a);
  Operand constant(uint64_t bits, int bytes) { return rows_.constant(bits, bytes); }
  Operand scratch(int bytes) { return rows_.scratch(bytes); }
  /// [register + offset], [symbol + offset]: into inst.imm and address_is_64; gives the base.
  Operand address(const Arg& a);
  Operand address(const Arg& base, int64_t offset);
  /// The elements of {a, b}, or the one argument that stands for itself.
  static std::vector<Arg> elements(const Arg& a);
  uint64_t integer(const Arg& a) const;
  int label(const Arg& a) const;
  int label(const std::string& name, int scope) const;

  /// Shared memory is watched in units of the smallest access that the module makes to it.
  void touches_shared(int bytes) { module.shared_granule = std::min(module.shared_granule, bytes); }
  /// Global memory in units of the smallest write.
  void writes_global(int bytes) { module.global_granule = std::min(module.global_granule, bytes); }

  const std::string& name() const { return statement_.opcode[0]; }
  const std::vector<std::string>& words() const { return statement_.opcode; }
  std::string text() const;
  [[noreturn]] void refuse(const std::string& why) const;
  int line() const { return statement_.line; }

  template <class D>
  D& detail() {
    auto made = std::make_unique<D>();
    D& reference = *made;
    inst.detail = std::move(made);
    return reference;
  }

 private:
  Operand operand(const Arg& a, Type type, bool is_destination, int* bytes);
  Operand special(const Arg& a, Type type, int* bytes);
  Operand symbol(const Arg& a, Type type);
  bool is_parameter(const Arg& a) const;
  Operand parameter_in_local(const Arg& a, Type type);

  const Statement& statement_;
  Rows& rows_;
  std::vector<std::string> modifiers_;
};

struct Opcode {
  const char* name;  // with the words that belong to it: "add", "mma.sync", "cp.async.bulk"
  void (*decode)(Decoder&);
};

/// The table of opcodes, one part a file of ops/.
extern const std::vector<Opcode> kIntegerOpcodes, kBitOpcodes, kFloatOpcodes, kCompareOpcodes,
    kConvertOpcodes, kMoveOpcodes, kMemoryOpcodes, kAtomicOpcodes, kWarpOpcodes, kBarrierOpcodes,
    kAsyncOpcodes, kMatrixOpcodes, kWgmmaOpcodes, kMbarrierOpcodes, kBulkOpcodes, kTensorMapOpcodes,
    kControlOpcodes, kSystemOpcodes;
const Opcode* find_opcode(const std::vector<std::string>& words, size_t& used);
std::vector<std::string> opcode_names();

}  // namespace ptxemu
