// What the parser makes of PTX text: modules, functions and statements, registers already resolved
// by scope.
#pragma once

#include <map>
#include <string>
#include <vector>

#include "types.h"

namespace ptxemu {

/// One operand as written.
struct Arg {
  enum class Kind {
    Register,
    Special,
    Integer,
    Float32,
    Float64,
    Symbol,
    Vector,
    Address,
    Pair,
    Sink,
    List
  };
  Kind kind = Kind::Sink;
  int reg = -1;               // Register: index into FunctionAst::registers
  bool negated = false;       // !p
  std::string name;           // Special (%tid.x), Symbol (variables, labels, functions)
  uint64_t bits = 0;          // Integer (two's complement), Float32, Float64 (IEEE bits)
  int64_t offset = 0;         // Symbol, Address: bytes added
  int scope = 0;              // Symbol: where labels are looked up from
  std::vector<Arg> children;  // Vector, List: elements. Address: base, further elements. Pair: d|p
};

struct SourceLine {
  int file = 0, line = 0;
  int inlined_file = 0, inlined_line = 0;  // of the call that it was inlined into; 0: it was not
};

struct Statement {
  int line = 0;     // of the PTX text
  int source = -1;  // index into ModuleAst::sources, -1 without -lineinfo
  int guard = -1;
  bool guard_negated = false;
  std::vector<std::string> opcode;  // {"add", "rn", "f32"}
  std::vector<Arg> args;
};

struct RegisterDecl {
  std::string name;
  Type type;
};

/// A variable of any space, or a parameter.
struct Variable {
  std::string name;
  Space space = Space::Global;
  uint64_t bytes = 0;
  uint64_t align = 1;
  Type type = Type::None;
  int line = 0;
  bool is_array = false;
  bool is_extern = false;                           // dynamic shared memory
  std::vector<uint8_t> initial;                     // shorter than bytes: the rest is zero
  std::vector<std::pair<uint64_t, Arg>> addresses;  // initial pointers: where, to what
};

struct Label {
  std::string name;
  int scope;
  size_t statement;  // the one that follows
};

struct FunctionAst {
  std::string name;
  bool is_entry = false, has_body = false;
  int line = 0;
  std::vector<Variable> params, results;
  std::vector<RegisterDecl> registers;
  std::vector<Variable> variables;  // .shared, .local and .param of the body
  std::vector<Statement> statements;
  std::vector<Label> labels;
  std::vector<int> scope_parent;  // of the scope with this index; -1 for the body
  std::map<std::string, std::vector<std::string>> branch_tables;  // .branchtargets
  std::vector<int> required_threads;                              // .reqntid
};

struct ModuleAst {
  int target = 0;  // 80 of sm_80
  std::string target_name;
  std::vector<Variable> variables;
  std::vector<FunctionAst> functions;
  std::map<int, std::string> files;
  std::vector<SourceLine> sources;

  /// "kernel.cu:34", with the call that it was inlined into; empty for -1.
  std::string source_text(int source) const;
};

ModuleAst parse(const std::string& text);

}  // namespace ptxemu
