#include "report.h"

namespace ptxemu {

const char* name_of(Kind kind) {
  switch (kind) {
    case Kind::OutOfBounds:
      return "out-of-bounds";
    case Kind::Misaligned:
      return "misaligned";
    case Kind::Uninitialised:
      return "uninitialised";
    case Kind::Race:
      return "race";
    case Kind::AsyncUnwaited:
      return "async-unwaited";
    case Kind::DivergentBarrier:
      return "divergent-barrier";
    case Kind::Deadlock:
      return "deadlock";
    case Kind::Trap:
      return "trap";
    case Kind::Invalid:
      return "invalid";
    case Kind::Count:
      break;
  }
  throw std::logic_error("a kind of finding without a name");
}

const char* name_of(Class c) {
  switch (c) {
    case Class::Other:
      return "other";
    case Class::Int:
      return "int";
    case Class::Fp32:
      return "fp32";
    case Class::Fp64:
      return "fp64";
    case Class::Half:
      return "half";
    case Class::Convert:
      return "cvt";
    case Class::Mufu:
      return "mufu";
    case Class::Mma:
      return "mma";
    case Class::Wgmma:
      return "wgmma";
    case Class::LoadGlobal:
      return "ldg";
    case Class::StoreGlobal:
      return "stg";
    case Class::LoadShared:
      return "lds";
    case Class::StoreShared:
      return "sts";
    case Class::LoadLocal:
      return "ldl";
    case Class::StoreLocal:
      return "stl";
    case Class::LoadParam:
      return "ldc";
    case Class::Ldmatrix:
      return "ldsm";
    case Class::Stmatrix:
      return "stsm";
    case Class::CpAsync:
      return "ldgsts";
    case Class::Bulk:
      return "bulk";
    case Class::Atomic:
      return "atom";
    case Class::Shuffle:
      return "shfl";
    case Class::Barrier:
      return "bar";
    case Class::Branch:
      return "branch";
    case Class::Count:
      break;
  }
  throw std::logic_error("a class without a name");
}

bool Report::again(Kind kind, const Inst& inst) {
  const auto found = seen_.find({kind, inst.index});
  if (found == seen_.end()) return false;
  ++findings[found->second].count;
  return true;
}

void Report::add(Kind kind, const Module& module, const Inst& inst, const std::string& message) {
  if (again(kind, inst)) return;
  seen_[{kind, inst.index}] = findings.size();
  Finding f;
  f.kind = kind;
  f.line = inst.line;
  f.source = module.ast.source_text(inst.source);
  for (const auto& [name, function] : module.functions)
    if (!function->code.empty() && inst.index >= function->code.front().index &&
        inst.index <= function->code.back().index)
      f.function = name;
  f.message = message;
  findings.push_back(std::move(f));
}

}  // namespace ptxemu
