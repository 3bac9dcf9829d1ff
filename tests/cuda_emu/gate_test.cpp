// gate.cu on the emulator against the definition: every dtype, activation and modifier, layouts,
// tails, special values.
//
// Bounds: as activation.cuh derives them, with arithmetic in f32 (f64 for f64), exactly widened
// inputs and one rounding (check.h).
#include "check.h"
#include "gate.cu"

using namespace check;

namespace {

template <typename T> struct Kernels;
#define KERNELS(NAME, T)                                   \
  template <> struct Kernels<T> {                          \
    static constexpr const char* name = #NAME;             \
    static constexpr auto forward = gate_forward_##NAME;   \
    static constexpr auto backward = gate_backward_##NAME; \
  };
KERNELS(f32, float)
KERNELS(f16, f16)
KERNELS(bf16, bf16)
KERNELS(f64, double)

const float INF = INFINITY;
// activation, beta, multiplier, limit, offset
const GluParams OPS[] = {{SILU, 0, 1, INF, 0},        {SWISH, 1.702f, 1, INF, 0}, {SWISH, -0.5f, 1, INF, 0}, {SWISH, 3, 1, INF, 0},
                     {SIGMOID, 0, 1, INF, 0},     {RELU, 0, 1, INF, 0},       {GELU, 0, 1, INF, 0},      {GELU_TANH, 0, 1, INF, 0},
                     {IDENTITY, 0, 1, INF, 0},    {SWISH, 1.702f, 1, 7, 1},   {SILU, 0, 0.5f, INF, 0},   {GELU, 0, 1, 7, 0},
                     {GELU_TANH, 0, 2, INF, 0.5f}, {RELU, 0, 1, 7, 0},        {SIGMOID, 0, -1, 2, -1},   {IDENTITY, 0, 1, 7, 1},
                     {RELU2, 0, 1, INF, 0},       {RELU2, 0, 0.5f, 3, 1}};

// A matrix whose rows are `stride` apart (0: one row for all), `shift` elements after an address
// that is a multiple of 16.
template <typename T> struct Matrix {
  long long stride;
  Buffer<T> buffer;
  Matrix(long long rows, long long cols, long long stride, size_t shift = 0)
      : stride(stride), buffer(size_t((rows - 1) * stride + cols), 16, shift) {}
  T& at(long long r, long long c) { return buffer.data[r * stride + c]; }
};

// Checks the errors of the gradients in R, in this order: dgate, dup.
template <typename T> std::array<bool, 2> gradients_close(const GluParams& op, Wide gate, Wide up, Wide dy, T dgate, T dup) {
  using R = Real<T>;
  const Wide u = sizeof(R) == 8 ? Wide(U64) : Wide(U), m = op.gate_multiplier;
  const Pair p = pair_of(op, gate, up);
  const Slope a = activation(op, p.gate);
  const Wide moved = m == 1 ? 0 : u * fabsl(p.gate), n = units<R>(op, p.gate) + 6;
  const Wide want_gate = p.gate_within ? m * dy * p.up * a.slope : 0, want_up = p.up_within ? dy * a.value : 0;
  const Wide slope_error = n * u * a.mass + bend(op) * moved;
  const Wide gate_error = fabsl(m * dy) * (fabsl(p.up) * (slope_error + 4 * u * fabsl(a.slope)) + u * fabsl(p.up * a.slope)) + 0x1p-120L;
  const Wide up_error = fabsl(dy) * (n * u * fabsl(a.value) + steepest(op, p.gate, moved) * moved) + 0x1p-120L;
  return {close(dgate, want_gate, p.gate_within ? gate_error : 0), close(dup, want_up, p.up_within ? up_error : 0)};
}

template <typename T> struct Case {
  long long rows, cols;
  Matrix<T> gate, up, dy, out, dgate, dup;
  Buffer<T> b_gate, b_up;
  Case(long long rows, long long cols, long long in_stride, long long out_stride, size_t shift)
      : rows(rows), cols(cols), gate(rows, cols, in_stride, shift), up(rows, cols, in_stride, shift), dy(rows, cols, cols, shift),
        out(rows, cols, out_stride, shift), dgate(rows, cols, out_stride, shift), dup(rows, cols, out_stride, shift),
        b_gate(cols, 16), b_up(cols, 16) {
    gate.buffer.fill(4);
    up.buffer.fill(2);
    dy.buffer.fill(1);
    b_gate.fill(1);
    b_up.fill(1);
  }
  // Checks that everything outside of the (rows, cols) of an output is unchanged.
  static bool gaps_untouched(Matrix<T>& m, long long cols) {
    bool ok = m.buffer.surroundings_untouched();
    for (size_t i = 0; i < m.buffer.n; ++i)
      if (m.stride > cols && (long long)i % m.stride >= cols) {
        const uint8_t* const bytes = reinterpret_cast<const uint8_t*>(m.buffer.data + i);
        for (size_t b = 0; b < sizeof(T); ++b) ok &= bytes[b] == 0xff;
      }
    return ok;
  }
  void forward(const GluParams& op, bool with_b_gate, bool with_b_up, int grid) {
    const T *bg = with_b_gate ? b_gate.data : nullptr, *bu = with_b_up ? b_up.data : nullptr;
    out.buffer.poison();
    emu::launch(grid, 256, 1, 0, seed(), [&] {
      Kernels<T>::forward(gate.buffer.data, up.buffer.data, bg, bu, out.buffer.data, rows, cols, gate.stride, up.stride, out.stride, op);
    });
    const Wide u = sizeof(Real<T>) == 8 ? Wide(U64) : Wide(U);
    bool ok = true;
    for (long long r = 0; r < rows; ++r)
      for (long long c = 0; c < cols; ++c) {
        const Wide g = value(gate.at(r, c)) + (bg ? Wide(value(bg[c])) : 0), v = value(up.at(r, c)) + (bu ? Wide(value(bu[c])) : 0);
        ok &= close(out.at(r, c), glu(op, g, v), glu_error<Real<T>>(op, g, v, bg ? u * fabsl(g) : 0, bu ? u * fabsl(v) : 0));
      }
    report(ok, "out differs from the definition");
    report(gaps_untouched(out, cols), "written beyond out");
  }
  void backward(const GluParams& op, int grid) {
    dgate.buffer.poison();
    dup.buffer.poison();
    emu::launch(grid, 256, 1, 0, seed(), [&] {
      Kernels<T>::backward(gate.buffer.data, up.buffer.data, dy.buffer.data, dgate.buffer.data, dup.buffer.data, rows, cols, gate.stride,
                       up.stride, dy.stride, dgate.stride, dup.stride, op);
    });
    bool gate_ok = true, up_ok = true;
    for (long long r = 0; r < rows; ++r)
      for (long long c = 0; c < cols; ++c) {
        const auto ok = gradients_close<T>(op, value(gate.at(r, c)), value(up.at(r, c)), value(dy.at(r, c)), dgate.at(r, c), dup.at(r, c));
        gate_ok &= ok[0];
        up_ok &= ok[1];
      }
    report(gate_ok, "dgate differs from the definition");
    report(up_ok, "dup differs from the definition");
    report(gaps_untouched(dgate, cols) && gaps_untouched(dup, cols), "written beyond the gradients");
  }
};

template <typename T> void layouts() {
  begin_group((std::string("gate ") + Kernels<T>::name + ": layouts and tails").c_str());
  const long long V = 16 / sizeof(T);
  int i = 0;
  for (const long long cols : {1LL, V - 1, V, V + 1, 3 * V + 5, 8 * V})
    for (const long long rows : {1LL, 2LL, 5LL})
      for (const int layout : {0, 1, 2, 3}) {
        // Contiguous; halves of (rows, 2·cols); one row for all; not 16-byte aligned.
        const long long in = layout == 1 ? 2 * cols : layout == 2 ? 0 : cols, out = layout == 1 ? cols + V : cols;
        if (cols < 1) continue;
        current = std::string("layout ") + std::to_string(layout) + " rows " + std::to_string(rows) + " cols " + std::to_string(cols);
        Case<T> c(rows, cols, in, out, layout == 3 ? 1 : 0);
        c.forward(OPS[i % 16], i & 1, i & 2, 1 + i % 3);
        c.backward(OPS[i % 16], 1 + i % 2);
        ++i;
      }
  current = "more packs than threads";
  Case<T> c(37, 16 * V + 3, 16 * V + 3, 16 * V + 3, 0);
  for (const int grid : {1, 2}) {
    c.forward(OPS[0], true, true, grid);
    c.backward(OPS[0], grid);
  }
}

template <typename T> void every_operation() {
  begin_group((std::string("gate ") + Kernels<T>::name + ": activations and modifiers").c_str());
  for (const GluParams& op : OPS) {
    current = "activation " + std::to_string(op.activation) + " m " + std::to_string(op.gate_multiplier) + " limit " +
              std::to_string(op.limit);
    Case<T> c(64, 40, 40, 40, 0);
    const size_t n = c.gate.buffer.n;
    for (size_t i = 0; i < n; ++i) c.gate.buffer.data[i] = number<T>(-20 + 40.0 * double(i) / double(n));
    c.forward(op, false, false, 1);
    c.backward(op, 1);
    Case<T> d(16, 40, 40, 40, 0);
    d.forward(op, true, true, 1);
  }
}

// All pairs of the values at which the formula changes, infinities, NaN, zeros, and the smallest
// and largest numbers.
template <typename T> void special_values() {
  begin_group((std::string("gate ") + Kernels<T>::name + ": special values").c_str());
  const double largest = std::is_same<T, f16>::value ? 65504 : sizeof(T) == 8 ? 1.7e308 : 3e38;
  const double values[] = {0.0, -0.0, INFINITY, -INFINITY, NAN,  7,   -7,   1e-30, -1e-30,  16,       -16, 20,
                           -20, 88,   -88,      104,       -104, 800, -800, largest, -largest, 1,   -1};
  const int n = int(sizeof values / sizeof *values);
  for (const GluParams& op : OPS) {
    current = "activation " + std::to_string(op.activation) + " beta " + std::to_string(op.beta) + " limit " +
              std::to_string(op.limit);
    Case<T> c(n, n, n, n, 0);
    for (int i = 0; i < n; ++i)
      for (int j = 0; j < n; ++j) {
        c.gate.at(i, j) = number<T>(values[i]);
        c.up.at(i, j) = number<T>(values[j]);
        c.dy.at(i, j) = number<T>(1);
      }
    c.out.buffer.poison();
    emu::launch(1, 256, 1, 0, seed(), [&] {
      Kernels<T>::forward(c.gate.buffer.data, c.up.buffer.data, nullptr, nullptr, c.out.buffer.data, n, n, n, n, n, op);
    });
    emu::launch(1, 256, 1, 0, seed(), [&] {
      Kernels<T>::backward(c.gate.buffer.data, c.up.buffer.data, c.dy.buffer.data, c.dgate.buffer.data, c.dup.buffer.data, n, n, n, n, n,
                       n, n, op);
    });
    bool ok = true, grad_ok = true;
    for (int i = 0; i < n; ++i)
      for (int j = 0; j < n; ++j) {
        const Wide g = value(c.gate.at(i, j)), u = value(c.up.at(i, j)), want = glu(op, g, u);
        const double have = value(c.out.at(i, j));
        const Wide error = glu_error<Real<T>>(op, g, u, 0, 0);
        // m·gate beyond the largest number is infinite in R, but possibly finite in the definition.
        const bool overflow = std::isfinite(double(g)) && fabsl(op.gate_multiplier * g) > largest;
        // The same holds for a square beyond the numbers of R: then ∞·0 and 0·∞ are NaN, and 0·up
        // is 0.
        const Wide act = activation(op, pair_of(op, g, u).gate).value;
        const bool f64 = sizeof(Real<T>) == 8;
        const bool beyond = op.activation == RELU2 && std::isfinite(double(g)) && act > 0 &&
                            (act > (f64 ? 1.797e308L : 3.4e38L) || act < (f64 ? 0x1p-1074L : 0x1p-149L));
        const bool vanished = beyond && (have != have ? u == 0 || std::isinf(double(u)) : act < 1 && have == 0);
        const bool fine = overflow || vanished || close(c.out.at(i, j), want, std::isfinite(double(want)) && error == error ? error : 0);
        if (!fine && ok) printf("  gate %g up %g: %g, not %Lg\n", double(g), double(u), have, want);
        ok &= fine;
        // Where everything is finite and small enough, the gradients are within their bounds. Where
        // the exact gradient is NaN, the result must be NaN.
        const Pair p = pair_of(op, g, u);
        const Slope a = activation(op, p.gate);
        const Wide want_gate = p.gate_within ? Wide(op.gate_multiplier) * p.up * a.slope : 0, want_up = p.up_within ? a.value : 0;
        const double have_gate = value(c.dgate.at(i, j)), have_up = value(c.dup.at(i, j));
        const bool finite = fabsl(g) < 1e4 && fabsl(u) < 1e4;
        if (finite) {
          const auto both = gradients_close<T>(op, g, u, 1, c.dgate.at(i, j), c.dup.at(i, j));
          grad_ok &= both[0] && both[1];
        } else if (!beyond && (std::isfinite(double(g)) || op.activation != GELU_TANH)) {
          grad_ok &= (want_gate != want_gate) == (have_gate != have_gate) && (want_up != want_up) == (have_up != have_up);
        }
      }
    report(ok, "out of a special value");
    report(grad_ok, "gradient of a special value");
    // silu(-inf)·1 is -0
    if (op.activation == SILU && op.gate_multiplier == 1) {
      const double zero = value(c.out.at(3, 21));
      report(zero == 0 && std::signbit(zero), "silu(-inf) is not -0");
    }
  }
}

template <typename T, typename Kernel> void bias(const char* name, Kernel kernel) {
  begin_group((std::string("bias_rows ") + name).c_str());
  for (const long long cols : {1LL, 7LL, 8LL, 9LL, 64LL, 67LL})
    for (const size_t shift : {size_t(0), size_t(1)}) {
      current = "cols " + std::to_string(cols);
      const long long rows = 5;
      Buffer<T> b(cols, 16), y(rows * cols, 16, shift);
      b.fill(1);
      emu::launch(2, 256, 1, 0, seed(), [&] { kernel(b.data, y.data, rows, cols); });
      bool ok = y.surroundings_untouched();
      for (long long i = 0; i < rows * cols; ++i) ok &= memcmp(&y.data[i], &b.data[i % cols], sizeof(T)) == 0;
      report(ok, "not the bias");
    }
}

template <typename T> void all() {
  vanished = sizeof(T) == 8 ? 0x1p-1075L : 0x1p-150L;
  layouts<T>();
  every_operation<T>();
  special_values<T>();
}

}  // namespace

int main() {
  signal(SIGSEGV, on_segv);
  all<float>();
  all<f16>();
  all<bf16>();
  all<double>();
  bias<float>("f32", bias_rows_f32);
  bias<f16>("f16", bias_rows_f16);
  bias<bf16>("bf16", bias_rows_bf16);
  return summary();
}
