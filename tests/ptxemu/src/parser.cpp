// PTX text to ModuleAst, by recursive descent (PTX ISA, "Syntax", "Directives").
// Registers are resolved here, since their names are scoped by { }; all other names later.
#include <algorithm>
#include <cstring>
#include <set>

#include "ast.h"
#include "lexer.h"

namespace ptxemu {
namespace {

class Parser {
 public:
  explicit Parser(const std::string& text) : lex_(text) {}

  ModuleAst module() {
    while (!lex_.at_end()) top_level();
    if (out_.target == 0) throw PtxError(1, "no .target");
    return std::move(out_);
  }

 private:
  // ---- directives
  void top_level() {
    const std::string word = directive();
    if (word == ".version" || word == ".address_size") {
      lex_.number();
    } else if (word == ".target") {
      target();
    } else if (word == ".file") {
      file();
    } else if (word == ".loc") {
      location();
    } else if (word == ".section") {
      lex_.dotted();
      lex_.skip_group('{', '}');
    } else if (word == ".visible" || word == ".weak" || word == ".common") {
    } else if (word == ".extern") {
      is_extern_ = true;
    } else if (word == ".entry" || word == ".func") {
      function(word == ".entry");
      is_extern_ = false;
    } else if (word == ".pragma") {
      lex_.quoted();
      lex_.expect(';');
    } else if (word == ".alias") {
      lex_.fail("aliases are not supported");
    } else {
      out_.variables.push_back(variable(word));
      lex_.expect(';');
      is_extern_ = false;
    }
  }

  std::string directive() {
    if (lex_.peek() != '.')
      lex_.fail_here(std::string("expected a directive, found '") + lex_.peek() + "'");
    return lex_.dotted();
  }

  void target() {
    out_.target_name = lex_.identifier();
    if (out_.target_name.rfind("sm_", 0) != 0)
      lex_.fail("target " + out_.target_name + " is not sm_*");
    out_.target = std::atoi(out_.target_name.c_str() + 3);
    while (lex_.accept(',')) lex_.identifier();  // debug, texmode_independent
  }

  void file() {
    const int index = std::atoi(lex_.number().c_str());
    out_.files[index] = lex_.quoted();
    while (lex_.accept(',')) lex_.number();  // time and size
  }

  // .loc file line column [, function_name label [+ offset], inlined_at file line column]
  void location() {
    const std::string text = lex_.rest_of_line();
    SourceLine source;
    int column = 0;
    if (std::sscanf(text.c_str(), "%d %d %d", &source.file, &source.line, &column) < 2)
      lex_.fail(".loc " + text);
    const size_t inlined = text.find("inlined_at ");
    if (inlined != std::string::npos)
      std::sscanf(text.c_str() + inlined, "inlined_at %d %d", &source.inlined_file,
                  &source.inlined_line);
    out_.sources.push_back(std::move(source));
    source_ = static_cast<int>(out_.sources.size()) - 1;
  }

  // ---- variables
  static bool space_named(const std::string& word, Space& space) {
    static const std::map<std::string, Space> kSpaces = {{".global", Space::Global},
                                                         {".shared", Space::Shared},
                                                         {".local", Space::Local},
                                                         {".const", Space::Const},
                                                         {".param", Space::Param}};
    const auto found = kSpaces.find(word);
    if (found != kSpaces.end()) space = found->second;
    return found != kSpaces.end();
  }

  // .space [.align n] .type name [sizes] [= values], and what a parameter adds: .ptr .space .align
  // n
  Variable variable(const std::string& first) {
    Variable v;
    v.line = lex_.line();
    v.is_extern = is_extern_;
    if (!space_named(first, v.space)) lex_.fail("directive " + first + " is not supported");
    uint64_t align = 0;
    bool is_pointer = false;
    while (lex_.peek() == '.') {
      const std::string word = lex_.dotted();
      Space pointee;
      if (word == ".align") {
        const uint64_t value = integer();
        if (!is_pointer) align = value;
      } else if (word == ".ptr") {
        is_pointer = true;
      } else if (space_named(word, pointee)) {
        if (!is_pointer) lex_.fail("two state spaces");
      } else if (word == ".attribute") {
        lex_.skip_group('(', ')');
      } else {
        v.type = type_named(word.substr(1));
        if (v.type == Type::None) lex_.fail("type " + word + " is not supported");
      }
    }
    v.name = lex_.identifier();
    if (function_ == nullptr) variable_names_.insert(v.name);
    std::vector<uint64_t> sizes;
    while (lex_.accept('[')) {
      v.is_array = true;
      sizes.push_back(lex_.peek() == ']' ? 0 : integer());
      lex_.expect(']');
    }
    uint64_t count = 1;
    for (uint64_t size : sizes) count *= size;
    v.bytes = count * bytes_of(v.type);
    v.align = std::max<uint64_t>(align ? align : bytes_of(v.type), 1);
    if (lex_.accept('=')) initial_values(v, sizes, 0);
    if (count == 0 && !v.is_extern) v.bytes = v.initial.size();
    if (v.initial.size() > v.bytes) lex_.fail(v.name + " has too many initial values");
    return v;
  }

