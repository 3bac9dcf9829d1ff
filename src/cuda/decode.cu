// The block for few rows, M ≤ 32: `gate_up` h = glu(x·Wgᵀ + bg, x·Wuᵀ + bu) and `linear` y = (x·Wᵀ
// + b)·factor.
//
// Decode is bandwidth-bound: it takes as long as one read of the weights, so the design keeps loads
// of them in flight.
//
// mma (bf16, f16): the weights are the 16-row A operand of mma.m16n8k16, the tokens its 8-column B
// operand. A dot product does not depend on the order of k. Lane 4g + t therefore feeds the tensor
// core the 8 consecutive k of one 16-byte load, the same k for both operands, and no shared memory,
// shuffle or ldmatrix is needed. A tile is 16 rows of A:
//   gate_up: rows 0..7 are 8 features of gate, rows 8..15 the same features of up (in one thread);
//   linear: 16 features.
// The warps of a block split K: in each round a warp reads 128 k. A block thus reads 2 or 4 KiB of
// a row at a time, which DRAM handles well. (With one warp per tile, 256 B of a row at a time, an
// H200 reads at 0.85 of its bandwidth.) Blocks are persistent, two of 8 warps per multiprocessor.
// The loads of the next tile are in flight while the partial sums of this one go through shared
// memory to the epilogue, which adds them in the order of the warps. There are no atomics, so
// results are bit-identical from run to run and for any number of rows. Blocks of 16 warps (w16)
// are used where there are no more tiles than multiprocessors. All of x that a register tile of
// weights needs is loaded before its first product. Loads between the products stalled on L2 once
// each, which cost 8 % of the time with 16 rows.
//
// fma (f32, and the shapes of bf16 and f16 that mma does not support): CUDA cores. A warp computes
// 4 rows of weights: 2 features of gate and the same 2 of up, or 4 features. Its lanes split k: 16
// bytes per load in f32, single elements where rows are not 16-byte aligned. A butterfly of 31
// shuffles reduces every 32 sums at the end.
//
// There are two register tiles: while one is multiplied, the loads of the other are in flight. mma:
// a tile is 4 KiB per warp, so 64 to 128 KiB per multiprocessor are in flight (half of that in n4).
// By Little's law an H200 needs 4.5 TB/s · 1 µs / 132 = 34 KiB. fma: 2 to 4 KiB per warp (n1).
// Tensor cores are used for M > 1 because at M = 8 the products alone are 17 T FMA/s, and the CUDA
// cores reach about 33.
//
// The first tile of weights is loaded before pdl_wait, while the previous kernel ends.
#include "activation.cuh"

