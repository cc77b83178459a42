#include "cuda/launch.h"

#include <cuda_runtime_api.h>
#include <pybind11/functional.h>
#include <pybind11/stl.h>

#include <map>
#include <mutex>
#include <stdexcept>
#include <utility>
#include <vector>

#include "cuda/units.h"

namespace py = pybind11;

namespace pyfuse::cuda {
namespace {

// Where launches go instead of a GPU: (unit, entry, grid, threads, shared, cluster, params).
std::function<void(std::string, std::string, std::vector<int64_t>, int, int, int, py::bytes)>
    redirected;

std::string describe(const Launch& x) {
  return x.unit + "/" + x.entry + " (grid " + std::to_string(x.grid[0]) + " x " +
         std::to_string(x.grid[1]) + " x " + std::to_string(x.grid[2]) + ", " +
         std::to_string(x.threads) + " threads, " + std::to_string(x.shared) +
         " bytes of shared memory)";
}

void check(cudaError_t status, const Launch& launch, const char* doing) {
  if (status == cudaSuccess) return;
  cudaGetLastError();  // it is reported here, and not once more by whoever asks next
  throw std::runtime_error(describe(launch) + ": " + doing + ": " + cudaGetErrorString(status));
}

const Unit& unit_named(const Launch& launch) {
  for (size_t i = 0; i < unit_count; ++i) {
    if (launch.unit == units[i].name) return units[i];
  }
  throw std::runtime_error(describe(launch) + ": there is no unit of this name");
}

// Loaded when first needed and kept: loading a fatbin takes milliseconds.
class Kernels {
 public:
  cudaKernel_t find(const Launch& launch) {
    int device = 0;
    check(cudaGetDevice(&device), launch, "asking for the current GPU");
    const std::lock_guard lock(mutex_);
    auto& library = libraries_[launch.unit];
    if (library == nullptr) {
      const auto status = cudaLibraryLoadData(&library, unit_named(launch).fatbin, nullptr, nullptr,
                                              0, nullptr, nullptr, 0);
      check(status, launch, "loading its code");
    }
    auto& kernel = kernels_[{launch.unit, launch.entry}];
    if (kernel == nullptr)
      check(cudaLibraryGetKernel(&kernel, library, launch.entry.c_str()), launch, "finding it");
    int& allowed = shared_[{kernel, device}];
    if (launch.shared > allowed) {
      const auto most = cudaFuncAttributeMaxDynamicSharedMemorySize;
      check(cudaKernelSetAttributeForDevice(kernel, most, launch.shared, device), launch,
            "asking for shared memory");
      allowed = launch.shared;
    }
    return kernel;
  }

 private:
  std::mutex mutex_;
  std::map<std::string, cudaLibrary_t> libraries_;
  std::map<std::pair<std::string, std::string>, cudaKernel_t> kernels_;
  std::map<std::pair<cudaKernel_t, int>, int> shared_;
};

void start_on_gpu(const Gpu& gpu, const Launch& launch, const void* params) {
  static Kernels kernels;
  const cudaKernel_t kernel = kernels.find(launch);
  cudaLaunchAttribute cluster;
  cluster.id = cudaLaunchAttributeClusterDimension;
  cluster.val.clusterDim.x = static_cast<unsigned>(launch.cluster);
  cluster.val.clusterDim.y = cluster.val.clusterDim.z = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = {static_cast<unsigned>(launch.grid[0]), static_cast<unsigned>(launch.grid[1]),
                    static_cast<unsigned>(launch.grid[2])};
  config.blockDim = {static_cast<unsigned>(launch.threads), 1, 1};
  config.dynamicSmemBytes = static_cast<size_t>(launch.shared);
  config.stream = reinterpret_cast<cudaStream_t>(gpu.stream);
  config.attrs = &cluster;
  config.numAttrs = launch.cluster > 1 ? 1 : 0;
  void* arguments[] = {const_cast<void*>(params)};
  check(cudaLaunchKernelExC(&config, reinterpret_cast<const void*>(kernel), arguments), launch,
        "starting it");
}

// Why no kernel can run on this machine; empty if one can.
std::string why_no_gpu() {
  int count = 0;
  const cudaError_t status = cudaGetDeviceCount(&count);
  if (status == cudaSuccess && count > 0) return "";
  cudaGetLastError();
  return status == cudaSuccess ? "CUDA sees no GPU" : cudaGetErrorString(status);
}

py::dict list_units() {
  py::dict all;
  for (size_t i = 0; i < unit_count; ++i) {
    all[units[i].name] = py::make_tuple(units[i].source, units[i].options, units[i].archs);
  }
  return all;
}

}  // namespace

void start(const Gpu& gpu, const Launch& launch, const void* params, size_t size) {
  if (launch.grid[0] <= 0 || launch.grid[1] <= 0 || launch.grid[2] <= 0) return;
  // CUDA programming guide, technical specifications: sizes of a grid.
  if (launch.grid[0] > 0x7fffffff || launch.grid[1] > 65535 || launch.grid[2] > 65535)
    throw std::runtime_error(describe(launch) + ": more blocks than a grid can have");
  if (!redirected) return start_on_gpu(gpu, launch, params);
  const py::gil_scoped_acquire acquire;
  redirected(launch.unit, launch.entry, {launch.grid[0], launch.grid[1], launch.grid[2]},
             launch.threads, launch.shared, launch.cluster,
             py::bytes(static_cast<const char*>(params), size));
}

const char* name_of(DType dtype) {
  switch (dtype) {
    case DType::f32:
      return "f32";
    case DType::bf16:
      return "bf16";
    case DType::f16:
      return "f16";
    default:
      throw std::invalid_argument("dtype: the CUDA kernels have float32, bfloat16 and float16");
  }
}

void register_launch(py::module_& m) {
  m.def("why_no_gpu", why_no_gpu, "Why no kernel can run on this machine; empty if one can.");
  m.def("units", list_units, "Of each unit its source, its options for nvcc, and architectures.");
  m.def(
      "redirect", [](decltype(redirected) to) { redirected = std::move(to); },
      py::arg("to").none(true),
      "Hand launches to this function from now on instead of a GPU (tests); None ends that.");
  // A function of Python's must not outlive the interpreter.
  py::module_::import("atexit").attr("register")(py::cpp_function([] { redirected = nullptr; }));
}

}  // namespace pyfuse::cuda