  // Of an array of arrays each inner list may be short: the rest of its part is zero.
  void initial_values(Variable& v, const std::vector<uint64_t>& sizes, size_t depth) {
    if (!lex_.accept('{')) return initial_value(v);
    const size_t start = v.initial.size();
    if (!lex_.accept('}')) {
      do initial_values(v, sizes, depth + 1);
      while (lex_.accept(','));
      lex_.expect('}');
    }
    if (depth == 0) return;
    size_t part = static_cast<size_t>(bytes_of(v.type));
    for (size_t i = depth; i < sizes.size(); ++i) part *= sizes[i];
    if (v.initial.size() - start > part) lex_.fail(v.name + " has too many initial values");
    v.initial.resize(start + part);
  }

  void initial_value(Variable& v) {
    const Arg value = expression();
    const size_t at = v.initial.size(), size = static_cast<size_t>(bytes_of(v.type));
    v.initial.resize(at + size);
    const bool needs_float = v.type == Type::F32 || v.type == Type::F64;
    switch (value.kind) {
      case Arg::Kind::Symbol:
        if (size != 8) lex_.fail("an address in a variable that is not of 64 bits");
        v.addresses.emplace_back(at, value);
        return;
      case Arg::Kind::Integer:
        if (needs_float) lex_.fail("an integer as the initial value of " + v.name);
        break;
      case Arg::Kind::Float32:
        if (v.type != Type::F32) lex_.fail("a 32-bit float as the initial value of " + v.name);
        break;
      case Arg::Kind::Float64:
        if (!needs_float) lex_.fail("a float as the initial value of " + v.name);
        if (v.type == Type::F32) {
          double wide;
          std::memcpy(&wide, &value.bits, sizeof wide);
          const auto narrow = static_cast<float>(wide);
          std::memcpy(v.initial.data() + at, &narrow, sizeof narrow);
          return;
        }
        break;
      default:
        lex_.fail("the initial value of " + v.name);
    }
    std::memcpy(v.initial.data() + at, &value.bits, size);
  }

  // ---- functions
  void function(bool is_entry) {
    FunctionAst f;
    f.is_entry = is_entry;
    f.line = lex_.line();
    if (!is_entry && lex_.peek() == '(') f.results = parameters();
    f.name = lex_.identifier();
    if (lex_.peek() == '(') f.params = parameters();
    function_properties(f);
    if (lex_.peek() == '{') {
      f.has_body = true;
      function_ = &f;
      scopes_.clear();
      block(-1);
      function_ = nullptr;
    } else {
      lex_.accept(';');
    }
    source_ = -1;
    out_.functions.push_back(std::move(f));
  }

  std::vector<Variable> parameters() {
    std::vector<Variable> list;
    lex_.expect('(');
    while (lex_.peek() != ')') {
      list.push_back(variable(directive()));
      lex_.accept(',');
    }
    lex_.expect(')');
    return list;
  }

  void function_properties(FunctionAst& f) {
    while (lex_.peek() == '.') {
      const std::string word = lex_.dotted();
      if (word == ".noreturn" || word == ".blocksareclusters" || word == ".explicitcluster")
        continue;
      if (word == ".pragma") {
        lex_.quoted();
        lex_.expect(';');
        continue;
      }
      static const std::vector<std::string> kNumbers = {
          ".maxntid",      ".reqntid",           ".minnctapersm",  ".maxnreg",
          ".maxnctapersm", ".reqnctapercluster", ".maxclusterrank"};
      if (std::find(kNumbers.begin(), kNumbers.end(), word) == kNumbers.end())
        lex_.fail("directive " + word + " is not supported");
      std::vector<int> values;
      do values.push_back(static_cast<int>(integer()));
      while (lex_.accept(','));
      if (word == ".reqntid") f.required_threads = values;
    }
  }

  void block(int parent) {
    lex_.expect('{');
    function_->scope_parent.push_back(parent);
    const int scope = static_cast<int>(function_->scope_parent.size()) - 1;
    scopes_.emplace_back();
    variable_scopes_.emplace_back();
    scope_stack_.push_back(scope);
    while (!lex_.accept('}')) {
      if (lex_.at_end()) lex_.fail_here("'{' is not closed");
      body_item(scope);
    }
    scope_stack_.pop_back();
    variable_scopes_.pop_back();
    scopes_.pop_back();
  }

