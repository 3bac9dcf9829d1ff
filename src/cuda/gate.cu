// The gate by itself, one pass over memory: `gate_forward` out = glu(gate + bg, up + bu),
// `gate_backward` its gradients, and rows filled with a bias.
//
// A thread computes V = 16 / sizeof(T) adjacent columns of a row at a time. It makes one 16-byte
// access per operand where all operands are 16-byte aligned, and V single accesses elsewhere and at
// the end of a row. Elements are widened, computed in f32 (f64 for f64) and rounded once. The
// kernels are bandwidth-bound: they move 3 elements per output forward, 5 per pair backward. At
// least 1024 threads · 2 loads · 16 B = 32 KiB are in flight per SM. SiLU in bf16 is about 20
// instructions for 6 bytes, some 60 % of what an H200 can issue while it moves them. The formula is
// therefore selected outside of the loop. These figures are estimates, not measurements.
#include "activation.cuh"

namespace {

// ----------------------------------------------------------------------------- device maths

template <typename T> constexpr int LANES = 16 / sizeof(T);

// V adjacent elements of T in the type they are computed in.
template <typename T> struct Pack {
  Real<T> v[LANES<T>];
};

// The first n of the elements at p; the others are 0.
template <typename T> DEVICE Pack<T> load_pack(const T* p, int n, bool vectors) {
  T raw[LANES<T>];
  if (vectors && n == LANES<T>) {
    const uint4 bits = load16(p);
    memcpy(raw, &bits, 16);
  } else {
#pragma unroll
    for (int i = 0; i < LANES<T>; ++i) raw[i] = i < n ? p[i] : T(0.0f);
  }
  Pack<T> pack;
#pragma unroll
  for (int i = 0; i < LANES<T>; ++i) pack.v[i] = widen(raw[i]);
  return pack;
}

template <typename T> DEVICE void store_pack(T* p, const Pack<T>& pack, int n, bool vectors) {
  T raw[LANES<T>];
#pragma unroll
  for (int i = 0; i < LANES<T>; ++i) raw[i] = Number<T>::narrow(pack.v[i]);
  if (vectors && n == LANES<T>) {
    uint4 bits;
    memcpy(&bits, raw, 16);
    store16(p, bits);
  } else {
#pragma unroll
    for (int i = 0; i < LANES<T>; ++i)
      if (i < n) p[i] = raw[i];
  }
}

// pack += bias, if there is a bias
template <typename T> DEVICE void add_bias(Pack<T>& pack, const T* bias, int n, bool vectors) {
  if (!bias) return;
  const Pack<T> b = load_pack(bias, n, vectors);
#pragma unroll
  for (int i = 0; i < LANES<T>; ++i) pack.v[i] += b.v[i];
}

// An operand supports 16-byte accesses: it starts on 16 bytes and its rows are a multiple of 16
// bytes apart.
template <typename T> DEVICE bool fits(const T* p, long long stride) { return on16(p) && stride % LANES<T> == 0; }

// Calls each(row, column, n) for this thread's packs of a (rows, cols) matrix. n elements of a pack
// are inside the row.
template <typename T, typename Each> DEVICE void for_packs(long long rows, long long cols, Each each) {
  const long long per_row = (cols + LANES<T> - 1) / LANES<T>, step = (long long)gridDim.x * blockDim.x;
  const long long first = (long long)blockIdx.x * blockDim.x + threadIdx.x;
  // One division for the position and one for the step, none in the loop.
  long long row = first / per_row, pack = first - row * per_row;
  const long long row_step = step / per_row, pack_step = step - row_step * per_row;
  while (row < rows) {
    const long long column = pack * LANES<T>;
    each(row, column, int(min((long long)LANES<T>, cols - column)));
    row += row_step;
    pack += pack_step;
    if (pack >= per_row) {
      pack -= per_row;
      row += 1;
    }
  }
}

template <typename T>
DEVICE void gate_forward(const T* gate, const T* up, const T* b_gate, const T* b_up, T* out, long long rows, long long cols,
                    long long gate_stride, long long up_stride, long long out_stride, GluParams op) {
  const bool vectors = fits(gate, gate_stride) && fits(up, up_stride) && fits(out, out_stride) && on16(b_gate) && on16(b_up);
  pdl_wait();
  pdl_launch();
  with_formula<Real<T>>(op, [&](auto formula) {
    for_packs<T>(rows, cols, [&](long long row, long long column, int n) {
      Pack<T> g = load_pack(gate + row * gate_stride + column, n, vectors);
      Pack<T> u = load_pack(up + row * up_stride + column, n, vectors);
      add_bias(g, b_gate ? b_gate + column : nullptr, n, vectors);
      add_bias(u, b_up ? b_up + column : nullptr, n, vectors);
#pragma unroll
      for (int i = 0; i < LANES<T>; ++i) g.v[i] = formula.value(g.v[i], u.v[i]);
      store_pack(out + row * out_stride + column, g, n, vectors);
    });
  });
}

template <typename T>
DEVICE void gate_backward(const T* gate, const T* up, const T* dy, T* dgate, T* dup, long long rows, long long cols,
                     long long gate_stride, long long up_stride, long long dy_stride, long long dgate_stride,
                     long long dup_stride, GluParams op) {
  const bool vectors = fits(gate, gate_stride) && fits(up, up_stride) && fits(dy, dy_stride) && fits(dgate, dgate_stride) &&
                       fits(dup, dup_stride);
  pdl_wait();
  pdl_launch();
  with_formula<Real<T>>(op, [&](auto formula) {
    for_packs<T>(rows, cols, [&](long long row, long long column, int n) {
      Pack<T> g = load_pack(gate + row * gate_stride + column, n, vectors);
      Pack<T> u = load_pack(up + row * up_stride + column, n, vectors);
      const Pack<T> d = load_pack(dy + row * dy_stride + column, n, vectors);
#pragma unroll
      for (int i = 0; i < LANES<T>; ++i) {
        const Gradients<Real<T>> gradients = formula.gradients(g.v[i], u.v[i], d.v[i]);
        g.v[i] = gradients.gate;
        u.v[i] = gradients.up;
      }
      store_pack(dgate + row * dgate_stride + column, g, n, vectors);
      store_pack(dup + row * dup_stride + column, u, n, vectors);
    });
  });
}

template <typename T> DEVICE void bias_rows(const T* bias, T* y, long long rows, long long cols) {
  const bool vectors = fits(bias, 0) && fits(y, cols);
  pdl_wait();
  pdl_launch();
  for_packs<T>(rows, cols, [&](long long row, long long column, int n) {
    store_pack(y + row * cols + column, load_pack(bias + column, n, vectors), n, vectors);
  });
}

}  // namespace