namespace {

// ----------------------------------------------------------------------------- device maths

// Calls use(tile, i) for i in 0..steps, in order. With AHEAD the loads are one tile ahead. The
// first tile is loaded before pdl_wait.
template <typename Tile, bool AHEAD = true, typename Load, typename Use> DEVICE void sweep(int steps, Load load, Use use) {
  Tile even;
  if (steps > 0) load(even, 0);
  pdl_wait();
  pdl_launch();
  if constexpr (AHEAD) {
    Tile odd;
#pragma unroll 1
    for (int i = 0; i < steps; i += 2) {
      const bool more = i + 1 < steps;
      if (more) load(odd, i + 1);
      use(even, i);
      if (i + 2 < steps) load(even, i + 2);
      if (more) use(odd, i + 1);
    }
  } else {
#pragma unroll 1
    for (int i = 0; i < steps; ++i) {
      if (i > 0) load(even, i);
      use(even, i);
    }
  }
}

constexpr int CHUNK = 64;        // k of a chunk: 2 loads x 4 lanes x 8 elements
constexpr int RUN = 2 * CHUNK;   // a warp's part of a round
// Chunks of a register tile: 2 · 2 loads · 2 halves of A · 512 B = 4 KiB per warp, or half of that
// where the accumulators of 32 tokens need the registers.
template <int NT> constexpr int PER_TILE = NT == 4 ? 1 : 2;

// The part of A that one load of each row fills: 8 k of row g and of row g+8.
struct Piece {
  uint4 a, b;
};
template <int NT> struct MmaTile {
  Piece piece[PER_TILE<NT>][2];
};

template <typename T, int NT> struct MmaSums {
  float d[NT][4];
  DEVICE void clear() {
#pragma unroll
    for (int nt = 0; nt < NT; ++nt) d[nt][0] = d[nt][1] = d[nt][2] = d[nt][3] = 0.0f;
  }
  // d += piece · x, for 8 k of every token. Lane g has token 8·nt + g.
  DEVICE void add(const Piece& w, const uint4 (&x)[NT]) {
#pragma unroll
    for (int nt = 0; nt < NT; ++nt) {
      mma_m16n8k16(T(), d[nt], w.a.x, w.b.x, w.a.y, w.b.y, x[nt].x, x[nt].y);
      mma_m16n8k16(T(), d[nt], w.a.z, w.b.z, w.a.w, w.b.w, x[nt].z, x[nt].w);
    }
  }
};

// The position of the block's first warp: a tile, and the first k of its register tile there.
struct Cursor {
  int tile, k = 0;
  // Advances by one register tile of `chunks`, in rounds of `round` k up to `end`. Returns true at
  // the end of a tile of the output.
  DEVICE bool next(int chunks, int round, int end) {
    k += chunks * CHUNK;
    if (k % RUN == 0) k += round - RUN;
    if (k < end) return false;
    k = 0;
    tile += int(gridDim.x);
    return true;
  }
};

// sums = the rows row(tile, half) of lane g · x (M,K)ᵀ, over the runs `part`, `part` + SPLIT, ...
// of K, for one tile of this block after the other. Calls done(tile) when the sums of a tile are
// complete.
template <typename T, int NT, int SPLIT, typename Row, typename Done>
DEVICE void dot_mma(MmaSums<T, NT>& sums, const T* x, int M, int K, int tiles, int part, Row row, Done done) {
  constexpr int CHUNKS = PER_TILE<NT>, ROUND = SPLIT * RUN;
  const int g = (threadIdx.x & 31) >> 2, t = threadIdx.x & 3;
  const int first = part * RUN + t * 8;  // this lane's first k
  const int end = (K + ROUND - 1) / ROUND * ROUND;
  const T* const token = x + size_t(g) * K;
  Cursor loading{int(blockIdx.x)}, using_{int(blockIdx.x)};
  const T *a = row(loading.tile, 0), *b = row(loading.tile, 1);
  sums.clear();
  // K is a multiple of 8, so every load is entirely inside or entirely outside of the row.
  const auto load = [&](MmaTile<NT>& tile, int) {
#pragma unroll
    for (int u = 0; u < CHUNKS; ++u)
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int k = loading.k + u * CHUNK + half * (CHUNK / 2) + first;
        const uint4 zero = make_uint4(0, 0, 0, 0);
        tile.piece[u][half] = k < K ? Piece{load16_weights(a + k), load16_weights(b + k)} : Piece{zero, zero};
      }
    if (loading.next(CHUNKS, ROUND, end)) a = row(loading.tile, 0), b = row(loading.tile, 1);
  };
  const auto use = [&](const MmaTile<NT>& tile, int) {
    uint4 v[CHUNKS][2][NT];
#pragma unroll
    for (int u = 0; u < CHUNKS; ++u)
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int k = using_.k + u * CHUNK + half * (CHUNK / 2) + first;
#pragma unroll
        for (int nt = 0; nt < NT; ++nt)
          v[u][half][nt] = k < K && nt * 8 + g < M ? load16(token + size_t(nt * 8) * K + k) : make_uint4(0, 0, 0, 0);
      }
#pragma unroll
    for (int u = 0; u < CHUNKS; ++u)
#pragma unroll
      for (int half = 0; half < 2; ++half) sums.add(tile.piece[u][half], v[u][half]);
    const int tile_of_sums = using_.tile;
    if (using_.next(CHUNKS, ROUND, end)) {
      done(tile_of_sums);
      sums.clear();
    }
  };
  const int own = (tiles - int(blockIdx.x) + int(gridDim.x) - 1) / int(gridDim.x);
  sweep<MmaTile<NT>>(own * (end / (SPLIT * CHUNKS * CHUNK)), load, use);
}

