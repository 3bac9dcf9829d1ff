// The block on Apple GPUs: h = act(x·Wgᵀ + bg) ⊙ (x·Wuᵀ + bu) in one dispatch, y = (h·Wdᵀ +
// bd)·factor in a second, and the gate alone with its gradient. W (2I,H) holds the rows of gate
// first, then those of up.
//
// Method.
// 1. decode, for few rows. A simdgroup reads WEIGHT_ROWS rows of W once, 16 B per lane at a time,
//    and multiplies them by ROWS rows of x, which stay in the cache. gate and up of a feature are
//    in one simdgroup. There are no barriers, and no threadgroup memory.
// 2. tile, for many rows. A threadgroup of 2 x 2 simdgroups computes BM x 64 sums. Of the 64
//    columns 32 are of gate and 32 the same features of up, so the fragments of a pair are in the
//    same lanes and the gate is the epilogue. BK elements of k (64 B) of x and of W at a time go
//    through threadgroup memory. Its rows are 80 B apart, so that the rows of a fragment are in
//    different banks.
// 3. Products are exact, sums are in f32, and h and y are rounded to T once each.
//
// The activations are those of src/gate/gate.h. With the exponential below they match the CPU
// kernels operation by operation; their file gives the error bounds. They rely on fma, on correctly
// rounded division, and on comparisons that are false for NaN, so compile with fast math off. A GPU
// may replace f32 and bf16 denormals (below 1.2e-38) by 0.
#include <metal_stdlib>
#include <metal_simdgroup_matrix>
using namespace metal;

#define UNROLL _Pragma("clang loop unroll(full)")

constant constexpr uint LANES = 32;
constant constexpr uint SIMDGROUPS = 4;           // of a threadgroup, in every kernel
constant constexpr uint THREADS = 128;            // LANES * SIMDGROUPS
constant constexpr uint WEIGHT_ROWS = 4;          // decode: 4 rows * 16 B * 32 lanes = 2 KiB in flight per simdgroup
constant constexpr uint TILE_COLUMNS = 64;        // tile: columns of sums per threadgroup
constant constexpr uint RASTER = 8;               // tile: row tiles that share the weights of a column tile before the next one
constant constexpr uint ELEMENTS = 4;             // glu: elements per thread

// Every row starts on a multiple of 16 B (products) or of 4 elements (glu), and its length is a
// multiple of that too.
constant bool ALIGNED [[function_constant(0)]];

// ---------------------------------------------------------------- the gate

#define DEVICE inline
#define PARAMS constant GluParams&
#define SQRT_8_OVER_PI 1.595769f

// x·2ⁿ for n in [-151, 0] with one rounding: x·2^(n/2) is exact.
inline float scale(float x, float n) {
    const int i = int(fmax(n, -151.0f));          // NaN: any finite i, x is NaN then
    const int half_way = i >> 1;
    return x * as_type<float>(uint(half_way + 127) << 23) * as_type<float>(uint(i - half_way + 127) << 23);
}

// e^-a for a ≥ 0; NaN for NaN.
inline float exp_neg(float a) {
    const float x = -(104.0f <= a ? 104.0f : a);
    const float n = rint(x * 1.44269504f);
    const float r = fma(n, 1.9046543e-9f, fma(n, -0.69314718f, x));
    float q = fma(0.0013814538f, r, 0.008368745f);
    q = fma(q, r, 0.04166839f);
    q = fma(q, r, 0.16666521f);
    q = fma(q, r, 0.49999994f);
    return scale(1.0f + (r + (r * r) * q), n);
}

inline float reciprocal(float x) { return 1.0f / x; }
inline float absolute(float x) { return fabs(x); }
inline float fused(float a, float b, float c) { return fma(a, b, c); }
inline float one_plus_square(float a, float x) { return fma(a, x * x, 1.0f); }

