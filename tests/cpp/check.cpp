// The runner, and what the tests share.
#include "check.h"

#include <math.h>
#include <stdarg.h>
#include <stdio.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <cstdlib>
#include <stdexcept>
#include <string>
#include <vector>

#include "cpu/isa.h"

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#else
#define ASAN_POISON_MEMORY_REGION(address, size) ((void)(address), (void)(size))
#define ASAN_UNPOISON_MEMORY_REGION(address, size) ((void)(address), (void)(size))
#endif

namespace pyfuse::test {
namespace {

struct Test {
  const char* isa;
  std::string name;
  void (*run)();
};

std::vector<Test>& tests() {
  static std::vector<Test> all;
  return all;
}

constexpr int shown = 5;  // failures of one test; the others are counted
int failures = 0;         // of the running test
bool slow_chosen = false;
uint64_t random_state = 0;

constexpr unsigned char poison = 0xff;

}  // namespace

bool add_test(const char* isa, const char* file, const char* name, void (*run)()) {
  const std::string path = file;
  const size_t slash = path.rfind('/') + 1, dot = path.rfind('.');
  tests().push_back({isa, path.substr(slash, dot - slash) + "." + name, run});
  return true;
}

void fail(const char* file, int line, const char* condition, const char* format, ...) {
  if (++failures > shown) return;
  std::printf("%s:%d: not true: %s:", file, line, condition);
  va_list values;
  va_start(values, format);
  std::vprintf(format, values);
  va_end(values);
  std::printf("\n");
}

bool slow() { return slow_chosen; }

double random_unit() {  // splitmix64
  uint64_t z = random_state += 0x9e3779b97f4a7c15u;
  z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
  z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
  z ^= z >> 31;
  return std::ldexp(static_cast<double>(z >> 11), -52) - 1.0;
}

// [ slack, all NaN | data ][ page without access ]
Memory::Memory(int64_t bytes) : bytes_(bytes) {
  const int64_t page = sysconf(_SC_PAGESIZE), room = (bytes + page - 1) / page * page;
  mapped_ = room + page;
  void* map = mmap(nullptr, static_cast<size_t>(mapped_), PROT_READ | PROT_WRITE,
                   MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (map == MAP_FAILED) throw std::runtime_error("mmap failed");
  pages_ = static_cast<char*>(map);
  data_ = pages_ + room - bytes;
  memset(pages_, poison, static_cast<size_t>(room));
  mprotect(pages_ + room, static_cast<size_t>(page), PROT_NONE);
  ASAN_POISON_MEMORY_REGION(pages_, static_cast<size_t>(room - bytes));
}

Memory::~Memory() {
  ASAN_UNPOISON_MEMORY_REGION(pages_, static_cast<size_t>(data_ - pages_));
  const bool untouched =
      std::all_of(pages_, data_, [](char c) { return static_cast<unsigned char>(c) == poison; });
  CHECK(untouched, "something wrote before memory of %lld bytes", static_cast<long long>(bytes_));
  munmap(pages_, static_cast<size_t>(mapped_));
}

void* Memory::data() const { return data_; }

namespace {

struct Format {
  int fraction_bits, exponent_bits;
  int bias() const { return (1 << (exponent_bits - 1)) - 1; }
  int infinity() const { return ((1 << exponent_bits) - 1) << fraction_bits; }
};

Format format_of(DType dtype) { return dtype == DType::bf16 ? Format{7, 8} : Format{10, 5}; }

}  // namespace

double from_half(uint16_t bits, DType dtype) {
  const Format f = format_of(dtype);
  const int magnitude = bits & 0x7fff, exponent = magnitude >> f.fraction_bits;
  const int fraction = magnitude & ((1 << f.fraction_bits) - 1);
  const double sign = bits & 0x8000 ? -1 : 1;
  if (magnitude == f.infinity()) return sign * INFINITY;
  if (magnitude > f.infinity()) return NAN;
  if (exponent == 0) return sign * std::ldexp(fraction, 1 - f.bias() - f.fraction_bits);
  return sign *
         std::ldexp(fraction + (1 << f.fraction_bits), exponent - f.bias() - f.fraction_bits);
}

uint16_t to_half(double x, DType dtype) {
  const Format f = format_of(dtype);
  const int sign = std::signbit(x) ? 0x8000 : 0, lowest = 1 - f.bias();
  if (std::isnan(x)) return static_cast<uint16_t>(sign | f.infinity() | 1 << (f.fraction_bits - 1));
  if (std::isinf(x)) return static_cast<uint16_t>(sign | f.infinity());
  const int exponent = x == 0 ? lowest : std::max(std::ilogb(x), lowest);
  // In units of the last place, rounded to even; a carry runs on into the exponent, up to infinity.
  const double units = std::nearbyint(std::ldexp(std::fabs(x), f.fraction_bits - exponent));
  const double bits = units + std::ldexp(exponent - lowest, f.fraction_bits);
  return static_cast<uint16_t>(sign | static_cast<int>(std::min<double>(bits, f.infinity())));
}

double ulp(double x) {
  const int exponent = x == 0 ? -126 : std::max(std::ilogb(x), -126);
  return std::ldexp(1.0, exponent - 23);
}

namespace {

struct Options {
  bool list = false;
  std::string isa;
  std::vector<std::string> filters;

  bool wants(const Test& test) const {
    return filters.empty() || std::any_of(filters.begin(), filters.end(), [&](const auto& filter) {
             return test.name.find(filter) != std::string::npos;
           });
  }
};

Options parse(int count, char** arguments) {
  Options options;
  for (int i = 1; i < count; ++i) {
    const std::string argument = arguments[i];
    if (argument == "--list") {
      options.list = true;
    } else if (argument == "--slow") {
      slow_chosen = true;
    } else if (argument.rfind("--isa=", 0) == 0) {
      options.isa = argument.substr(6);
    } else if (argument.rfind("-", 0) == 0) {
      std::printf("usage: cpp_tests [--list] [--slow] [--isa=NAME] [PART OF A TEST'S NAME]...\n");
      std::exit(argument == "--help" ? 0 : 2);
    } else {
      options.filters.push_back(argument);
    }
  }
  return options;
}

// The number of tests that failed, or -1 if none was chosen.
int run_isa(const std::string& isa, const Options& options) {
  cpu::select_isa(isa);
  int count = 0, failed = 0;
  for (const Test& test : tests()) {
    if ((test.isa != nullptr && isa != test.isa) || !options.wants(test)) continue;
    ++count;
    if (options.list) {
      std::printf("%s %s\n", isa.c_str(), test.name.c_str());
      continue;
    }
    failures = 0;
    random_state = 0;
    test.run();
    if (failures == 0) continue;
    ++failed;
    std::printf("FAILED %s on %s: %d checks\n", test.name.c_str(), isa.c_str(), failures);
  }
  if (!options.list) std::printf("%s: %d tests, %d failed\n", isa.c_str(), count, failed);
  std::fflush(stdout);
  return count == 0 ? -1 : failed;
}

int run(const Options& options) {
  int failed = 0, chosen = 0;
  std::sort(tests().begin(), tests().end(),
            [](const Test& a, const Test& b) { return a.name < b.name; });
  for (const std::string& isa : cpu::available_isas()) {
    if (!options.isa.empty() && isa != options.isa) continue;
    const int result = run_isa(isa, options);
    if (result < 0) continue;
    ++chosen;
    failed += result;
  }
  if (chosen == 0) std::printf("no test has that name, or this machine no such instruction set\n");
  return chosen == 0 || failed > 0 ? 1 : 0;
}

}  // namespace
}  // namespace pyfuse::test

int main(int count, char** arguments) {
  setvbuf(stdout, nullptr, _IOLBF, 1 << 12);  // a crash must not take the last lines with it
  return pyfuse::test::run(pyfuse::test::parse(count, arguments));
}
