// The Python module _ptxemu: load PTX, lay out memory, launch. tests/ptxemu/emulator.py is its
// pleasant side.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "decoder.h"
#include "machine.h"

namespace py = pybind11;

namespace ptxemu {
namespace {

struct LoadedModule {
  explicit LoadedModule(const std::string& text) : module(ptxemu::load(text)) {}
  std::unique_ptr<Module> module;
};

py::dict describe(const LoadedModule& m) {
  py::dict entries;
  for (const FunctionAst& f : m.module->ast.functions) {
    if (!f.is_entry || !f.has_body) continue;
    py::list params;
    const Function& function = *m.module->functions.at(f.name);
    for (size_t i = 0; i < f.params.size(); ++i)
      params.append(py::make_tuple(f.params[i].name, name_of(f.params[i].type),
                                   f.params[i].is_array, function.params[i].address,
                                   function.params[i].bytes));
    py::dict entry;
    entry["params"] = params;
    entry["required_threads"] = f.required_threads;
    entries[py::str(f.name)] = entry;
  }
  return entries;
}

std::unique_ptr<Memory> new_memory(LoadedModule& m) {
  auto memory = std::make_unique<Memory>();
  for (Global& g : m.module->globals) memory->add_variable(g.bytes.data(), g.bytes.size(), g.name);
  return memory;
}

py::tuple variable(LoadedModule& m, const std::string& name) {
  for (Global& g : m.module->globals)
    if (g.name == name)
      return py::make_tuple(reinterpret_cast<uintptr_t>(g.bytes.data()), g.bytes.size());
  throw std::invalid_argument("variable: " + name + " is not in the module");
}

Dim3 dim3(const std::array<uint32_t, 3>& sizes) { return {sizes[0], sizes[1], sizes[2]}; }

py::dict launch(LoadedModule& loaded, Memory& memory, const std::string& entry,
                std::array<uint32_t, 3> grid, std::array<uint32_t, 3> block,
                std::array<uint32_t, 3> cluster, const py::bytes& params, uint64_t shared,
                uint64_t seed, uint64_t max_instructions) {
  LaunchConfig config;
  config.grid = dim3(grid);
  config.block = dim3(block);
  config.cluster = dim3(cluster);
  config.dynamic_shared = shared;
  config.seed = seed;
  config.max_instructions = max_instructions;
  const std::string bytes = params;
  config.params.assign(bytes.begin(), bytes.end());
  Report report;
  {
    py::gil_scoped_release release;
    report = run(*loaded.module, memory, entry, config);
  }
  py::list findings;
  for (const Finding& f : report.findings)
    findings.append(
        py::make_tuple(name_of(f.kind), f.message, f.line, f.source, f.function, f.count));
  py::dict counters;
  py::list accesses;
  for (int c = 0; c < static_cast<int>(Class::Count); ++c)
    counters[name_of(static_cast<Class>(c))] = 0;
  std::array<uint64_t, static_cast<size_t>(Class::Count)> counts{};
  uint64_t copied = 0, copied_ideal = 0;
  for (const auto& [name, function] : loaded.module->functions)
    for (const Inst& inst : function->code) {
      const AccessStats& s = report.stats[static_cast<size_t>(inst.index)];
      counts[static_cast<size_t>(inst.counted)] += s.executed;
      copied += s.copied, copied_ideal += s.copied_ideal;
      if (s.ideal)
        accesses.append(py::make_tuple(name_of(inst.counted), inst.line,
                                       loaded.module->ast.source_text(inst.source), s.executed,
                                       s.actual, s.ideal));
    }
  for (size_t c = 0; c < counts.size(); ++c) counters[name_of(static_cast<Class>(c))] = counts[c];
  counters["copied_sectors"] = copied;
  counters["copied_sectors_ideal"] = copied_ideal;
  py::dict result;
  result["findings"] = findings;
  result["counters"] = counters;
  result["accesses"] = accesses;
  result["output"] = report.output;
  result["instructions"] = report.instructions;
  return result;
}

}  // namespace
}  // namespace ptxemu

PYBIND11_MODULE(_ptxemu, m) {
  using namespace ptxemu;
  m.doc() = "Executes compiled PTX on the CPU and checks what it does.";
  py::register_exception<PtxError>(m, "PtxError", PyExc_ValueError);
  py::class_<Memory>(m, "Memory")
      .def("add",
           [](Memory& memory, uintptr_t host, uint64_t size, const std::string& name) {
             return memory.add(reinterpret_cast<void*>(host), size, name);
           })
      .def("allocate", &Memory::allocate)
      .def("mark", &Memory::mark);
  py::class_<LoadedModule>(m, "Module")
      .def(py::init<const std::string&>())
      .def("entries", &describe)
      .def("new_memory", &new_memory)
      .def("variable", &variable)
      .def_property_readonly("target",
                             [](const LoadedModule& l) { return l.module->ast.target_name; })
      .def_property_readonly("static_shared",
                             [](const LoadedModule& l) { return l.module->static_shared; })
      .def("launch", &launch);
  m.def("opcodes", &opcode_names);
  m.attr("UNDEFINED") = static_cast<int>(kUndefined);
  m.attr("HOLE") = static_cast<int>(kHole);
}