// σ(z) from t = e^-|z| and q = 1/(1+t); σ'(z) = t·q².
template <typename R>
struct Sigma {
    R value;
    R t;
    R q;
    explicit Sigma(R z) {
        t = exp_neg(absolute(z));
        q = reciprocal(1.0f + t);
        value = z <= 0.0f ? t * q : q;
    }
    R slope() const { return t * (q * q); }
    R plus_slope(R factor) const { return value + (factor * t) * (q * q); }
};

// mod.rs replaces the next line by the text of the file, because Metal compiles one string.
#include "../gate/gate.h"

// act.both(g) of the activation that with_activation selects
struct At {
    float g;
    template <typename A>
    Both<float> operator()(A act) const {
        return act.both(g);
    }
};

inline Both<float> activation(constant GluParams& op, float g) {
    return with_activation<float>(op.activation, op.beta, At{g});
}

inline float glu_value(constant GluParams& op, float gate, float up) {
    if (!is_plain(op)) {
        gate = bounded_gate(float(op.gate_multiplier), float(op.limit), gate);
        up = bounded_up(float(op.limit), float(op.up_offset), up);
    }
    return activation(op, gate).value * up;
}

// (dgate, dup). The gradient passes below the limit and is 0 at it and beyond. NaN counts as below.
inline float2 glu_slope(constant GluParams& op, float gate, float up, float dy) {
    if (is_plain(op)) {
        const Both<float> a = activation(op, gate);
        return float2((dy * up) * a.slope, dy * a.value);
    }
    const float m = op.gate_multiplier, limit = op.limit, c = op.up_offset;
    const Both<float> a = activation(op, bounded_gate(m, limit, gate));
    const float dgate = m * ((dy * bounded_up(limit, c, up)) * a.slope);
    return float2(below(limit, m * gate, dgate), below(limit, fabs(up), dy * a.value));
}

// ---------------------------------------------------------------- arguments of a product

// x (rows, k) · w (columns or 2·columns, k)ᵀ -> out (rows, columns)
struct Product {
    uint rows;
    uint columns;                                 // I with a gate, else the number of w's rows
    uint k;
    uint has_bias;                                // bias: as many elements as w has rows
    float factor;                                 // of the sum and its bias, without a gate
    GluParams glu;
};

// The value of one element from its sums, with their biases
template <typename T>
inline float linear_value(constant Product& p, device const T* bias, uint column, float sum) {
    if (p.has_bias) sum += float(bias[column]);
    return sum * p.factor;
}

template <typename T>
inline float gate_up_value(constant Product& p, device const T* bias, uint column, float gate, float up) {
    if (p.has_bias) {
        gate += float(bias[column]);
        up += float(bias[p.columns + column]);
    }
    return glu_value(p.glu, gate, up);
}

// ---------------------------------------------------------------- decode

// 16 B of a row, widened
template <typename T>
inline void load_chunk(device const T* src, thread float* dst) {
    UNROLL for (uint v = 0; v < 4 / sizeof(T); v++) {
        const vec<T, 4> four = *(device const vec<T, 4>*)(src + 4 * v);
        UNROLL for (uint e = 0; e < 4; e++) dst[4 * v + e] = float(four[e]);
    }
}

