// What every binding shares: tensors arrive as an address and a tuple of strides.
#pragma once
#include <pybind11/pybind11.h>
#include <pyfuse/params.h>

#include <stdexcept>
#include <string>

namespace pyfuse {

// The address of a tensor that must have memory: FakeTensor's is 0, and reading it would crash.
inline void* address(uintptr_t pointer, const char* name) {
  if (pointer == 0) throw std::invalid_argument(std::string(name) + ": null data pointer");
  return reinterpret_cast<void*>(pointer);
}
inline void* optional_address(uintptr_t pointer) { return reinterpret_cast<void*>(pointer); }

// The first `count` of a tuple of strides.
template <int count>
void read_strides(const pybind11::tuple& from, int64_t (&to)[count]) {
  if (static_cast<int>(from.size()) < count) throw std::invalid_argument("strides: too few");
  for (int i = 0; i < count; ++i) to[i] = from[i].cast<int64_t>();
}

inline DType dtype_of(int64_t code) {
  if (code < 0 || code > static_cast<int>(DType::f64))
    throw std::invalid_argument("dtype: no such code: " + std::to_string(code));
  return static_cast<DType>(code);
}

inline Activation activation_of(int code) {
  if (code < 0 || code > static_cast<int>(Activation::relu))
    throw std::invalid_argument("activation: no such code: " + std::to_string(code));
  return static_cast<Activation>(code);
}

inline int at_least_one(int threads) { return threads < 1 ? 1 : threads; }

// The elements of a tuple one after another, for calls with too many arguments to name each twice.
class Arguments {
 public:
  explicit Arguments(const pybind11::tuple& from) : from_(from) {}

  int64_t integer() { return next().cast<int64_t>(); }
  double real() { return next().cast<double>(); }
  template <int count>
  void integers(int64_t (&to)[count]) {
    read_strides(next().cast<pybind11::tuple>(), to);
  }
  // A null address raises where there is a name: that tensor must have memory.
  void* address(const char* name = nullptr) {
    const uintptr_t pointer = next().cast<uintptr_t>();
    return name == nullptr ? optional_address(pointer) : pyfuse::address(pointer, name);
  }

 private:
  pybind11::handle next() {
    if (at_ >= from_.size()) throw std::invalid_argument("too few arguments");
    return PyTuple_GET_ITEM(from_.ptr(), static_cast<Py_ssize_t>(at_++));
  }

  const pybind11::tuple& from_;
  size_t at_ = 0;
};

}  // namespace pyfuse
