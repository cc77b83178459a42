#include "cuda/launch.h"

#include <cuda.h>
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

// Where launches go instead of a GPU: (unit, entry, grid, threads, shared, cluster, params, maps),
// a map as (address, dtype, sizes, strides, rows of a box).
std::function<void(std::string, std::string, std::vector<int64_t>, int, int, int, py::bytes,
                   py::list)>
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

const Unit* find_unit(const std::string& name) {
  for (size_t i = 0; i < unit_count; ++i) {
    if (name == units[i].name) return &units[i];
  }
  return nullptr;
}

const Unit& unit_named(const Launch& launch) {
  if (const Unit* const unit = find_unit(launch.unit)) return *unit;
  throw std::runtime_error(describe(launch) + ": there is no unit of this name");
}

// Loaded when first needed and kept: loading a fatbin takes milliseconds.
class Kernels {
 public:
  cudaKernel_t find(const Launch& launch) {
    int device = 0;
    check(cudaGetDevice(&device), launch, "asking for the current GPU");
    const std::lock_guard lock(mutex_);
    auto& kernel = kernels_[{launch.unit, launch.entry}];
    if (kernel == nullptr)
      check(cudaLibraryGetKernel(&kernel, library(launch), launch.entry.c_str()), launch,
            "finding it");
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
  cudaLibrary_t library(const Launch& launch) {
    auto& loaded = libraries_[launch.unit];
    if (loaded == nullptr) {
      const auto status = cudaLibraryLoadData(&loaded, unit_named(launch).fatbin, nullptr, nullptr,
                                              0, nullptr, nullptr, 0);
      check(status, launch, "loading its code");
    }
    return loaded;
  }

  std::mutex mutex_;
  std::map<std::string, cudaLibrary_t> libraries_;
  std::map<std::pair<std::string, std::string>, cudaKernel_t> kernels_;
  std::map<std::pair<cudaKernel_t, int>, int> shared_;
};

// The driver's own function, found through the runtime: nothing of the driver's is linked.
decltype(&cuTensorMapEncodeTiled) find_encoder(const Launch& launch) {
  void* found = nullptr;
  cudaDriverEntryPointQueryResult result;
  check(cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &found, 12000, cudaEnableDefault,
                                         &result),
        launch, "asking the driver for tensor maps");
  if (result != cudaDriverEntryPointSuccess)
    throw std::runtime_error(describe(launch) + ": the driver has no tensor maps; CUDA 12 has");
  return reinterpret_cast<decltype(&cuTensorMapEncodeTiled)>(found);
}

CUtensorMap encode(const TensorMap& map, const Launch& launch) {
  static const auto encoder = find_encoder(launch);
  const auto bytes = static_cast<cuuint64_t>(size_of(map.dtype));
  cuuint64_t sizes[4], strides[3];  // the innermost first, strides in bytes
  for (int i = 0; i < 4; ++i) sizes[i] = static_cast<cuuint64_t>(map.size[3 - i]);
  for (int i = 0; i < 3; ++i) strides[i] = static_cast<cuuint64_t>(map.stride[2 - i]) * bytes;
  const cuuint32_t box[4] = {128 / static_cast<cuuint32_t>(bytes), static_cast<cuuint32_t>(map.box),
                             1, 1};
  const cuuint32_t steps[4] = {1, 1, 1, 1};
  const auto type = map.dtype == DType::f32    ? CU_TENSOR_MAP_DATA_TYPE_FLOAT32
                    : map.dtype == DType::bf16 ? CU_TENSOR_MAP_DATA_TYPE_BFLOAT16
                                               : CU_TENSOR_MAP_DATA_TYPE_FLOAT16;
  CUtensorMap encoded;
  const CUresult status =
      encoder(&encoded, type, 4, const_cast<void*>(map.data), sizes, strides, box, steps,
              CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B,
              CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  if (status != CUDA_SUCCESS)
    throw std::runtime_error(describe(launch) + ": cuTensorMapEncodeTiled: error " +
                             std::to_string(status));
  return encoded;
}

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
  std::vector<CUtensorMap> maps;
  for (const TensorMap& map : launch.maps) maps.push_back(encode(map, launch));
  std::vector<void*> arguments{const_cast<void*>(params)};
  for (CUtensorMap& map : maps) arguments.push_back(&map);
  check(cudaLaunchKernelExC(&config, reinterpret_cast<const void*>(kernel), arguments.data()),
        launch, "starting it");
}

py::list list_maps(const Launch& launch) {
  py::list all;
  for (const TensorMap& x : launch.maps) {
    all.append(py::make_tuple(reinterpret_cast<uintptr_t>(x.data), static_cast<int>(x.dtype),
                              std::vector<int64_t>(x.size, x.size + 4),
                              std::vector<int64_t>(x.stride, x.stride + 3), x.box));
  }
  return all;
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
    all[units[i].name] = py::make_tuple(units[i].source, units[i].options, units[i].ptx);
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
             py::bytes(static_cast<const char*>(params), size), list_maps(launch));
}

bool has_unit(const std::string& name) { return find_unit(name) != nullptr; }

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