// Group (x, y): features from (x·SIMDGROUPS + simd)·FEATURES on, rows from y·ROWS on. Beyond the
// last row or feature the last one is computed again and not stored.
template <typename T, uint ROWS, bool GATED>
[[kernel, max_total_threads_per_threadgroup(THREADS)]]
void decode(device const T* x [[buffer(0)]], device const T* w [[buffer(1)]], device const T* bias [[buffer(2)]],
            device T* out [[buffer(3)]], constant Product& p [[buffer(4)]], uint3 group [[threadgroup_position_in_grid]],
            uint simd [[simdgroup_index_in_threadgroup]], uint lane [[thread_index_in_simdgroup]]) {
    constexpr uint FEATURES = WEIGHT_ROWS / (GATED ? 2 : 1);
    constexpr uint CHUNK = 16 / sizeof(T);
    const uint first = (group.x * SIMDGROUPS + simd) * FEATURES;
    const uint m0 = group.y * ROWS;
    if (first >= p.columns) return;

    device const T* weight[WEIGHT_ROWS];          // with a gate: FEATURES rows of gate, then FEATURES of up
    UNROLL for (uint i = 0; i < WEIGHT_ROWS; i++) {
        const ulong row = min(first + i % FEATURES, p.columns - 1) + (i < FEATURES ? 0 : ulong(p.columns));
        weight[i] = w + row * p.k;
    }
    device const T* token[ROWS];
    UNROLL for (uint r = 0; r < ROWS; r++) token[r] = x + ulong(min(m0 + r, p.rows - 1)) * p.k;

    float sums[WEIGHT_ROWS][ROWS];
    UNROLL for (uint i = 0; i < WEIGHT_ROWS; i++) {
        UNROLL for (uint r = 0; r < ROWS; r++) sums[i][r] = 0.0f;
    }
    if (ALIGNED) {
        for (uint k = lane * CHUNK; k < p.k; k += LANES * CHUNK) {
            float a[WEIGHT_ROWS][CHUNK];
            UNROLL for (uint i = 0; i < WEIGHT_ROWS; i++) load_chunk(weight[i] + k, a[i]);
            UNROLL for (uint r = 0; r < ROWS; r++) {
                float b[CHUNK];
                load_chunk(token[r] + k, b);
                UNROLL for (uint i = 0; i < WEIGHT_ROWS; i++) {
                    UNROLL for (uint e = 0; e < CHUNK; e++) sums[i][r] = fma(a[i][e], b[e], sums[i][r]);
                }
            }
        }
    } else {
        for (uint k = lane; k < p.k; k += LANES) {
            UNROLL for (uint r = 0; r < ROWS; r++) {
                const float b = float(token[r][k]);
                UNROLL for (uint i = 0; i < WEIGHT_ROWS; i++) sums[i][r] = fma(float(weight[i][k]), b, sums[i][r]);
            }
        }
    }

    // Lane f·ROWS + r receives the sums of feature f and row r.
    float gate = 0.0f, up = 0.0f;
    UNROLL for (uint i = 0; i < WEIGHT_ROWS; i++) {
        UNROLL for (uint r = 0; r < ROWS; r++) {
            const float sum = simd_sum(sums[i][r]);
            const bool mine = lane == i % FEATURES * ROWS + r;
            gate = mine && i < FEATURES ? sum : gate;
            up = mine && i >= FEATURES ? sum : up;
        }
    }
    const uint column = first + lane / ROWS, row = m0 + lane % ROWS;
    if (lane >= FEATURES * ROWS || column >= p.columns || row >= p.rows) return;
    const float value = GATED ? gate_up_value(p, bias, column, gate, up) : linear_value(p, bias, column, gate);
    out[ulong(row) * p.columns + column] = T(value);
}

// ---------------------------------------------------------------- tile

// 16 B of a row from element k on; 0 beyond the end of the row and in rows that do not exist
template <typename T>
inline void stage(threadgroup T* dst, device const T* row, bool inside, uint k, uint end) {
    constexpr uint CHUNK = 16 / sizeof(T);
    if (ALIGNED) {
        UNROLL for (uint v = 0; v < CHUNK / 4; v++) {
            vec<T, 4> four = vec<T, 4>(T(0.0f));
            if (inside && k < end) four = *(device const vec<T, 4>*)(row + k + 4 * v);
            *(threadgroup vec<T, 4>*)(dst + 4 * v) = four;
        }
    } else {
        UNROLL for (uint e = 0; e < CHUNK; e++) dst[e] = inside && k + e < end ? row[k + e] : T(0.0f);
    }
}

