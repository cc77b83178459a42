// A warp's frames: registers, constants and special registers of one activation of a function.
#include <cstring>

#include "machine.h"

namespace ptxemu {
namespace {

uint64_t special_value(const Warp& w, SpecialKind kind, int lane) {
  using K = SpecialKind;
  const Block& b = *w.block;
  const LaunchConfig& c = w.launch->config;
  const uint64_t thread = uint64_t{w.index} * kLanes + static_cast<uint64_t>(lane);
  const Dim3 in_cluster{b.id.x % c.cluster.x, b.id.y % c.cluster.y, b.id.z % c.cluster.z};
  switch (kind) {
    case K::TidX:
      return thread % c.block.x;
    case K::TidY:
      return thread / c.block.x % c.block.y;
    case K::TidZ:
      return thread / c.block.x / c.block.y;
    case K::NtidX:
      return c.block.x;
    case K::NtidY:
      return c.block.y;
    case K::NtidZ:
      return c.block.z;
    case K::CtaidX:
      return b.id.x;
    case K::CtaidY:
      return b.id.y;
    case K::CtaidZ:
      return b.id.z;
    case K::NctaidX:
      return c.grid.x;
    case K::NctaidY:
      return c.grid.y;
    case K::NctaidZ:
      return c.grid.z;
    case K::LaneId:
      return static_cast<uint64_t>(lane);
    case K::WarpId:
      return w.index;
    case K::NwarpId:
      return (c.block.count() + kLanes - 1) / kLanes;
    case K::SmId:
      return 0;
    case K::NsmId:
      return 1;
    case K::GridId:
      return 1;
    case K::LanemaskEq:
      return 1u << lane;
    case K::LanemaskLt:
      return (1u << lane) - 1;
    case K::LanemaskLe:
      return (2u << lane) - 1;
    case K::LanemaskGt:
      return ~((2u << lane) - 1);
    case K::LanemaskGe:
      return ~((1u << lane) - 1);
    case K::ClusterCtaRank:
      return b.rank;
    case K::ClusterNctaRank:
      return c.cluster.count();
    case K::ClusterCtaidX:
      return in_cluster.x;
    case K::ClusterCtaidY:
      return in_cluster.y;
    case K::ClusterCtaidZ:
      return in_cluster.z;
    case K::ClusterNctaidX:
      return c.cluster.x;
    case K::ClusterNctaidY:
      return c.cluster.y;
    case K::ClusterNctaidZ:
      return c.cluster.z;
    case K::ClusteridX:
      return b.id.x / c.cluster.x;
    case K::ClusteridY:
      return b.id.y / c.cluster.y;
    case K::ClusteridZ:
      return b.id.z / c.cluster.z;
    case K::NclusteridX:
      return c.grid.x / c.cluster.x;
    case K::NclusteridY:
      return c.grid.y / c.cluster.y;
    case K::NclusteridZ:
      return c.grid.z / c.cluster.z;
    case K::DynamicSmem:
      return c.dynamic_shared;
    case K::TotalSmem:
      return b.shared->size();
    case K::Zero:
      return 0;
  }
  throw std::logic_error("a special register without a value");
}

uint64_t lower_half(SpecialKind kind, int bytes, uint64_t value) {
  const bool is_mask = kind >= SpecialKind::LanemaskEq && kind <= SpecialKind::LanemaskGe;
  return bytes == 4 || is_mask ? value & 0xffffffffu : value;
}

}  // namespace

Frame* Warp::enter(Frame* caller, const Inst* call_inst, const Function& function) {
  std::unique_ptr<Frame>& slot = caller ? caller->callees[call_inst] : base;
  if (!slot) slot = std::make_unique<Frame>();
  Frame& f = *slot;
  if (f.function == &function) return &f;
  f.function = &function;
  f.caller = caller;
  f.call = call_inst;
  const size_t bytes = function.register_bytes + function.constants.size();
  f.storage.reset(new uint8_t[bytes + 64]);
  f.registers = reinterpret_cast<uint8_t*>((reinterpret_cast<uintptr_t>(f.storage.get()) + 63) &
                                           ~uintptr_t{63});
  std::memset(f.registers, 0xff, function.register_bytes);
  if (!function.constants.empty())
    std::memcpy(f.registers + function.register_bytes, function.constants.data(),
                function.constants.size());
  f.defined.assign(function.rows, kAllLanes);
  std::fill_n(f.defined.begin(), function.register_rows, 0);
  f.low_defined.assign(function.rows, 0);
  f.high_defined.assign(function.rows, 0);
  f.origin.assign(function.rows, -1);
  f.local_base = caller ? caller->local_base + caller->function->local_bytes : 0;
  for (int lane = 0; lane < kLanes; ++lane) {
    if (f.local_base + function.local_bytes >
        local[lane].size()) {  // a function called before may have more
      local[lane].resize(f.local_base + function.local_bytes, 0xff);
      local_defined[lane].resize(f.local_base + function.local_bytes, 0);
    }
    if (!function.is_entry) {
      f.params[lane].assign(function.param_bytes, 0xff);
      f.params_defined[lane].assign(function.param_bytes, 0);
    } else if (function.param_bytes >
               launch->config.params.size()) {  // .param variables of the body, for calls
      f.params[lane].assign(function.param_bytes, 0xff);
      std::copy(launch->config.params.begin(), launch->config.params.end(), f.params[lane].begin());
      f.params_defined[lane].assign(function.param_bytes, 1);
    }
  }
  for (const SpecialRow& s : function.specials)
    for (int lane = 0; lane < kLanes; ++lane) {
      const uint64_t value = lower_half(s.kind, s.bytes, special_value(*this, s.kind, lane));
      std::memcpy(f.registers + s.place.at + lane * s.bytes, &value, static_cast<size_t>(s.bytes));
    }
  for (const LocalRow& row : function.local_addresses)
    for (int lane = 0; lane < kLanes; ++lane) {
      uint8_t* at = f.registers + row.place.at + lane * row.bytes;
      uint64_t address = 0;
      std::memcpy(&address, at, static_cast<size_t>(row.bytes));
      address += f.local_base;
      std::memcpy(at, &address, static_cast<size_t>(row.bytes));
    }
  return &f;
}

void Warp::start(const Function& entry) {
  stats = launch->report.stats.data();
  live = exists;
  load_split({enter(nullptr, nullptr, entry), 0, exists, Wait::None, 0});
}

}  // namespace ptxemu
