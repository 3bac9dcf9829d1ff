// A model of the CUDA driver, cuBLAS and cuRAND on the CPU, sufficient to run the Rust tests of
// tests/cuda without a GPU.
//
// It runs no kernel code: each kernel is computed by its contract in src/cuda/README.md, in plain
// loops (tests/cuda_emu runs the code itself against the same contract). The model tests the host
// code: the kernel of each launch with its grid, arguments, strides and alignment, allocations and
// their lifetimes, the conventions of cuBLAS, and that nothing waits.
//
// 1. Streams keep the queued work and run it only when the host waits for them. This reveals a
//    tensor that is freed too early, and a wait in `forward`.
// 2. Memory is initialised with NaN. Every operand of every operation must be inside one live
//    allocation.
// 3. A violated condition prints a line and ends the process.
#pragma once
#include <cstdarg>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <string>
#include <vector>

[[noreturn, gnu::format(printf, 1, 2)]] inline void fail(const char* format, ...) {
  va_list args;
  va_start(args, format);
  fputs("CUDA model: ", stderr);
  vfprintf(stderr, format, args);
  fputc('\n', stderr);
  va_end(args);
  _exit(70);
}
#define REQUIRE(condition, ...) \
  do {                          \
    if (!(condition)) fail(__VA_ARGS__); \
  } while (0)

// ---- elements

enum class Type { F32, F64, F16, BF16 };

inline size_t size_of(Type t) { return t == Type::F64 ? 8 : t == Type::F32 ? 4 : 2; }

inline double read_element(Type t, const void* base, size_t i) {
  switch (t) {
    case Type::F64: return static_cast<const double*>(base)[i];
    case Type::F32: return static_cast<const float*>(base)[i];
    case Type::F16: return static_cast<double>(static_cast<const _Float16*>(base)[i]);
    case Type::BF16: {
      const uint32_t bits = uint32_t(static_cast<const uint16_t*>(base)[i]) << 16;
      float value;
      memcpy(&value, &bits, 4);
      return value;
    }
  }
  fail("no such type");
}

inline void write_element(Type t, void* base, size_t i, double wide) {
  const float value = static_cast<float>(wide);
  switch (t) {
    case Type::F64: static_cast<double*>(base)[i] = wide; return;
    case Type::F32: static_cast<float*>(base)[i] = value; return;
    case Type::F16: static_cast<_Float16*>(base)[i] = static_cast<_Float16>(value); return;
    case Type::BF16: {
      uint32_t bits;
      memcpy(&bits, &value, 4);
      if (value == value) bits += 0x7fff + ((bits >> 16) & 1);
      static_cast<uint16_t*>(base)[i] = static_cast<uint16_t>(bits >> 16 | (value == value ? 0 : 0x40));
      return;
    }
  }
}

// ---- memory and streams (driver.cpp)

// The `bytes` bytes from `address` on, which must be live when the operation runs.
void* span(uint64_t address, size_t bytes, const char* what);

struct Operand {
  Type type;
  void* data;
  double at(size_t i) const { return read_element(type, data, i); }
  void put(size_t i, double value) const { write_element(type, data, i, value); }
};
inline Operand operand(Type type, uint64_t address, size_t elements, const char* what) {
  return {type, span(address, elements * size_of(type), what)};
}

using Work = std::function<void()>;
// Queues `work` on the stream, or adds it to the graph that is being captured.
void enqueue(void* stream, Work work);

// ---- kernels (kernels.cpp)

struct Launch {
  std::string name;
  unsigned grid, block, shared;
  bool early;
  void** arguments;
};
// The work of a launch, whose arguments are read now. Unknown names end the process.
Work kernel(const Launch& launch);