  void body_item(int scope) {
    if (lex_.peek() == '{') return block(scope);
    if (lex_.accept(';')) return;
    if (lex_.peek() == '.') return body_directive();
    if (lex_.peek() != '@') {
      const Lexer::Place place = lex_.place();
      const std::string name = lex_.identifier();
      if (lex_.peek() == ':' && lex_.second() != ':') {
        lex_.expect(':');
        return label(name, scope);
      }
      lex_.back_to(place);
    }
    statement();
  }

  void label(const std::string& name, int scope) {
    if (lex_.peek() == '.') {
      const Lexer::Place place = lex_.place();
      if (lex_.dotted() == ".branchtargets") {
        auto& table = function_->branch_tables[name];
        do table.push_back(lex_.identifier());
        while (lex_.accept(','));
        lex_.expect(';');
        return;
      }
      lex_.back_to(place);
    }
    function_->labels.push_back({name, scope, function_->statements.size()});
  }

  void body_directive() {
    const std::string word = lex_.dotted();
    if (word == ".loc") return location();
    if (word == ".reg") return registers();
    if (word == ".pragma") {
      lex_.quoted();
    } else {
      Variable v = variable(word);
      v.name = declare_variable(v.name);
      function_->variables.push_back(std::move(v));
    }
    lex_.expect(';');
  }

  // Variables are known by a name of their own; the same name may stand for others in other scopes.
  std::string declare_variable(const std::string& name) {
    std::string unique = name;
    for (int n = 2; !variable_names_.insert(unique).second; ++n)
      unique = name + "#" + std::to_string(n);
    variable_scopes_.back()[name] = unique;
    return unique;
  }

  std::string find_variable(const std::string& name) const {
    for (auto scope = variable_scopes_.rbegin(); scope != variable_scopes_.rend(); ++scope)
      if (const auto found = scope->find(name); found != scope->end()) return found->second;
    return name;
  }

  // .reg .b32 %r<12>;   .reg .pred p, q;
  void registers() {
    const Type type = type_named(lex_.dotted().substr(1));
    if (type == Type::None) lex_.fail("registers of this type are not supported");
    do {
      const std::string name = lex_.identifier();
      if (lex_.accept('<')) {
        const uint64_t count = integer();
        lex_.expect('>');
        for (uint64_t i = 0; i < count; ++i) declare(name + std::to_string(i), type);
      } else {
        declare(name, type);
      }
    } while (lex_.accept(','));
    lex_.expect(';');
  }

  void declare(const std::string& name, Type type) {
    scopes_.back()[name] = static_cast<int>(function_->registers.size());
    function_->registers.push_back({name, type});
  }

  int find_register(const std::string& name) const {
    for (auto scope = scopes_.rbegin(); scope != scopes_.rend(); ++scope)
      if (const auto found = scope->find(name); found != scope->end()) return found->second;
    return -1;
  }

  // ---- statements
  void statement() {
    Statement s;
    s.line = lex_.line();
    s.source = source_;
    if (lex_.accept('@')) {
      s.guard_negated = lex_.accept('!');
      const std::string name = lex_.identifier();
      s.guard = find_register(name);
      if (s.guard < 0) lex_.fail("predicate " + name + " is not declared");
    }
    const std::string opcode = lex_.dotted();
    for (size_t start = 0; start <= opcode.size();) {
      const size_t dot = std::min(opcode.find('.', start), opcode.size());
      s.opcode.push_back(opcode.substr(start, dot - start));
      start = dot + 1;
    }
    if (lex_.peek() != ';') {
      do s.args.push_back(argument());
      while (lex_.accept(','));
    }
    lex_.expect(';');
    function_->statements.push_back(std::move(s));
  }

  Arg argument() {
    Arg a = simple_argument();
    if (!lex_.accept('|')) return a;
    Arg pair;
    pair.kind = Arg::Kind::Pair;
    pair.children = {std::move(a), simple_argument()};
    return pair;
  }

  Arg simple_argument() {
    if (lex_.peek() == '{') return group('{', '}', Arg::Kind::Vector);
    if (lex_.peek() == '[') return group('[', ']', Arg::Kind::Address);
    if (lex_.peek() == '(') return group('(', ')', Arg::Kind::List);
    return expression();
  }

  Arg group(char open, char close, Arg::Kind kind) {
    Arg list;
    list.kind = kind;
    lex_.expect(open);
    if (lex_.accept(close)) return list;
    do list.children.push_back(simple_argument());
    while (lex_.accept(','));
    lex_.expect(close);
    return list;
  }