// ---------------------------------------------------------------------------------- kernels

#define GATE_KERNELS(NAME, T)                                                                                                  \
  extern "C" __global__ void __launch_bounds__(256) gate_forward_##NAME(                                                           \
      const T* gate, const T* up, const T* b_gate, const T* b_up, T* out, long long rows, long long cols,                     \
      long long gate_stride, long long up_stride, long long out_stride, GluParams op) {                                           \
    gate_forward<T>(gate, up, b_gate, b_up, out, rows, cols, gate_stride, up_stride, out_stride, op);                              \
  }                                                                                                                           \
  extern "C" __global__ void __launch_bounds__(256) gate_backward_##NAME(                                                          \
      const T* gate, const T* up, const T* dy, T* dgate, T* dup, long long rows, long long cols, long long gate_stride,       \
      long long up_stride, long long dy_stride, long long dgate_stride, long long dup_stride, GluParams op) {                     \
    gate_backward<T>(gate, up, dy, dgate, dup, rows, cols, gate_stride, up_stride, dy_stride, dgate_stride, dup_stride, op);       \
  }
#define BIAS_KERNEL(NAME, T)                                                                                                  \
  extern "C" __global__ void __launch_bounds__(256) bias_rows_##NAME(const T* bias, T* y, long long rows, long long cols) {   \
    bias_rows<T>(bias, y, rows, cols);                                                                                        \
  }

GATE_KERNELS(f32, float)
GATE_KERNELS(f16, f16)
GATE_KERNELS(bf16, bf16)
GATE_KERNELS(f64, double)
BIAS_KERNEL(f32, float)
BIAS_KERNEL(f16, f16)
BIAS_KERNEL(bf16, bf16)