constexpr int FMA_ROWS = 4, FMA_WIDTH = 4;  // rows of a warp's tile, k of a lane's load

template <typename T> struct FmaTile {
  T row[FMA_ROWS][FMA_WIDTH];
};

// v[i] = p[k + i] in one 16-byte load with VECTORS, else p[k + 32·i], and 0 for indices from K on.
template <bool VECTORS, typename T, typename Load16> DEVICE void load_four(T (&v)[FMA_WIDTH], const T* p, int k, int K, Load16 load) {
  if constexpr (VECTORS) {
    static_assert(sizeof(v) == 16);
    const uint4 bits = load(p + k);
    memcpy(v, &bits, 16);
  } else {
#pragma unroll
    for (int i = 0; i < FMA_WIDTH; ++i) v[i] = k + 32 * i < K ? p[k + 32 * i] : T(0.0f);
  }
}

// sums[r][n] += this lane's part of row r · x[n]
template <typename T, int N, int SPLIT, bool VECTORS>
DEVICE void dot_fma(float (&sums)[FMA_ROWS][N], const T* x, const T* const (&row)[FMA_ROWS], int M, int K, int part) {
  constexpr int WARP = 32 * FMA_WIDTH, STEP = SPLIT * WARP;
  const int first = part * WARP + (threadIdx.x & 31) * (VECTORS ? FMA_WIDTH : 1);
  const auto load = [&](FmaTile<T>& tile, int i) {
#pragma unroll
    for (int r = 0; r < FMA_ROWS; ++r) load_four<VECTORS>(tile.row[r], row[r], first + i * STEP, K, load16_weights);
  };
  const auto use = [&](const FmaTile<T>& tile, int i) {
#pragma unroll
    for (int n = 0; n < N; ++n)
      if (n < M) {
        T token[FMA_WIDTH];
        load_four<VECTORS>(token, x + size_t(n) * K, first + i * STEP, K, load16);
#pragma unroll
        for (int r = 0; r < FMA_ROWS; ++r)
#pragma unroll
          for (int v = 0; v < FMA_WIDTH; ++v) sums[r][n] += widen(tile.row[r][v]) * widen(token[v]);
      }
  };
  // From 64 sums on there are no registers for a second tile. With that many rows the kernel is
  // less bandwidth-bound and needs less prefetching.
  sweep<FmaTile<T>, (N < 16)>(first < K ? (K - first + STEP - 1) / STEP : 0, load, use);
}

// The sum over all lanes of v[l], in lane l. In each step the two halves of the lanes exchange half
// of their sums.
template <int D = 16> DEVICE float sum_across(const float (&v)[2 * D]) {
  const bool high = threadIdx.x & D;
  float half[D];
#pragma unroll
  for (int i = 0; i < D; ++i) half[i] = (high ? v[i + D] : v[i]) + shuffle_xor(high ? v[i] : v[i + D], D);
  if constexpr (D == 1) return half[0];
  else return sum_across<D / 2>(half);
}

template <int SPLIT> DEVICE void sync_tile() {
  if constexpr (SPLIT == 1) sync_warp();
  else sync_block();
}

template <typename T> DEVICE float bias_at(const T* bias, int i) { return bias ? widen(bias[i]) : 0.0f; }

// ------------------------------------------------------------------ tiles: sums, then pairs

// run(shared, x, M, K, features, row, finish) of a block computes its tiles and hands each finished
// one to the epilogue as pairs: finish(first, each), where each(emit) calls emit(token, f, a, b)
// for tokens < M. a is the sum of feature first + f of the first half of the tile's rows, b that of
// the second half. row(first, half, f) returns the address of a row of weights. Each half of a tile
// has HALF features, and the first features of consecutive tiles are STRIDE apart.

