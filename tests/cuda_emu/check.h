// Shared by the tests of the kernels: buffers with guarded ends, the definition of the block in
// long double, and the counts of results.
#pragma once
#include <signal.h>
#include <sys/mman.h>
#include <unistd.h>

#include <cmath>
#include <string>

#include "activation.cuh"

namespace check {

constexpr double U = 0x1p-24, U64 = 0x1p-53;  // half a unit in the last place of 1 in f32 and f64

// ------------------------------------------------------------------------------ bookkeeping

inline int passed = 0, failed = 0, group_passed = 0, group_failed = 0;
inline std::string group, current;

inline void end_group() {
  if (!group.empty()) printf("%-44s %6d passed, %d failed\n", group.c_str(), group_passed, group_failed);
  fflush(stdout);
  group_passed = group_failed = 0;
}
inline void begin_group(const char* name) {
  end_group();
  group = name;
}
inline void report(bool ok, const std::string& what) {
  if (ok) ++passed, ++group_passed;
  else if (++failed, ++group_failed <= 3) printf("  FAILED %s: %s\n", current.c_str(), what.c_str());
}
inline void on_segv(int) {
  static const char text[] = "FAULT access outside of a buffer\n";
  if (write(1, text, sizeof text - 1) < 0) {
  }
  _exit(4);
}
inline int summary() {
  end_group();
  printf("%d passed, %d failed\n", passed, failed);
  return failed ? 1 : 0;
}

// --------------------------------------------------------------------------- random numbers

inline std::mt19937 random(20260101);
inline unsigned seed() { return unsigned(random()); }
template <typename T> T number(double v) {
  if constexpr (sizeof(T) == 8) return v;
  else return T(float(v));
}
inline double value(double v) { return v; }
template <typename T> double value(T v) { return double(widen(v)); }
inline double gauss(double scale) { return std::normal_distribution<>(0, scale)(random); }

// ---------------------------------------------------------------------------------- buffers

// n elements that end at an inaccessible page, or as close to it as `align` allows. The bytes
// around them are checked or NaN.
template <typename T> class Buffer {
  uint8_t* map = nullptr;
  size_t bytes = 0;
  static constexpr size_t PAGE = 4096;

 public:
  T* data = nullptr;
  size_t n = 0;
  // The first element is `shift` elements after an aligned address.
  explicit Buffer(size_t n, size_t align = 16, size_t shift = 0) : n(n) {
    const size_t used = n * sizeof(T) + align;
    bytes = (used + PAGE - 1) / PAGE * PAGE + 2 * PAGE;
    map = static_cast<uint8_t*>(mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0));
    if (map == MAP_FAILED) emu::fault("no memory");
    mprotect(map, PAGE, PROT_NONE);
    mprotect(map + bytes - PAGE, PAGE, PROT_NONE);
    memset(map + PAGE, 0xff, bytes - 2 * PAGE);
    uint8_t* const end = map + bytes - PAGE;
    data = reinterpret_cast<T*>(end - (n + shift) * sizeof(T) - (size_t(uintptr_t(end) - (n + shift) * sizeof(T)) % align)) + shift;
  }
  Buffer(const Buffer&) = delete;
  ~Buffer() { munmap(map, bytes); }
  void fill(double scale) {
    for (size_t i = 0; i < n; ++i) data[i] = number<T>(gauss(scale));
  }
  void poison() { memset(static_cast<void*>(data), 0xff, n * sizeof(T)); }
  std::vector<T> copy() const { return std::vector<T>(data, data + n); }
  bool same(const std::vector<T>& other) const { return memcmp(data, other.data(), n * sizeof(T)) == 0; }
  bool surroundings_untouched() const {
    const uint8_t *first = reinterpret_cast<const uint8_t*>(data), *last = reinterpret_cast<const uint8_t*>(data + n);
    for (const uint8_t* p = map + PAGE; p < map + bytes - PAGE; ++p)
      if ((p < first || p >= last) && *p != 0xff) return false;
    return true;
  }
};

// --------------------------------------------------------------------------- the definition

using Wide = long double;

struct Slope {
  Wide value, slope, mass;  // act(g); act'(g); the sum of the magnitudes of the terms of act'
};

// A tail below this is 0. It is half the smallest number of the type in which the kernel computes.
inline Wide vanished = 0x1p-150L;

inline Slope activation(const GluParams& op, Wide g) {
  const auto kept = [](Wide s) { return fabsl(s) < vanished ? 0 : s; };
  const auto sigma = [&](Wide z) { return kept(z < 0 ? expl(z) / (1 + expl(z)) : 1 / (1 + expl(-z))); };
  const auto bounded = [](Wide x, Wide bound) { return x > bound ? bound : x < -bound ? -bound : x; };
  const auto tail = [&](Wide s) { return s == 0 ? -0.0L : g * s; };
  const Wide beta = op.activation == SILU ? 1 : Wide(op.beta), K = sqrtl(8 / acosl(-1)), x = bounded(g, 60);
  switch (Activation(op.activation)) {
    case SILU:
    case SWISH: {
      const Wide z = bounded(beta * g, 2000), s = sigma(z), rest = z * s * sigma(-z);
      return {tail(s), s + rest, s + fabsl(rest)};
    }
    case SIGMOID: {
      const Wide z = bounded(g, 2000), ds = sigma(z) * sigma(-z);
      return {sigma(z), ds, ds};
    }
    case RELU: return g <= 0 ? Slope{0, 0, 0} : Slope{g, 1, 1};
    case GELU: {
      const Wide cdf = kept(erfcl(-x / sqrtl(2)) / 2), rest = x * kept(expl(-x * x / 2) / sqrtl(2 * acosl(-1)));
      return {tail(cdf), cdf + rest, cdf + fabsl(rest)};
    }
    case GELU_TANH: {
      const Wide z = K * (x + 0.044715L * x * x * x), s = sigma(z), rest = x * K * (1 + 3 * 0.044715L * x * x) * s * sigma(-z);
      return {tail(s), s + rest, s + fabsl(rest)};
    }
    case IDENTITY: return {g, 1, 1};
    case RELU2: return g <= 0 ? Slope{0, 0, 0} : Slope{g * g, 2 * g, 2 * g};
  }
  return {NAN, NAN, NAN};
}