// The position of the two neighbouring elements that a lane holds of an 8 x 8 fragment: (row, first
// column).
inline uint2 lane_position(uint lane) {
    return uint2(((lane / 4) & 4) + lane / 2 % 4, ((lane / 4) & 2) * 2 + lane % 2 * 2);
}

// Loads an 8 x 8 fragment of f32 from elements of T. Rows are `down` apart, columns `right`.
template <typename T>
inline void load_fragment(thread simdgroup_matrix<float, 8, 8>& fragment, threadgroup const T* src, uint2 at, uint down, uint right) {
    fragment.thread_elements()[0] = float(src[at.x * down + at.y * right]);
    fragment.thread_elements()[1] = float(src[at.x * down + at.y * right + right]);
}

// Group (x, y, z): row tile z·RASTER + x, column tile y. Simdgroup (sm, sn) computes BM/2 rows and
// 32 columns of sums. With a gate these are 16 columns of gate and the same 16 of up.
template <typename T, uint BM, bool GATED>
[[kernel, max_total_threads_per_threadgroup(THREADS)]]
void tile(device const T* x [[buffer(0)]], device const T* w [[buffer(1)]], device const T* bias [[buffer(2)]],
          device T* out [[buffer(3)]], constant Product& p [[buffer(4)]], uint3 group [[threadgroup_position_in_grid]],
          uint simd [[simdgroup_index_in_threadgroup]], uint lane [[thread_index_in_simdgroup]]) {
    constexpr uint BN = TILE_COLUMNS;
    constexpr uint FEATURES = BN / (GATED ? 2 : 1);
    constexpr uint CHUNK = 16 / sizeof(T);
    constexpr uint BK = 4 * CHUNK;
    constexpr uint LD = BK + CHUNK;
    constexpr uint SWEEP = THREADS / 4;           // rows that the threadgroup stages at once, 4 threads each
    constexpr uint TM = BM / 16, TN = 4;          // fragments of a simdgroup
    threadgroup vec<T, 4> x_stage[BM * LD / 4];   // f32: 64 * 20 * 4 B = 5 KiB, others 64 * 40 * 2 B = 5 KiB
    threadgroup vec<T, 4> w_stage[BN * LD / 4];
    threadgroup T* xs = (threadgroup T*)x_stage;
    threadgroup T* ws = (threadgroup T*)w_stage;

    const uint m0 = (group.z * RASTER + group.x) * BM, n0 = group.y * FEATURES;
    if (m0 >= p.rows) return;

    const uint stage_row = (simd * LANES + lane) / 4, stage_k = lane % 4 * CHUNK;
    device const T* x_row[BM / SWEEP];
    bool x_inside[BM / SWEEP];
    UNROLL for (uint s = 0; s < BM / SWEEP; s++) {
        const uint m = m0 + s * SWEEP + stage_row;
        x_inside[s] = m < p.rows;
        x_row[s] = x + (x_inside[s] ? ulong(m) * p.k : 0);
    }
    device const T* w_row[BN / SWEEP];
    bool w_inside[BN / SWEEP];
    UNROLL for (uint s = 0; s < BN / SWEEP; s++) {
        const uint n = n0 + (GATED ? 0 : s * SWEEP) + stage_row;
        w_inside[s] = n < p.columns;
        w_row[s] = w + (w_inside[s] ? (ulong(n) + (GATED && s == 1 ? p.columns : 0)) * p.k : 0);
    }

    const uint2 at = lane_position(lane);
    const uint sm = simd / 2, sn = simd % 2;
    simdgroup_matrix<float, 8, 8> sums[TM][TN];
    UNROLL for (uint i = 0; i < TM; i++) {
        UNROLL for (uint j = 0; j < TN; j++) {
            sums[i][j].thread_elements()[0] = 0.0f;
            sums[i][j].thread_elements()[1] = 0.0f;
        }
    }
    for (uint k0 = 0; k0 < p.k; k0 += BK) {
        threadgroup_barrier(mem_flags::mem_threadgroup); // the last step's stages have been read
        UNROLL for (uint s = 0; s < BM / SWEEP; s++) {
            stage(xs + (s * SWEEP + stage_row) * LD + stage_k, x_row[s], x_inside[s], k0 + stage_k, p.k);
        }
        UNROLL for (uint s = 0; s < BN / SWEEP; s++) {
            stage(ws + (s * SWEEP + stage_row) * LD + stage_k, w_row[s], w_inside[s], k0 + stage_k, p.k);
        }
        threadgroup_barrier(mem_flags::mem_threadgroup); // this step's have been written
        UNROLL for (uint k = 0; k < BK; k += 8) {
            simdgroup_matrix<float, 8, 8> a[TM], b[TN];
            simdgroup_barrier(mem_flags::mem_none);
            UNROLL for (uint i = 0; i < TM; i++) load_fragment(a[i], xs + (sm * BM / 2 + i * 8) * LD + k, at, LD, 1);
            UNROLL for (uint j = 0; j < TN; j++) {
                const uint column = GATED ? j / 2 * 32 + sn * 16 + j % 2 * 8 : sn * 32 + j * 8;
                load_fragment(b[j], ws + column * LD + k, at, 1, LD);
            }
            simdgroup_barrier(mem_flags::mem_none);
            UNROLL for (uint i = 0; i < TM; i++) {
                UNROLL for (uint j = 0; j < TN; j++) simdgroup_multiply_accumulate(sums[i][j], a[i], b[j], sums[i][j]);
            }
        }
    }

    UNROLL for (uint i = 0; i < TM; i++) {
        const uint row = m0 + sm * BM / 2 + i * 8 + at.x;
        if (row >= p.rows) continue;
        UNROLL for (uint j = 0; j < TN / (GATED ? 2 : 1); j++) {
            UNROLL for (uint e = 0; e < 2; e++) {
                const uint column = n0 + sn * FEATURES / 2 + j * 8 + at.y + e;
                if (column >= p.columns) continue;
                const float sum = sums[i][j].thread_elements()[e];
                const float value = GATED ? gate_up_value(p, bias, column, sum, sums[i][j + 2 * GATED].thread_elements()[e])
                                          : linear_value(p, bias, column, sum);
                out[ulong(row) * p.columns + column] = T(value);
            }
        }
    }
}

