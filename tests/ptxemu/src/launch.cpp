// A launch: clusters of blocks in random order, their warps in random turns.
#include <algorithm>
#include <cstring>
#include <numeric>

#include "machine.h"

namespace ptxemu {
namespace {

constexpr uint64_t kLongestTurn = 256;  // warp instructions before another warp may go on
// Polls in vain of every warp that still runs, until another block comes; and where there is none,
// until nothing will.
constexpr uint64_t kPollsUntilMore = 200, kPollsInVain = 3000;

// Bytes of shared memory that a block may have (CUDA C++ Programming Guide, "Technical
// Specifications per Compute Capability").
uint64_t shared_limit(int target) {
  switch (target) {
    case 80:
    case 87:
      return 163 * 1024;
    case 86:
    case 89:
    case 120:
    case 121:
      return 99 * 1024;
    case 90:
    case 100:
    case 101:
    case 103:
      return 227 * 1024;
    default:
      return target < 80 ? 64 * 1024 : 227 * 1024;
  }
}

Dim3 coordinates(uint64_t index, Dim3 size) {
  return {static_cast<uint32_t>(index % size.x), static_cast<uint32_t>(index / size.x % size.y),
          static_cast<uint32_t>(index / size.x / size.y)};
}

void check(const Module& module, const Function& entry, const LaunchConfig& c) {
  const auto need = [](bool good, const std::string& what) {
    if (!good) throw std::invalid_argument(what);
  };
  const uint64_t threads = c.block.count();
  need(threads >= 1 && threads <= 1024,
       "block: " + std::to_string(threads) + " threads, needs 1 to 1024");
  need(c.grid.count() >= 1, "grid: has no block");
  need(c.cluster.count() >= 1 && c.cluster.count() <= 16, "cluster: needs 1 to 16 blocks");
  need(c.grid.x % c.cluster.x == 0 && c.grid.y % c.cluster.y == 0 && c.grid.z % c.cluster.z == 0,
       "cluster: does not divide the grid");
  const uint64_t shared = module.dynamic_shared_at + c.dynamic_shared;
  need(shared <= shared_limit(module.ast.target),
       "shared: the block needs " + std::to_string(shared) + " bytes, " + module.ast.target_name +
           " has " + std::to_string(shared_limit(module.ast.target)));
  need(entry.is_entry, "entry: " + entry.name + " is no kernel");
  for (const FunctionAst& f : module.ast.functions) {
    if (f.name != entry.name || f.required_threads.empty()) continue;
    uint64_t required = 1;
    for (int n : f.required_threads) required *= static_cast<uint64_t>(n);
    need(required == threads, "block: " + std::to_string(threads) + " threads, " + entry.name +
                                  " was compiled for " + std::to_string(required));
  }
}

}  // namespace

bool Cluster::done() const {
  for (const auto& block : blocks)
    for (const auto& warp : block->warps)
      if (!warp->done()) return false;
  return true;
}

std::unique_ptr<Cluster> Launch::make_cluster(const Function& entry, uint64_t index) {
  auto cluster = std::make_unique<Cluster>();
  const Dim3 clusters{config.grid.x / config.cluster.x, config.grid.y / config.cluster.y,
                      config.grid.z / config.cluster.z};
  const Dim3 at = coordinates(index, clusters);
  cluster->number = static_cast<uint32_t>(index) + 1;
  const uint64_t warps = (config.block.count() + kLanes - 1) / kLanes;
  for (uint32_t rank = 0; rank < config.cluster.count(); ++rank) {
    auto block = std::make_unique<Block>();
    const Dim3 inside = coordinates(rank, config.cluster);
    block->launch = this;
    block->cluster = cluster.get();
    block->rank = rank;
    block->id = {at.x * config.cluster.x + inside.x, at.y * config.cluster.y + inside.y,
                 at.z * config.cluster.z + inside.z};
    block->shared = std::make_unique<SharedMemory>(module.dynamic_shared_at + config.dynamic_shared,
                                                   module.shared_granule);
    for (uint32_t i = 0; i < warps; ++i) {
      auto warp = std::make_unique<Warp>();
      warp->launch = this;
      warp->block = block.get();
      warp->index = i;
      warp->clock_index = rank * static_cast<uint32_t>(warps) + i;
      const uint64_t lanes = std::min<uint64_t>(config.block.count() - i * kLanes, kLanes);
      warp->exists = lanes == kLanes ? kAllLanes : (1u << lanes) - 1;
      warp->seen.assign(warps * config.cluster.count() + 1, 1);
      warp->seen_at_proxy_fence.assign(warp->seen.size(), 0);
      warp->start(entry);
      block->warps.push_back(std::move(warp));
    }
    cluster->blocks.push_back(std::move(block));
  }
  return cluster;
}

bool finish_one_bulk(Launch& launch, Cluster& cluster) {
  if (cluster.bulk.empty()) return false;
  const size_t at = launch.random() % cluster.bulk.size();
  const PendingBulk chosen = std::move(cluster.bulk[at]);
  cluster.bulk.erase(cluster.bulk.begin() + static_cast<std::ptrdiff_t>(at));
  chosen.complete();
  return true;
}

// Lets one warp go on; false if none can.
bool Launch::run_turn(Cluster& cluster) {
  std::vector<Warp*> ready;
  for (const auto& block : cluster.blocks)
    for (const auto& warp : block->warps)
      if (warp->runnable()) ready.push_back(warp.get());
  if (ready.empty()) return finish_one_bulk(*this, cluster);
  if (!cluster.bulk.empty() && random() % 4 == 0) finish_one_bulk(*this, cluster);
  ready[random() % ready.size()]->run(1 + random() % kLongestTurn);
  return true;
}

bool Launch::all_poll_in_vain(uint64_t times_a_warp) const {
  if (polls_in_vain < times_a_warp) return false;
  uint64_t running = 0;
  for (const auto& cluster : resident)
    for (const auto& block : cluster->blocks)
      for (const auto& warp : block->warps) running += warp->runnable();
  return running && polls_in_vain >= times_a_warp * running;
}

void Launch::report_deadlock(const char* why) {
  const Inst* at = nullptr;
  std::string text = why;
  bool barrier_without_all = false;
  for (const auto& cluster : resident) {
    for (const auto& block : cluster->blocks) {
      text += "\n  block (" + std::to_string(block->id.x) + ", " + std::to_string(block->id.y) +
              ", " + std::to_string(block->id.z) + ")";
      uint32_t there = 0;
      for (const auto& warp : block->warps) {
        text += "\n    " + warp->position();
        if (!warp->done()) there += kLanes;
        if (warp->done() || at != nullptr) continue;
        at = warp->active ? &warp->code[warp->pc]
                          : &warp->others[0].frame->function->code[warp->others[0].pc];
      }
      for (const auto& [id, barrier] : block->barriers)
        barrier_without_all |= barrier.arrived && barrier.expected > there;
    }
    if (resident.size() > 4) break;
  }
  if (at == nullptr) throw std::logic_error("a deadlock of nobody");
  report.add(barrier_without_all ? Kind::DivergentBarrier : Kind::Deadlock, module, *at, text);
}

void Launch::run(const Function& entry) {
  check(module, entry, config);
  report.stats.resize(static_cast<size_t>(module.instructions));
  const uint64_t total = config.grid.count() / config.cluster.count();
  std::vector<uint64_t> order(total);
  std::iota(order.begin(), order.end(), 0);
  std::shuffle(order.begin(), order.end(), random);
  uint64_t next = 0;
  while (!trapped) {
    for (const auto& cluster : resident)
      if (cluster->done())
        for (const PendingBulk& copy : cluster->bulk)
          report.add(Kind::AsyncUnwaited, module, *copy.inst,
                     "the block exits while this copy to its shared memory is under way");
    resident.erase(
        std::remove_if(resident.begin(), resident.end(), [](const auto& c) { return c->done(); }),
        resident.end());
    if (resident.empty()) {
      if (next == total) break;
      resident.push_back(make_cluster(entry, order[next++]));
    }
    // Blocks that wait for one another must be there together: another one comes when these can't
    // go on.
    const size_t start = random() % resident.size();
    bool moved = false;
    for (size_t i = 0; i < resident.size() && !moved; ++i)
      moved = run_turn(*resident[(start + i) % resident.size()]);
    if (moved && !all_poll_in_vain(next < total ? kPollsUntilMore : kPollsInVain)) {
      if (clock_counter > config.max_instructions) {
        report_deadlock(
            ("it has not ended after " + std::to_string(clock_counter) + " warp instructions")
                .c_str());
        break;
      }
      continue;
    }
    if (std::all_of(resident.begin(), resident.end(), [](const auto& c) { return c->done(); }))
      continue;
    if (next == total) {
      report_deadlock(moved ? "every warp polls in vain" : "no warp can go on");
      break;
    }
    polls_in_vain = 0;
    resident.push_back(make_cluster(entry, order[next++]));
  }
  resident.clear();
  report.instructions = clock_counter;
}

Report run(Module& module, Memory& memory, const std::string& entry, const LaunchConfig& config) {
  const auto found = module.functions.find(entry);
  if (found == module.functions.end()) {
    std::string names;
    for (const auto& [name, f] : module.functions)
      if (f->is_entry) names += (names.empty() ? "" : ", ") + name;
    throw std::invalid_argument("entry: " + entry + " is not in the module, which has " + names);
  }
  Launch launch(module, memory, config);
  launch.run(*found->second);
  return std::move(launch.report);
}

}  // namespace ptxemu
