// Control flow (PTX ISA, "Control Flow Instructions"), calls and the functions of the device's run
// time. Warp::control moves the lanes; here is what an instruction says about where to.
#include <algorithm>
#include <cstring>

#include "../access.h"
#include "pick.h"

namespace ptxemu {

struct CallDetail : Detail {
  const Function* callee = nullptr;
  std::vector<std::pair<Place, Place>>
      arguments;  // caller's parameter variable, callee's parameter
  std::vector<std::pair<Place, Place>> results;
};

const Function* callee_of(const Inst& inst) {
  return static_cast<const CallDetail&>(*inst.detail).callee;
}

namespace {

void copy_place(Frame& from, const Place& source, Frame& to, const Place& target, Mask lanes) {
  each_lane(lanes, [&](int lane) {
    const uint64_t bytes = std::min(source.bytes, target.bytes);
    std::copy_n(from.params[lane].begin() + static_cast<ptrdiff_t>(source.address), bytes,
                to.params[lane].begin() + static_cast<ptrdiff_t>(target.address));
    std::copy_n(from.params_defined[lane].begin() + static_cast<ptrdiff_t>(source.address), bytes,
                to.params_defined[lane].begin() + static_cast<ptrdiff_t>(target.address));
  });
}

}  // namespace

// Nothing is left of an earlier call from the same place.
void forget_call(Warp& w, Frame& callee, Mask lanes) {
  const Function& function = *callee.function;
  for (uint32_t row = 0; row < function.register_rows; ++row) {
    callee.defined[row] &= ~lanes;
    callee.origin[row] = -1;
  }
  each_lane(lanes, [&](int lane) {
    std::fill(callee.params_defined[lane].begin(), callee.params_defined[lane].end(), uint8_t{0});
    if (function.local_bytes)
      std::fill_n(w.local_defined[lane].begin() + static_cast<ptrdiff_t>(callee.local_base),
                  function.local_bytes, uint8_t{0});
  });
}

void pass_arguments(Warp& w, const Inst& inst, Frame& caller, Frame& callee, Mask lanes) {
  forget_call(w, callee, lanes);
  for (const auto& [source, target] : static_cast<const CallDetail&>(*inst.detail).arguments)
    copy_place(caller, source, callee, target, lanes);
  for (const auto& [parameter, copy] : callee.function->parameters_in_local)
    each_lane(lanes, [&, from = parameter.address, bytes = parameter.bytes,
                      to = callee.local_base + copy.address](int lane) {
      std::copy_n(callee.params[lane].begin() + static_cast<ptrdiff_t>(from), bytes,
                  w.local[lane].begin() + static_cast<ptrdiff_t>(to));
      std::copy_n(callee.params_defined[lane].begin() + static_cast<ptrdiff_t>(from), bytes,
                  w.local_defined[lane].begin() + static_cast<ptrdiff_t>(to));
    });
}

void pass_results(const Inst& call, Frame& caller, Frame& callee, Mask lanes) {
  for (const auto& [target, source] : static_cast<const CallDetail&>(*call.detail).results)
    copy_place(callee, source, caller, target, lanes);
}

namespace {

void no_handler(Warp&, const Inst&, Mask) {}

void decode_bra(Decoder& d) {
  d.take("uni");
  d.need_args(1, 1);
  d.inst.target = d.label(d.arg(0));
  d.inst.flow = Flow::Branch;
  d.inst.counted = Class::Branch;
  d.inst.run = &no_handler;
}

void decode_brx(Decoder& d) {
  d.take("uni");
  d.need_args(2, 2);
  d.inst.o[0] = d.src(d.arg(0), Type::U32);
  const auto table = d.ast.branch_tables.find(d.arg(1).name);
  if (table == d.ast.branch_tables.end()) d.refuse("table " + d.arg(1).name + " is not declared");
  for (const std::string& name : table->second) {
    Operand target;
    target.at = static_cast<uint32_t>(d.label(name, d.arg(1).scope));
    d.inst.more.push_back(target);
  }
  d.inst.flow = Flow::BranchTable;
  d.inst.counted = Class::Branch;
  d.inst.run = &no_handler;
}

void decode_ret(Decoder& d) {
  d.take("uni");
  d.need_args(0, 0);
  d.inst.flow = Flow::Return;
  d.inst.counted = Class::Branch;
  d.inst.run = &no_handler;
}

void decode_exit(Decoder& d) {
  d.need_args(0, 0);
  d.inst.flow = Flow::Exit;
  d.inst.counted = Class::Branch;
  d.inst.run = &no_handler;
}

void run_trap(Warp& w, const Inst& inst, Mask lanes) {
  w.report(Kind::Trap, inst, lanes, "trap");
  w.launch->trapped = true;
  w.give_up_turn = true;
}

void decode_trap(Decoder& d) {
  d.need_args(0, 0);
  d.inst.run = &run_trap;
}

void decode_breakpoint(Decoder& d) {
  d.need_args(0, 0);
  d.inst.run = &no_handler;
}

// ---- calls into the run time: printf and assert

struct RuntimeCall : Detail {
  std::vector<Place> arguments;
  Place result{Space::Param, 0, 0};
};

uint64_t argument(const Frame& f, const Place& place, int lane) {
  uint64_t value = 0;
  std::memcpy(&value, f.params[lane].data() + place.address, std::min<uint64_t>(place.bytes, 8));
  return value;
}

std::string text_at(Warp& w, const Inst& inst, int lane, uint64_t address) {
  std::string text;
  for (;; ++address) {
    const Location l = locate(w, inst, lane, Space::Generic, address, 1, 1, false);
    if (l.host == nullptr || *l.host == 0) return text;
    text += static_cast<char>(*l.host);
  }
}

template <class... Values>
std::string one_value(const std::string& spec, Values... values) {
  const int length = std::snprintf(nullptr, 0, spec.c_str(), values...);
  std::string text(static_cast<size_t>(std::max(length, 0)) + 1, '\0');
  std::snprintf(text.data(), text.size(), spec.c_str(), values...);
  text.pop_back();
  return text;
}

// printf's arguments lie one after another, each aligned to its size; floats have become doubles.
// The result is how many arguments it took.
int formatted(Warp& w, const Inst& inst, int lane, const std::string& format, uint64_t values,
              std::string& text) {
  int taken = 0;
  const auto take = [&](uint64_t bytes) {
    values = (values + bytes - 1) / bytes * bytes;
    uint64_t value = 0;
    const Location l = locate(w, inst, lane, Space::Generic, values, bytes, bytes, false);
    if (l.host) std::memcpy(&value, l.host, bytes);
    values += bytes;
    ++taken;
    return value;
  };
  for (size_t i = 0; i < format.size(); ++i) {
    if (format[i] != '%') {
      text += format[i];
      continue;
    }
    std::string spec = "%";
    int longs = 0;
    for (++i; i < format.size() && std::strchr("-+ #0123456789.*lhzjt", format[i]); ++i) {
      if (std::strchr("lzjt", format[i])) {
        ++longs;
      } else if (format[i] == '*') {
        spec += std::to_string(static_cast<int>(take(4)));
      } else if (format[i] != 'h') {
        spec += format[i];
      }
    }
    const char kind = i < format.size() ? format[i] : '%';
    char out[512];
    if (kind == '%') {
      text += '%';
      continue;
    }
    if (kind == 's') {
      text += one_value(spec + "s", text_at(w, inst, lane, take(8)).c_str());
    } else if (std::strchr("eEfFgGaA", kind)) {
      text += one_value(spec + kind, bit_cast<double>(take(8)));
    } else if (kind == 'p') {
      text += one_value("0x%llx", static_cast<unsigned long long>(take(8)));
    } else if (!std::strchr("cdiouxX", kind)) {
      text += spec + kind;
    } else if (longs && kind != 'c') {
      text += one_value(spec + "ll" + kind, static_cast<long long>(take(8)));
    } else {
      text += one_value(spec + kind, static_cast<int>(take(4)));
    }
  }
  return taken;
}

void run_printf(Warp& w, const Inst& inst, Mask lanes) {
  const auto& call = static_cast<const RuntimeCall&>(*inst.detail);
  each_lane(lanes, [&](int lane) {
    Frame& f = *w.frame;
    const std::string format = text_at(w, inst, lane, argument(f, call.arguments.at(0), lane));
    const int count = formatted(w, inst, lane, format, argument(f, call.arguments.at(1), lane),
                                w.launch->report.output);
    if (call.result.bytes == 4) {
      std::memcpy(f.params[lane].data() + call.result.address, &count, 4);
      std::fill_n(f.params_defined[lane].begin() + static_cast<ptrdiff_t>(call.result.address), 4,
                  uint8_t{1});
    }
  });
}

void run_assertfail(Warp& w, const Inst& inst, Mask lanes) {
  const auto& call = static_cast<const RuntimeCall&>(*inst.detail);
  const int lane = __builtin_ctz(lanes);
  const Frame& f = *w.frame;
  const auto part = [&](size_t i) {
    return text_at(w, inst, lane, argument(f, call.arguments.at(i), lane));
  };
  w.report(Kind::Trap, inst, lanes,
           "assertion failed: " + part(0) + ", in " + part(3) + " at " + part(1) + ":" +
               std::to_string(argument(f, call.arguments.at(2), lane) & 0xffffffff));
  w.launch->trapped = true;
  w.give_up_turn = true;
}

// call.uni (results), function, (arguments);
void decode_call(Decoder& d) {
  d.take("uni");
  d.need_args(1, 3);
  size_t at = 0;
  std::vector<Arg> results, arguments;
  if (d.arg(at).kind == Arg::Kind::List) results = d.arg(at++).children;
  const Arg& name = d.arg(at++);
  if (name.kind != Arg::Kind::Symbol) d.refuse("a call through a register is not supported");
  if (at < d.args()) arguments = d.arg(at).children;
  const auto place = [&](const Arg& a) {
    const auto found = d.function.names.find(a.name);
    if (a.kind != Arg::Kind::Symbol || found == d.function.names.end())
      d.refuse("arguments must be .param variables");
    return found->second;
  };
  d.inst.counted = Class::Branch;
  const auto found = d.module.functions.find(name.name);
  if (found == d.module.functions.end()) {
    auto& call = d.detail<RuntimeCall>();
    for (const Arg& a : arguments) call.arguments.push_back(place(a));
    if (!results.empty()) call.result = place(results[0]);
    if (name.name == "vprintf" && arguments.size() == 2)
      d.inst.run = &run_printf;
    else if (name.name == "__assertfail" && arguments.size() == 5)
      d.inst.run = &run_assertfail;
    else
      d.refuse("function " + name.name + " is not defined");
    return;
  }
  auto& call = d.detail<CallDetail>();
  const Function& callee = *found->second;
  call.callee = &callee;
  if (arguments.size() != callee.params.size() || results.size() != callee.results.size())
    d.refuse(name.name + " has another number of parameters");
  for (size_t i = 0; i < arguments.size(); ++i)
    call.arguments.emplace_back(place(arguments[i]), callee.params[i]);
  for (size_t i = 0; i < results.size(); ++i)
    call.results.emplace_back(place(results[i]), callee.results[i]);
  d.inst.flow = Flow::Call;
  d.inst.run = &no_handler;
}

}  // namespace

const std::vector<Opcode> kControlOpcodes = {
    {"bra", decode_bra},          {"brx.idx", decode_brx}, {"call", decode_call},
    {"ret", decode_ret},          {"exit", decode_exit},   {"trap", decode_trap},
    {"brkpt", decode_breakpoint},
};

}  // namespace ptxemu