// ---------------------------------------------------------------- the gate alone

// gate, up, dy (rows, columns), strides in elements; the outputs are contiguous
struct Pair {
    uint rows;
    uint columns;
    uint gate_row, gate_column;
    uint up_row, up_column;
    uint dy_row, dy_column;
    GluParams glu;
};

// Elements i.. of a row: four at once if ALIGNED, else as many of the four as exist
template <typename T>
inline void load_four(device const T* row, uint i, uint columns, uint stride, thread float* dst) {
    if (ALIGNED) {
        const vec<T, 4> four = *(device const vec<T, 4>*)(row + i);
        UNROLL for (uint e = 0; e < 4; e++) dst[e] = float(four[e]);
    } else {
        UNROLL for (uint e = 0; e < 4; e++) dst[e] = i + e < columns ? float(row[ulong(i + e) * stride]) : 0.0f;
    }
}

template <typename T>
inline void store_four(device T* row, uint i, uint columns, thread const float* src) {
    if (ALIGNED) {
        *(device vec<T, 4>*)(row + i) = vec<T, 4>(T(src[0]), T(src[1]), T(src[2]), T(src[3]));
    } else {
        UNROLL for (uint e = 0; e < 4; e++) {
            if (i + e < columns) row[i + e] = T(src[e]);
        }
    }
}

