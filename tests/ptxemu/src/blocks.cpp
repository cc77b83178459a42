// Basic blocks and post-dominators: where the paths of lanes that part come together again.
//
// Post-dominators by the iterative algorithm of Cooper, Harvey and Kennedy ("A Simple, Fast
// Dominance Algorithm", 2001), run on the reversed graph from one virtual exit.
#include <algorithm>
#include <set>

#include "program.h"

namespace ptxemu {
namespace {

std::vector<int> successors(const Function& f, int at) {
  const Inst& inst = f.code[at];
  const int next = at + 1;
  switch (inst.flow) {
    case Flow::Branch:
      return inst.guarded ? std::vector<int>{inst.target, next} : std::vector<int>{inst.target};
    case Flow::BranchTable: {
      std::vector<int> all;
      for (const Operand& o : inst.more) all.push_back(static_cast<int>(o.at));
      if (inst.guarded) all.push_back(next);
      return all;
    }
    case Flow::Return:
    case Flow::Exit:
      return inst.guarded ? std::vector<int>{next} : std::vector<int>{};
    default:
      return next < static_cast<int>(f.code.size()) ? std::vector<int>{next} : std::vector<int>{};
  }
}

bool is_jump(const Inst& inst) {
  return inst.flow == Flow::Branch || inst.flow == Flow::BranchTable || inst.flow == Flow::Return ||
         inst.flow == Flow::Exit;
}

// The tree of immediate post-dominators; index blocks.size() is the virtual exit, its root.
std::vector<int> post_dominators(const std::vector<BasicBlock>& blocks) {
  const int exit = static_cast<int>(blocks.size());
  std::vector<std::vector<int>> before(exit + 1);
  std::vector<std::vector<int>> after(exit + 1);
  for (int b = 0; b < exit; ++b) {
    after[b] = blocks[b].next;
    if (after[b].empty()) after[b].push_back(exit);
    for (int s : after[b]) before[s].push_back(b);
  }
  std::vector<int> order(exit + 1, -1), finished;
  const auto visit = [&](int root) {  // depth first, backwards along the edges
    std::vector<std::pair<int, size_t>> stack{{root, 0}};
    order[root] = 0;
    while (!stack.empty()) {
      auto& [b, edge] = stack.back();
      if (edge < before[b].size()) {
        const int p = before[b][edge++];
        if (order[p] < 0) order[p] = 0, stack.emplace_back(p, 0);
      } else {
        finished.push_back(b);
        stack.pop_back();
      }
    }
  };
  visit(exit);
  // A loop without end reaches no exit: an edge from one of its blocks makes it post-dominated by
  // the exit alone.
  for (int b = exit - 1; b >= 0; --b)
    if (order[b] < 0) {
      after[b].push_back(exit);
      before[exit].push_back(b);
      std::fill(order.begin(), order.end(), -1);
      finished.clear();
      visit(exit);
    }
  for (size_t i = 0; i < finished.size(); ++i) order[finished[i]] = static_cast<int>(i);
  std::vector<int> parent(exit + 1, -1);
  parent[exit] = exit;
  for (bool changed = true; changed;) {
    changed = false;
    for (auto b = finished.rbegin(); b != finished.rend(); ++b) {
      if (*b == exit) continue;
      int common = -1;
      for (int s : after[*b]) {
        if (parent[s] < 0) continue;
        int other = s;
        while (common >= 0 && common != other) {
          while (order[common] < order[other]) common = parent[common];
          while (order[other] < order[common]) other = parent[other];
        }
        common = other;
      }
      if (common != parent[*b]) parent[*b] = common, changed = true;
    }
  }
  return parent;
}

}  // namespace

void find_blocks(Function& f) {
  const int size = static_cast<int>(f.code.size());
  std::set<int> starts{0};
  for (int i = 0; i < size; ++i) {
    if (!is_jump(f.code[i])) continue;
    for (int s : successors(f, i)) starts.insert(s);
    if (i + 1 < size) starts.insert(i + 1);
  }
  f.blocks.clear();
  for (auto start = starts.begin(); start != starts.end(); ++start) {
    BasicBlock block;
    block.first = *start;
    block.last = (std::next(start) == starts.end() ? size : *std::next(start)) - 1;
    for (int i = block.first; i <= block.last; ++i)
      f.code[i].block = static_cast<int>(f.blocks.size());
    f.blocks.push_back(std::move(block));
  }
  for (BasicBlock& block : f.blocks)
    for (int s : successors(f, block.last)) block.next.push_back(f.code[s].block);
  const std::vector<int> parent = post_dominators(f.blocks);
  std::vector<std::vector<int>> children(parent.size());
  const int exit = static_cast<int>(f.blocks.size());
  for (int b = 0; b < exit; ++b) children[parent[b]].push_back(b);
  // Times of entering and leaving each block in a walk of the tree answer "does c post-dominate b"
  // in two comparisons.
  std::vector<std::pair<int, size_t>> stack{{exit, 0}};
  int time = 0;
  while (!stack.empty()) {
    auto& [b, child] = stack.back();
    if (child == 0 && b != exit) f.blocks[b].enter = time++;
    if (child < children[b].size()) {
      const int c = children[b][child++];
      stack.emplace_back(c, 0);
    } else {
      if (b != exit) f.blocks[b].leave = time++;
      stack.pop_back();
    }
  }
}

}  // namespace ptxemu