struct Pair {
  Wide gate, up;  // what act and the product take
  bool gate_within, up_within;
};
inline Pair pair_of(const GluParams& op, Wide gate, Wide up) {
  const Wide limit = op.limit, g = Wide(op.gate_multiplier) * gate;
  const bool none = std::isinf(op.limit);
  const bool gate_out = !none && g >= limit, up_out = !none && fabsl(up) >= limit;
  const Wide u = none ? up : up >= limit ? limit : up <= -limit ? -limit : up;
  return {gate_out ? limit : g, op.up_offset == 0 ? u : u + Wide(op.up_offset), !gate_out, !up_out};
}
inline Wide glu(const GluParams& op, Wide gate, Wide up) {
  const Pair p = pair_of(op, gate, up);
  return activation(op, p.gate).value * p.up;
}

// ----------------------------------------------------------------------------------- bounds

// Relative error of act(g) in units, as activation.cuh derives it, including the unit of the
// product. In f64 the rounding of the exponent's argument adds |z| units, that of erfc's argument
// g² units.
template <typename R> Wide units(const GluParams& op, Wide g) {
  const Wide a = fabsl(g), v = std::min<Wide>(2000, fabsl(1.5957691L * (a + 0.044715L * a * a * a)));
  switch (op.activation) {
    case SILU: return 10 + (sizeof(R) == 8 ? a : 0);
    case SWISH: return 10 + fabsl(Wide(op.beta)) * a;
    case SIGMOID: return 10;
    case GELU: return 16 + (sizeof(R) == 8 ? 2 * std::min<Wide>(a, 40) * std::min<Wide>(a, 40) : 0);
    case GELU_TANH: return 10 + 4 * v;
    default: return op.activation == RELU2 ? 3 : 2;
  }
}

// |act'| within `moved` of g: 1.0998 for Swish, 1.129 for GELU
inline Wide steepest(const GluParams& op, Wide g, Wide moved) { return op.activation == RELU2 ? 2 * (fabsl(g) + moved) : 1.13L; }
// |act''|: 0.5·β for Swish, 2·φ(0) = 0.80 for GELU, less than 1 for its tanh form
inline Wide bend(const GluParams& op) { return op.activation == SWISH ? std::max(1.0f, fabsf(op.beta)) : op.activation == RELU2 ? 2.0f : 1.0f; }

// At most half a unit in the last place of y in T.
template <typename T> Wide rounding(Wide y) {
  const Wide a = fabsl(y);
  if (sizeof(T) == 8) return a * Wide(U64);
  if (sizeof(T) == 4) return a * Wide(U) + 0x1p-150L;
  if (std::is_same<T, bf16>::value) return a * 0x1p-8L + 0x1p-134L;
  return a * 0x1p-11L + 0x1p-25L;
}

// The largest error of glu(gate, up) computed in R, for errors `dg` and `du` of gate and up.
template <typename R> Wide glu_error(const GluParams& op, Wide gate, Wide up, Wide dg, Wide du) {
  const Wide u = sizeof(R) == 8 ? Wide(U64) : Wide(U);
  const Pair p = pair_of(op, gate, up);
  const Wide a = activation(op, p.gate).value, m = fabsl(Wide(op.gate_multiplier));
  const Wide moved_gate = m * dg + (op.gate_multiplier == 1 ? 0 : u * fabsl(p.gate));
  const Wide moved_up = du + (op.up_offset == 0 ? 0 : u * fabsl(p.up));
  return steepest(op, p.gate, moved_gate) * moved_gate * (fabsl(p.up) + moved_up) + fabsl(a) * moved_up + units<R>(op, p.gate) * u * fabsl(a * p.up) + 0x1p-120L;
}

// Whether y can be the rounding to T of a value within `error` of `want`.
template <typename T> bool close(T y, Wide want, Wide error) {
  const Wide have = value(y);
  if (want != want) return have != have;
  const Wide largest = sizeof(T) == 8 ? 1.7976931348623157e308L : std::is_same<T, f16>::value ? 65504.0L : 3.38e38L;
  if (have != have) return false;
  if (fabsl(want) > largest * 0.99L) return std::isinf(double(have)) ? (have > 0) == (want > 0) : fabsl(want) < largest * 1.01L;
  return fabsl(have - want) <= error + rounding<T>(fabsl(want) + error);
}

}  // namespace check
