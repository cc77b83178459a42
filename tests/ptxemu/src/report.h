// What a launch found and counted.
#pragma once

#include <cstdint>
#include <map>
#include <string>
#include <tuple>
#include <vector>

#include "program.h"

namespace ptxemu {

enum class Kind : uint8_t {
  OutOfBounds,
  Misaligned,
  Uninitialised,
  Race,
  AsyncUnwaited,
  DivergentBarrier,
  Deadlock,
  Trap,
  Invalid,
  Count
};
const char* name_of(Kind kind);

struct Finding {
  Kind kind;
  int line = 0;
  std::string source;  // "kernel.cu:34", empty without -lineinfo
  std::string function, message;
  uint64_t count = 1;  // the same at the same instruction
};

/// How well the memory accesses of one instruction fit the hardware.
struct AccessStats {
  uint64_t executed = 0, actual = 0, ideal = 0;
  uint64_t copied = 0, copied_ideal = 0;  // sectors of a copy, whose wavefronts are the above
};

struct Report {
  std::vector<Finding> findings;
  std::vector<AccessStats> stats;  // of each instruction of the module
  std::string output;              // of printf
  uint64_t instructions = 0;

  /// Counts one more of what was found at this instruction before; false if it was not.
  bool again(Kind kind, const Inst& inst);
  void add(Kind kind, const Module& module, const Inst& inst, const std::string& message);

 private:
  std::map<std::tuple<Kind, int>, size_t> seen_;
};

}  // namespace ptxemu
