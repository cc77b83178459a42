// Named tests and checks, no framework:
//
//   TEST(rows_are_sorted) { CHECK(a <= b, "row %d: %g > %g", row, a, b); }
//
// A new test is a new file. Those in tests/cpp/isa are compiled once per instruction set, as the
// kernels are, into pyfuse::cpu::<isa>, for what only such code can see (vec.h); those beside this
// header are compiled once, and run for each instruction set on cpu::kernels().
//
// Nothing here is an inline function: of those the linker may keep the AVX-512 copy for everyone.
#pragma once
#include <pyfuse/params.h>

namespace pyfuse::test {

// isa: the only instruction set to run it on; null: each in turn.
bool add_test(const char* isa, const char* file, const char* name, void (*run)());
void fail(const char* file, int line, const char* condition, const char* format, ...);

bool slow();           // --slow: sweeps take every float instead of a sample
double random_unit();  // in [-1, 1); the sequence begins anew with every test

// Memory of exactly `bytes` bytes, all 0xff: NaN in every type. An unreadable page follows it; the
// bytes before it are checked for writes when it is given back. Both see what AddressSanitizer does
// not: masked loads.
class Memory {
 public:
  explicit Memory(int64_t bytes);
  ~Memory();
  Memory(const Memory&) = delete;
  Memory& operator=(const Memory&) = delete;
  void* data() const;

 private:
  char *pages_, *data_;
  int64_t bytes_, mapped_;
};

// bf16 and f16 by arithmetic on their definition, independent of the kernels' bit tricks.
double from_half(uint16_t bits, DType dtype);
uint16_t to_half(double x, DType dtype);  // nearest, ties to even
double ulp(double x);                     // of float at x; below 2^-126 that of the subnormals

}  // namespace pyfuse::test

#define PYFUSE_TEXT_OF(x) #x
#define PYFUSE_TEXT(x) PYFUSE_TEXT_OF(x)
#if defined(PYFUSE_ISA)
#define PYFUSE_TEST_ISA PYFUSE_TEXT(PYFUSE_ISA)
#else
#define PYFUSE_TEST_ISA nullptr
#endif

#define TEST(name)                                                      \
  static void name();                                                   \
  [[maybe_unused]] static const bool name##_added =                     \
      ::pyfuse::test::add_test(PYFUSE_TEST_ISA, __FILE__, #name, name); \
  static void name()

// CHECK(condition) or CHECK(condition, "format", values...): goes on after a failure.
#define CHECK(condition, ...)                                                                \
  do {                                                                                       \
    if (!(condition)) ::pyfuse::test::fail(__FILE__, __LINE__, #condition, " " __VA_ARGS__); \
  } while (false)