// Group (x, y): columns from x·THREADS·ELEMENTS on, row y.
template <typename T>
[[kernel, max_total_threads_per_threadgroup(THREADS)]]
void gate_forward(device const T* gate [[buffer(0)]], device const T* up [[buffer(1)]], device T* out [[buffer(2)]],
                  constant Pair& p [[buffer(3)]], uint3 group [[threadgroup_position_in_grid]],
                  uint simd [[simdgroup_index_in_threadgroup]], uint lane [[thread_index_in_simdgroup]]) {
    const uint i = (group.x * THREADS + simd * LANES + lane) * ELEMENTS;
    if (i >= p.columns) return;
    float g[4], u[4], y[4];
    load_four(gate + ulong(group.y) * p.gate_row, i, p.columns, p.gate_column, g);
    load_four(up + ulong(group.y) * p.up_row, i, p.columns, p.up_column, u);
    UNROLL for (uint e = 0; e < 4; e++) y[e] = glu_value(p.glu, g[e], u[e]);
    store_four(out + ulong(group.y) * p.columns, i, p.columns, y);
}

// out (2, rows, columns): dgate, then dup
template <typename T>
[[kernel, max_total_threads_per_threadgroup(THREADS)]]
void gate_backward(device const T* gate [[buffer(0)]], device const T* up [[buffer(1)]], device const T* dy [[buffer(2)]],
                   device T* out [[buffer(3)]], constant Pair& p [[buffer(4)]], uint3 group [[threadgroup_position_in_grid]],
                   uint simd [[simdgroup_index_in_threadgroup]], uint lane [[thread_index_in_simdgroup]]) {
    const uint i = (group.x * THREADS + simd * LANES + lane) * ELEMENTS;
    if (i >= p.columns) return;
    float g[4], u[4], d[4], dgate[4], dup[4];
    load_four(gate + ulong(group.y) * p.gate_row, i, p.columns, p.gate_column, g);
    load_four(up + ulong(group.y) * p.up_row, i, p.columns, p.up_column, u);
    load_four(dy + ulong(group.y) * p.dy_row, i, p.columns, p.dy_column, d);
    UNROLL for (uint e = 0; e < 4; e++) {
        const float2 slopes = glu_slope(p.glu, g[e], u[e], d[e]);
        dgate[e] = slopes.x;
        dup[e] = slopes.y;
    }
    const ulong row = ulong(group.y) * p.columns;
    store_four(out + row, i, p.columns, dgate);
    store_four(out + ulong(p.rows) * p.columns + row, i, p.columns, dup);
}

// ---------------------------------------------------------------- instances

#ifndef INSTANTIATE // tests on the CPU bring their own
#define INSTANTIATE(name, function, ...) \
    template [[host_name(name)]] [[kernel]] decltype(function<__VA_ARGS__>) function<__VA_ARGS__>;
#endif

#define INSTANTIATE_DECODE(rows, type, T)                               \
    INSTANTIATE("gate_up_decode_" #rows "_" #type, decode, T, rows, true) \
    INSTANTIATE("linear_decode_" #rows "_" #type, decode, T, rows, false)

#define INSTANTIATE_TILE(rows, type, T)                               \
    INSTANTIATE("gate_up_tile_" #rows "_" #type, tile, T, rows, true) \
    INSTANTIATE("linear_tile_" #rows "_" #type, tile, T, rows, false)

#define INSTANTIATE_ALL(type, T)                          \
    INSTANTIATE_DECODE(1, type, T)                        \
    INSTANTIATE_DECODE(2, type, T)                        \
    INSTANTIATE_DECODE(4, type, T)                        \
    INSTANTIATE_DECODE(8, type, T)                        \
    INSTANTIATE_TILE(32, type, T)                         \
    INSTANTIATE_TILE(64, type, T)                         \
    INSTANTIATE("gate_forward_" #type, gate_forward, T)   \
    INSTANTIATE("gate_backward_" #type, gate_backward, T)

INSTANTIATE_ALL(f32, float)
INSTANTIATE_ALL(f16, half)
#if defined(__HAVE_BFLOAT__)
INSTANTIATE_ALL(bf16, bfloat)
#endif