template <typename T, int NT, int SPLIT, int HALVES> struct MmaBlock {
  static constexpr int HALF = 8, STRIDE = HALF * HALVES;
  // Sums of two tiles: while some warps still read one, others write the next. Where two need too
  // much shared memory there is one, and an additional barrier.
  static constexpr int TURNS = SPLIT * NT > 32 ? 1 : 2;
  using Sums = float[TURNS][SPLIT][NT][4][32];

  template <typename Row, typename Finish>
  static DEVICE void run(Sums& shared, const T* x, int M, int K, int features, Row row, Finish finish) {
    const int part = threadIdx.x >> 5, lane = threadIdx.x & 31;
    MmaSums<T, NT> sums;
    int turn = 0;
    const auto row_of_lane = [&](int tile, int half) { return row(tile * STRIDE, half, lane >> 2); };
    dot_mma<T, NT, SPLIT>(sums, x, M, K, (features + STRIDE - 1) / STRIDE, part, row_of_lane, [&](int tile) {
      if constexpr (TURNS == 1) sync_block();
#pragma unroll
      for (int nt = 0; nt < NT; ++nt)
#pragma unroll
        for (int e = 0; e < 4; ++e) shared[turn][part][nt][e][lane] = sums.d[nt][e];
      sync_block();
      finish(tile * STRIDE, [&](auto emit) {
#pragma unroll 1
        for (int i = int(threadIdx.x); i < NT * 64; i += SPLIT * 32) {
          const int l = i & 31, e = (i >> 5) & 1, nt = i >> 6, token = nt * 8 + (l & 3) * 2 + e;
          float a = 0.0f, b = 0.0f;
#pragma unroll
          for (int s = 0; s < SPLIT; ++s) {
            a += shared[turn][s][nt][e][l];
            b += shared[turn][s][nt][e + 2][l];
          }
          if (token < M) emit(token, l >> 2, a, b);
        }
      });
      turn ^= TURNS - 1;
    });
  }
};

// Four warps: one tile with K split into SPLIT parts, or four tiles.
template <typename T, int NT, int SPLIT, int HALVES> struct FmaBlock {
  static constexpr int HALF = 2, STRIDE = HALF * HALVES, WARPS = 4, N = NT * 8;
  using Sums = float[WARPS][NT][32];

  template <typename Row, typename Finish>
  static DEVICE void run(Sums& shared, const T* x, int M, int K, int, Row row, Finish finish) {
    const int warp = threadIdx.x >> 5, lane = threadIdx.x & 31, part = warp % SPLIT;
    const int first = (int(blockIdx.x) * (WARPS / SPLIT) + warp / SPLIT) * STRIDE;
    const T* const rows[FMA_ROWS] = {row(first, 0, 0), row(first, 0, 1), row(first, 1, 0), row(first, 1, 1)};
    float sums[FMA_ROWS][N];
#pragma unroll
    for (int r = 0; r < FMA_ROWS; ++r)
#pragma unroll
      for (int n = 0; n < N; ++n) sums[r][n] = 0.0f;
    // Every row is 16-byte aligned if the first ones are and K is a multiple of 16 bytes.
    const bool vectors = sizeof(T) == 4 && K % FMA_WIDTH == 0 && on16(x) && on16(rows[0]) && on16(rows[2]);
    if constexpr (sizeof(T) == 4) {
      if (vectors) dot_fma<T, N, SPLIT, true>(sums, x, rows, M, K, part);
    }
    if (!vectors) dot_fma<T, N, SPLIT, false>(sums, x, rows, M, K, part);
#pragma unroll
    for (int nt = 0; nt < NT; ++nt) {
      float v[32];
#pragma unroll
      for (int i = 0; i < 32; ++i) v[i] = sums[i >> 3][nt * 8 + (i & 7)];
      shared[warp][nt][lane] = sum_across(v);
    }
    sync_tile<SPLIT>();
    finish(first, [&](auto emit) {
#pragma unroll 1
      for (int i = part * 32 + lane; i < NT * 16; i += SPLIT * 32) {
        const int nt = i >> 4, f = (i >> 3) & 1, token = nt * 8 + (i & 7);
        float a = 0.0f, b = 0.0f;
#pragma unroll
        for (int s = 0; s < SPLIT; ++s) {
          a += shared[warp - part + s][nt][i & 15];
          b += shared[warp - part + s][nt][16 + (i & 15)];
        }
        if (token < M) emit(token, f, a, b);
      }
    });
  }
};

