// The typed internal form that is executed: every name resolved, every operand a row of the
// register file.
//
// A function's registers lie in one frame of bytes. A row holds one value for each of the 32 lanes;
// constants and special registers are rows too, filled in when a frame is made, so that an operand
// is always just an offset. A predicate's row is one 32-bit mask.
#pragma once

#include <cstddef>
#include <map>
#include <memory>
#include <string>
#include <vector>

#include "ast.h"
#include "types.h"

namespace ptxemu {

struct Warp;
struct Inst;
using Handler = void (*)(Warp&, const Inst&, Mask active);

struct Operand {
  uint32_t at = 0;   // byte offset of the row in the frame
  uint32_t row = 0;  // index of its mask of defined lanes
};

/// What an instruction is counted as in the report.
enum class Class : uint8_t {
  Other,
  Int,
  Fp32,
  Fp64,
  Half,
  Convert,
  Mufu,
  Mma,
  Wgmma,
  LoadGlobal,
  StoreGlobal,
  LoadShared,
  StoreShared,
  LoadLocal,
  StoreLocal,
  LoadParam,
  Ldmatrix,
  Stmatrix,
  CpAsync,
  Bulk,
  Atomic,
  Shuffle,
  Barrier,
  Branch,
  Count
};
const char* name_of(Class c);

/// How the interpreter treats an instruction beyond calling its handler.
enum class Flow : uint8_t {
  Plain,        // run, then the next one
  Sync,         // first wait for the lanes that it names (Inst::members) or for the whole warp
  Branch,       // bra
  BranchTable,  // brx.idx
  Call,
  Return,
  Exit,
  Blocking,  // its handler may leave the warp waiting and is then run again (Warp::wait)
};

constexpr int kWholeWarp = -1;

/// What single instructions need beside operands: shapes, formats, tables.
struct Detail {
  virtual ~Detail() = default;
};

struct Inst {
  Handler run = nullptr;
  Operand o[9];               // destinations first
  std::vector<Operand> more;  // of matrix instructions
  Operand guard;
  bool guarded = false, guard_negated = false;
  Flow flow = Flow::Plain;
  Class counted = Class::Other;
  Space space = Space::Generic;
  bool address_is_64 = true;
  bool by_lane = false;    // Sync: the lanes are named by operand `members`
  bool in_halves = false;  // works on each half of its operands alone, so that one may be undefined
  bool watched = false;    // touches registers of asynchronous matrix instructions
  uint8_t size = 0;        // bytes of one element in memory
  uint8_t count = 1;       // elements
  Operand members;
  int32_t target = -1;  // of a branch: instruction index
  int64_t imm = 0;
  std::unique_ptr<Detail> detail;
  int index = 0;  // in the module: of its statistics
  int line = 0, source = -1;
  int block = 0;  // basic block
};

/// A named variable's place in its space.
struct Place {
  Space space;
  uint64_t address;
  uint64_t bytes;
};

struct BasicBlock {
  int first = 0, last = 0;  // instructions, both included
  std::vector<int> next;
  // Block b is post-dominated by the blocks on its path to the root of the post-dominator tree:
  // c post-dominates b exactly if enter[c] <= enter[b] and leave[b] <= leave[c].
  int enter = 0, leave = 0;
};

enum class SpecialKind : uint8_t {
  TidX,
  TidY,
  TidZ,
  NtidX,
  NtidY,
  NtidZ,
  CtaidX,
  CtaidY,
  CtaidZ,
  NctaidX,
  NctaidY,
  NctaidZ,
  LaneId,
  WarpId,
  NwarpId,
  SmId,
  NsmId,
  GridId,
  LanemaskEq,
  LanemaskLt,
  LanemaskLe,
  LanemaskGt,
  LanemaskGe,
  ClusterCtaRank,
  ClusterNctaRank,
  ClusterCtaidX,
  ClusterCtaidY,
  ClusterCtaidZ,
  ClusterNctaidX,
  ClusterNctaidY,
  ClusterNctaidZ,
  ClusteridX,
  ClusteridY,
  ClusteridZ,
  NclusteridX,
  NclusteridY,
  NclusteridZ,
  DynamicSmem,
  TotalSmem,
  Zero
};

struct SpecialRow {
  SpecialKind kind;
  Operand place;
  int bytes;  // 4 or 8
};

struct LocalRow {
  Operand place;
  int bytes;  // 4 or 8
};
/// Copies between registers are the compiler's bookkeeping: the assembler joins both registers into
/// one.
enum class Touch : uint8_t { Read, Write, Copy };

struct Function {
  std::string name;
  bool is_entry = false;
  std::vector<Inst> code;
  std::vector<BasicBlock> blocks;
  std::vector<RegisterDecl> registers;
  std::vector<Operand> register_places;
  // A frame: the rows of registers, undefined at first, then those of constants and special
  // registers.
  size_t register_bytes = 0;
  uint32_t register_rows = 0, rows = 0;
  std::vector<uint8_t> constants;
  std::vector<SpecialRow> specials;
  std::vector<LocalRow> local_addresses;  // constants to which the frame's local base is added
  std::vector<std::pair<Place, Place>>
      parameters_in_local;  // those whose address is taken, and their copies
  uint64_t local_bytes = 0;
  std::vector<Place> params,
      results;  // in the frame's parameter area (an entry's: in the bank of parameters)
  uint64_t param_bytes = 0;  // parameter area of one lane, .param variables of the body included
  std::map<std::string, Place> names;  // params, results, local and param variables
  // By index of an instruction that touches registers of asynchronous matrix products: which rows,
  // and how.
  std::map<int, std::vector<std::pair<uint32_t, Touch>>> watched;
};

struct Global {
  std::string name;
  std::vector<uint8_t> bytes;
  uint64_t align;
  uint64_t address;
};

struct Module {
  ModuleAst ast;
  std::map<std::string, std::unique_ptr<Function>> functions;
  std::map<std::string, Place> names;  // of global, constant and shared variables
  std::vector<Global> globals;
  std::vector<uint8_t> constants;
  uint64_t static_shared = 0, dynamic_shared_at = 0;
  int instructions = 0;
  int shared_granule = 16;  // bytes of the smallest access to shared memory
  int global_granule = 16;  // bytes of the smallest write to global memory
};

std::unique_ptr<Module> load(const std::string& text);
void find_blocks(Function& function);
std::string where(const Module& module, const Inst& inst);  // "line 12 (kernel.cu:34)"

}  // namespace ptxemu
