// PTX text to a Module: parse, give variables their places, decode every statement.
#include <algorithm>
#include <cstring>

#include "decoder.h"
#include "memory.h"

namespace ptxemu {
namespace {

uint64_t align_up(uint64_t value, uint64_t align) { return (value + align - 1) / align * align; }

// A name may hold dots: "cp.async.bulk.tensor" is tried before "cp.async".
constexpr size_t kLongestName = 5;

// Initial values that are addresses of other variables.
void place_pointers(Module& m) {
  for (const Variable& v : m.ast.variables)
    for (const auto& [at, target] : v.addresses) {
      const auto found = m.names.find(target.name);
      if (found == m.names.end() || found->second.space != Space::Global)
        throw PtxError(v.line,
                       v.name + ": initial value " + target.name + " is no global variable");
      const uint64_t address = found->second.address + static_cast<uint64_t>(target.offset);
      if (v.space == Space::Const)
        std::memcpy(m.constants.data() + m.names.at(v.name).address + at, &address, sizeof address);
      for (Global& g : m.globals)
        if (g.name == v.name) std::memcpy(g.bytes.data() + at, &address, sizeof address);
    }
}

void place_variables(Module& m) {
  uint64_t shared = 0;
  for (const Variable& v : m.ast.variables) {
    if (m.names.count(v.name)) continue;  // declared extern, then defined
    switch (v.space) {
      case Space::Shared:
        if (v.is_extern) break;  // behind all others
        shared = align_up(shared, v.align);
        m.names[v.name] = {Space::Shared, shared, v.bytes};
        shared += v.bytes;
        break;
      case Space::Const: {
        const uint64_t at = align_up(m.constants.size(), v.align);
        m.constants.resize(at + v.bytes);
        std::copy(v.initial.begin(), v.initial.end(), m.constants.begin() + at);
        m.names[v.name] = {Space::Const, at, v.bytes};
        break;
      }
      case Space::Global: {
        if (v.is_extern) throw PtxError(v.line, v.name + " is defined in another module");
        Global g{v.name, v.initial, v.align, 0};
        g.bytes.resize(v.bytes);
        g.address = Memory::variable_address(m.globals.size());
        m.names[v.name] = {Space::Global, g.address, v.bytes};
        m.globals.push_back(std::move(g));
        break;
      }
      default:
        throw PtxError(v.line, v.name + ": a variable of this space outside of functions");
    }
  }
  for (const FunctionAst& f : m.ast.functions)
    for (const Variable& v : f.variables)
      if (v.space == Space::Shared) {
        shared = align_up(shared, v.align);
        m.names[v.name] = {Space::Shared, shared, v.bytes};
        shared += v.bytes;
      }
  m.static_shared = shared;
  place_pointers(m);
  uint64_t align = 16;
  for (const Variable& v : m.ast.variables)
    if (v.space == Space::Shared && v.is_extern) align = std::max(align, v.align);
  m.dynamic_shared_at = align_up(shared, align);
  for (const Variable& v : m.ast.variables)
    if (v.space == Space::Shared && v.is_extern)
      m.names[v.name] = {Space::Shared, m.dynamic_shared_at, 0};
}

void place_parameters(Function& f, const FunctionAst& ast) {
  const auto place = [&](const Variable& v) {
    f.param_bytes = align_up(f.param_bytes, v.align);
    const Place p{Space::Param, f.param_bytes, v.bytes};
    f.param_bytes += v.bytes;
    f.names[v.name] = p;
    return p;
  };
  for (const Variable& v : ast.params) f.params.push_back(place(v));
  for (const Variable& v : ast.results) f.results.push_back(place(v));
  for (const Variable& v : ast.variables) {
    if (v.space == Space::Param) {
      place(v);
    } else if (v.space == Space::Local) {
      f.local_bytes = align_up(f.local_bytes, v.align);
      f.names[v.name] = {Space::Local, f.local_bytes, v.bytes};
      f.local_bytes += v.bytes;
    } else if (v.space != Space::Shared) {
      throw PtxError(v.line, v.name + ": a variable of this space in a function");
    }
  }
  f.local_bytes = align_up(f.local_bytes, 16);
}

void decode(Module& m, Function& f, const FunctionAst& ast, Rows& rows, const Statement& s,
            Inst& inst) {
  inst.line = s.line;
  inst.source = s.source;
  inst.index = m.instructions++;
  Decoder d(m, f, ast, rows, s, inst);
  size_t used = 0;
  const Opcode* opcode = find_opcode(s.opcode, used);
  if (opcode == nullptr) d.refuse("opcode is not supported");
  d.set_modifiers({s.opcode.begin() + static_cast<std::ptrdiff_t>(used), s.opcode.end()});
  if (s.guard >= 0) {
    if (f.registers[static_cast<size_t>(s.guard)].type != Type::Pred)
      d.refuse("its condition is no predicate");
    inst.guarded = true;
    inst.guard_negated = s.guard_negated;
    inst.guard = rows.reg(s.guard);
  }
  opcode->decode(d);
  d.finish();
}

void collect_registers(const Arg& a, std::vector<int>& into) {
  if (a.kind == Arg::Kind::Register) into.push_back(a.reg);
  for (const Arg& child : a.children) collect_registers(child, into);
}

// Finds the other instructions that touch the registers of wgmma.
void watch_registers(Function& f, const FunctionAst& ast) {
  std::vector<int> registers;
  for (const Statement& s : ast.statements)
    if (s.opcode.size() > 1 && s.opcode[0] == "wgmma" && s.opcode[1] == "mma_async")
      for (size_t i = 0; i < 2; ++i)  // D and A, which are not the descriptor of 64 bits
        if (s.args[i].kind == Arg::Kind::Vector) collect_registers(s.args[i], registers);
  if (registers.empty()) return;
  std::vector<bool> is_watched(ast.registers.size());
  for (int r : registers) is_watched[static_cast<size_t>(r)] = true;
  for (size_t i = 0; i < ast.statements.size(); ++i) {
    const Statement& s = ast.statements[i];
    if (s.opcode[0] == "wgmma") continue;
    const bool has_result =
        s.opcode[0] != "st" && s.opcode[0] != "red" && s.opcode[0] != "stmatrix";
    for (size_t a = 0; a < s.args.size(); ++a) {
      std::vector<int> touched;
      collect_registers(s.args[a], touched);
      for (int r : touched) {
        if (!is_watched[static_cast<size_t>(r)]) continue;
        const bool is_copy = s.opcode[0] == "mov" && s.args[1].kind == Arg::Kind::Register;
        const Touch touch = a > 0 || !has_result ? Touch::Read
                            : is_copy            ? Touch::Copy
                                                 : Touch::Write;
        f.watched[f.code[i].index].emplace_back(f.register_places[static_cast<size_t>(r)].row,
                                                touch);
        f.code[i].watched = true;
      }
    }
  }
}

std::vector<const std::vector<Opcode>*> opcode_tables() {
  return {&kIntegerOpcodes, &kBitOpcodes,      &kFloatOpcodes,  &kCompareOpcodes,
          &kConvertOpcodes, &kMoveOpcodes,     &kMemoryOpcodes, &kAtomicOpcodes,
          &kWarpOpcodes,    &kBarrierOpcodes,  &kAsyncOpcodes,  &kMatrixOpcodes,
          &kWgmmaOpcodes,   &kMbarrierOpcodes, &kBulkOpcodes,   &kTensorMapOpcodes,
          &kControlOpcodes, &kSystemOpcodes};
}

bool is_known_function(const std::string& name) {
  return name == "vprintf" || name == "__assertfail" || name == "malloc" || name == "free";
}

}  // namespace

const Opcode* find_opcode(const std::vector<std::string>& words, size_t& used) {
  static const std::map<std::string, const Opcode*> kTable = [] {
    std::map<std::string, const Opcode*> table;
    for (const auto* part : opcode_tables())
      for (const Opcode& opcode : *part)
        if (!table.emplace(opcode.name, &opcode).second)
          throw std::logic_error(std::string("two opcodes are called ") + opcode.name);
    return table;
  }();
  for (used = std::min(words.size(), kLongestName); used > 0; --used) {
    std::string name = words[0];
    for (size_t i = 1; i < used; ++i) name += "." + words[i];
    if (const auto found = kTable.find(name); found != kTable.end()) return found->second;
  }
  return nullptr;
}

std::vector<std::string> opcode_names() {
  std::vector<std::string> names;
  for (const auto* part : opcode_tables())
    for (const Opcode& opcode : *part) names.emplace_back(opcode.name);
  return names;
}

std::unique_ptr<Module> load(const std::string& text) {
  auto module = std::make_unique<Module>();
  Module& m = *module;
  m.ast = parse(text);
  place_variables(m);
  for (const FunctionAst& ast : m.ast.functions) {
    if (!ast.has_body) continue;
    auto f = std::make_unique<Function>();
    f->name = ast.name;
    f->is_entry = ast.is_entry;
    f->registers = ast.registers;
    place_parameters(*f, ast);
    m.functions[ast.name] = std::move(f);
  }
  for (const FunctionAst& ast : m.ast.functions) {
    if (!ast.has_body) continue;
    Function& f = *m.functions[ast.name];
    Rows rows(f);
    // Control must not run off the end; where it would, the function returns.
    f.code.resize(ast.statements.size() + 1);
    for (size_t i = 0; i < ast.statements.size(); ++i)
      decode(m, f, ast, rows, ast.statements[i], f.code[i]);
    Statement end;
    end.line = ast.statements.empty() ? ast.line : ast.statements.back().line;
    end.opcode = {"ret"};
    decode(m, f, ast, rows, end, f.code.back());
    find_blocks(f);
    watch_registers(f, ast);
  }
  for (const FunctionAst& ast : m.ast.functions)
    if (!ast.has_body && !m.functions.count(ast.name) && !is_known_function(ast.name))
      throw PtxError(ast.line, "function " + ast.name + " is declared, and defined nowhere");
  return module;
}

std::string where(const Module& module, const Inst& inst) {
  const std::string source = module.ast.source_text(inst.source);
  return "PTX line " + std::to_string(inst.line) + (source.empty() ? "" : " (" + source + ")");
}

}  // namespace ptxemu