template <typename B, typename T>
DEVICE void gate_up(const T* x, const T* w_gate, const T* w_up, const T* b_gate, const T* b_up, T* h, int M, int I, int H, GluParams op) {
  SHARED(typename B::Sums, shared);
  // Beyond I the last row is read again, and its result is not stored.
  const auto row = [&](int first, int half, int f) { return (half ? w_up : w_gate) + size_t(min(first + f, I - 1)) * H; };
  B::run(shared, x, M, H, I, row, [&](int first, auto each) {
    with_formula<float>(op, [&](auto formula) {
      each([&](int token, int f, float gate, float up) {
        const int i = first + f;
        if (i < I) h[size_t(token) * I + i] = Number<T>::narrow(formula.value(gate + bias_at(b_gate, i), up + bias_at(b_up, i)));
      });
    });
  });
}

template <typename B, typename T>
DEVICE void linear(const T* x, const T* w, const T* bias, T* y, int M, int N, int K, float factor) {
  SHARED(typename B::Sums, shared);
  const auto row = [&](int first, int half, int f) { return w + size_t(min(first + half * B::HALF + f, N - 1)) * K; };
  B::run(shared, x, M, K, N, row, [&](int first, auto each) {
    const auto put = [&](int token, int n, float sum) {
      if (n < N) y[size_t(token) * N + n] = Number<T>::narrow((sum + bias_at(bias, n)) * factor);
    };
    each([&](int token, int f, float a, float b) {
      put(token, first + f, a);
      put(token, first + B::HALF + f, b);
    });
  });
}

}  // namespace

// ---------------------------------------------------------------------------------- kernels

// NAME, threads, minimum blocks per SM (it limits the registers), T, the block
#define GATE_UP(NAME, THREADS, BLOCKS, T, ...)                                                                               \
  extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS) gate_up_##NAME(                                              \
      const T* x, const T* w_gate, const T* w_up, const T* b_gate, const T* b_up, T* h, int M, int I, int H, GluParams op) {     \
    gate_up<__VA_ARGS__>(x, w_gate, w_up, b_gate, b_up, h, M, I, H, op);                                                     \
  }
#define LINEAR(NAME, THREADS, BLOCKS, T, ...)                                                                                \
  extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS) linear_##NAME(                                               \
      const T* x, const T* w, const T* bias, T* y, int M, int N, int K, float factor) {                                      \
    linear<__VA_ARGS__>(x, w, bias, y, M, N, K, factor);                                                                     \
  }
// The two halves of a tile hold the same features in gate_up, to different ones in linear.
#define MMA_KERNELS(T, NT)                                                 \
  GATE_UP(mma_##T##_n##NT##_w8, 256, 2, T, MmaBlock<T, NT, 8, 1>)           \
  GATE_UP(mma_##T##_n##NT##_w16, 512, 1, T, MmaBlock<T, NT, 16, 1>)         \
  LINEAR(mma_##T##_n##NT##_w8, 256, 2, T, MmaBlock<T, NT, 8, 2>)            \
  LINEAR(mma_##T##_n##NT##_w16, 512, 1, T, MmaBlock<T, NT, 16, 2>)
#define FMA_KERNELS(NAME, T, NT, BLOCKS)                             \
  GATE_UP(fma_##NAME, 128, BLOCKS, T, FmaBlock<T, NT, 1, 1>)          \
  LINEAR(fma_##NAME, 128, BLOCKS, T, FmaBlock<T, NT, 4, 2>)

MMA_KERNELS(bf16, 1)
MMA_KERNELS(bf16, 2)
MMA_KERNELS(bf16, 4)
MMA_KERNELS(f16, 1)
MMA_KERNELS(f16, 2)
MMA_KERNELS(f16, 4)
FMA_KERNELS(f32_n1, float, 1, 4)
FMA_KERNELS(f32_n2, float, 2, 4)
FMA_KERNELS(f32_n4, float, 4, 2)
FMA_KERNELS(bf16, bf16, 4, 2)
FMA_KERNELS(f16, f16, 4, 2)