  // A register, number, symbol or symbol + offset; `generic(symbol)` in initial values.
  Arg expression() {
    Arg a;
    if (lex_.accept('!')) {
      a = expression();
      a.negated = true;
      return a;
    }
    if (lex_.peek() == '-' || lex_.at_number()) return number();
    const std::string name = lex_.identifier();
    if (name == "_") return a;
    if (name == "generic" && lex_.accept('(')) {
      a = expression();
      lex_.expect(')');
      a.offset += offset();
      return a;
    }
    a.reg = find_register(name);
    a.name = a.reg >= 0 ? name : find_variable(name);
    a.scope = scope_stack_.empty() ? 0 : scope_stack_.back();
    a.kind = a.reg >= 0 ? Arg::Kind::Register : Arg::Kind::Symbol;
    if (a.reg < 0 && (name[0] == '%' || name == "WARP_SZ")) {
      a.kind = Arg::Kind::Special;
      if (lex_.peek() == '.') a.name += lex_.dotted();
    }
    a.offset = offset();
    return a;
  }

  int64_t offset() {
    if (lex_.accept('+')) {
      const bool negative = lex_.accept('-');
      const int64_t value = static_cast<int64_t>(integer());
      return negative ? -value : value;
    }
    if (lex_.peek() == '-') {
      lex_.expect('-');
      return -static_cast<int64_t>(integer());
    }
    return 0;
  }

  Arg number() {
    Arg a;
    const bool negative = lex_.accept('-');
    const std::string digits = lex_.number();
    const bool is_bits = digits.size() > 2 && digits[0] == '0';
    const char kind = is_bits ? static_cast<char>(std::tolower(digits[1])) : '\0';
    if (kind == 'f' || kind == 'd') {
      const bool right = digits.size() == (kind == 'f' ? 10u : 18u) &&
                         digits.find_first_not_of("0123456789abcdefABCDEF", 2) == std::string::npos;
      if (!right) lex_.fail("number " + digits);
      a.kind = kind == 'f' ? Arg::Kind::Float32 : Arg::Kind::Float64;
      a.bits = std::stoull(digits.substr(2), nullptr, 16);
      if (negative) a.bits ^= kind == 'f' ? 0x80000000ull : 0x8000000000000000ull;
    } else if (digits.find('.') != std::string::npos) {
      a.kind = Arg::Kind::Float64;
      if (digits.find_first_not_of("0123456789.") != std::string::npos ||
          digits.find('.') != digits.rfind('.'))
        lex_.fail("number " + digits);
      const double value = (negative ? -1 : 1) * std::stod(digits);
      std::memcpy(&a.bits, &value, sizeof value);
    } else {
      a.kind = Arg::Kind::Integer;
      a.bits = unsigned_value(digits);
      if (negative) a.bits = 0 - a.bits;
    }
    return a;
  }

  uint64_t unsigned_value(std::string digits) {
    if (!digits.empty() && (digits.back() == 'U' || digits.back() == 'u')) digits.pop_back();
    int base = 10;
    if (digits.size() > 1 && digits[0] == '0') {
      const char kind = static_cast<char>(std::tolower(digits[1]));
      base = kind == 'x' ? 16 : kind == 'b' ? 2 : 8;
      if (base != 8) digits = digits.substr(2);
    }
    size_t used = 0;
    uint64_t value = 0;
    try {
      value = std::stoull(digits, &used, base);
    } catch (const std::exception&) {
      lex_.fail("number " + digits);
    }
    if (used != digits.size()) lex_.fail("number " + digits);
    return value;
  }

  uint64_t integer() { return unsigned_value(lex_.number()); }

  Lexer lex_;
  ModuleAst out_;
  FunctionAst* function_ = nullptr;
  std::vector<std::map<std::string, int>> scopes_;  // register names, innermost last
  std::vector<std::map<std::string, std::string>>
      variable_scopes_;                   // likewise: unique names of variables
  std::set<std::string> variable_names_;  // of the module so far
  std::vector<int> scope_stack_;
  int source_ = -1;
  bool is_extern_ = false;
};

}  // namespace

std::string ModuleAst::source_text(int source) const {
  if (source < 0) return "";
  const SourceLine& s = sources[static_cast<size_t>(source)];
  const auto file = files.find(s.file), caller = files.find(s.inlined_file);
  if (file == files.end()) return "";
  std::string text = file->second + ":" + std::to_string(s.line);
  if (caller != files.end()) {
    const std::string& name = caller->second;
    text +=
        ", inlined at " + name.substr(name.rfind('/') + 1) + ":" + std::to_string(s.inlined_line);
  }
  return text;
}

ModuleAst parse(const std::string& text) { return Parser(text).module(); }

}  // namespace ptxemu
