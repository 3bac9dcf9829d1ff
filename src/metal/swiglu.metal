// The block on Apple GPUs: h = act(x·Wgᵀ + bg) ⊙ (x·Wuᵀ + bu) in one dispatch, y = (h·Wdᵀ + bd)·factor in a second, and the gate
// alone with its gradient. W (2I,H) holds the gate's rows first, then up's.
//
// Method.
// 1. decode: few rows. A simdgroup reads WEIGHT_ROWS rows of W once, 16 B a lane at a time, and multiplies them with ROWS rows of x,
//    which stay in the cache; gate and up of a feature meet in one simdgroup. No barrier, no threadgroup memory.
// 2. tile: many rows. A threadgroup of 2 x 2 simdgroups makes BM x 64 sums; of the 64 columns 32 are gate's and 32 the same
//    features of up, so that the fragments of a pair lie in the same lanes and the gate is the epilogue. BK elements of k (64 B) of x
//    and of W at a time go through threadgroup memory, rows 80 B apart so that the rows of a fragment lie in different banks.
// 3. Products are exact, sums in f32; h and y are rounded once each to T.
//
// The activations are those of the CPU kernels, operation by operation (their file says how they were made, and their error bounds):
// everything exponential goes through e^-|z| in [0, 1], which cannot overflow, and erf, which Metal lacks, through a fit of
// erfcx. They rely on fma, on a division rounded correctly, and on comparisons that are false for NaN: compile with fast math off.
// A GPU may take f32 and bf16 denormals (below 1.2e-38) for 0.
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

// Every row starts on a multiple of 16 B (products) or of 4 elements (glu), and none has a remainder.
constant bool ALIGNED [[function_constant(0)]];

// ---------------------------------------------------------------- activations

constant constexpr uint SWISH = 0;                // g·σ(βg)
constant constexpr uint SIGMOID = 1;
constant constexpr uint RELU = 2;
constant constexpr uint GELU = 3;
constant constexpr uint GELU_TANH = 4;
constant constexpr uint IDENTITY = 5;

// act(min(m·gate, limit)) ⊙ (clamp(up, ±limit) + c)
struct Glu {
    uint activation;
    float beta;
    uint modified;                                // 0: m = 1, no limit, c = 0
    uint limited;
    float gate_multiplier;                        // m
    float limit;                                  // ∞ if there is none
    float up_offset;                              // c
};

// act(g), and act'(g)
struct Slope {
    float value;
    float slope;
};

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

// t = e^-|z| and q = 1/(1+t): σ(z) is q or t·q, σ'(z) = t·q².
struct Logistic {
    float t;
    float q;
    float sigma;
};

inline Logistic logistic(float z) {
    Logistic l;
    l.t = exp_neg(fabs(z));
    l.q = 1.0f / (1.0f + l.t);
    l.sigma = z <= 0.0f ? l.t * l.q : l.q;
    return l;
}

// g·f for a factor f in [0, 1] that vanishes where g is very negative: -0 there, also for g = -∞.
inline float times_tail(float g, float f) {
    return f <= 0.0f ? -0.0f : g * f;
}

// x within ±bound; NaN stays.
inline float bounded(float x, float bound) {
    x = bound <= x ? bound : x;
    return x <= -bound ? -bound : x;
}

inline Slope swish(float g, float beta) {
    const float z = beta * g;
    const Logistic l = logistic(z);
    // z·t is 0 well before |z| reaches 200, so the bound only keeps ∞·0 away.
    return Slope{times_tail(g, l.sigma), l.sigma + (bounded(z, 200.0f) * l.t) * (l.q * l.q)};
}

inline Slope sigmoid(float g) {
    const Logistic l = logistic(g);
    return Slope{l.sigma, l.t * (l.q * l.q)};
}

// g·Φ(g): Φ(-a) = e^(-a²/2)·E(a), E a polynomial in (a-4)/(a+4) over a+4. The rounding of a² is put back as a factor.
inline Slope gelu(float g) {
    const float x = bounded(g, 16.0f);
    const float a = fabs(x);
    const float a2 = a * a;
    const float rest = fma(a, a, -a2);
    float e = exp_neg(0.5f * a2);
    e = fma(e, -0.5f * rest, e);
    const float w = 1.0f / (a + 4.0f);
    const float s = fma(-8.0f, w, 1.0f);
    float p = fma(-0.00013807688f, s, 0.00016672676f);
    p = fma(p, s, 0.0015663408f);
    p = fma(p, s, -0.0035058383f);
    p = fma(p, s, -0.007521953f);
    p = fma(p, s, 0.06040276f);
    p = fma(p, s, -0.18652403f);
    p = fma(p, s, 0.38713697f);
    p = fma(p, s, -0.60789657f);
    p = fma(p, s, 0.75528514f);
    const float tail = e * (w * p);
    const float cdf = x <= 0.0f ? tail : 1.0f - tail;
    return Slope{times_tail(g, cdf), fma(x, 0.3989423f * e, cdf)};
}

// g·σ(v), v = √(8/π)·(g + 0.044715·g³)
inline Slope gelu_tanh(float g) {
    const float x = bounded(g, 20.0f);
    const float x2 = x * x;
    const Logistic l = logistic((1.595769f * x) * fma(0.044715f, x2, 1.0f));
    const float dv = 1.595769f * fma(3.0f * 0.044715f, x2, 1.0f);
    return Slope{times_tail(g, l.sigma), l.sigma + (x * dv) * (l.t * (l.q * l.q))};
}

inline Slope activation(constant Glu& op, float g) {
    switch (op.activation) {
        case SWISH: return swish(g, op.beta);
        case SIGMOID: return sigmoid(g);
        case RELU: return Slope{g <= 0.0f ? 0.0f : g, g <= 0.0f ? 0.0f : 1.0f};
        case GELU: return gelu(g);
        case GELU_TANH: return gelu_tanh(g);
        case IDENTITY: return Slope{g, 1.0f};
        default: return Slope{NAN, NAN}; // no activation has this number
    }
}

inline float bounded_gate(constant Glu& op, float gate) {
    const float g = op.gate_multiplier * gate;
    return op.limit <= g ? op.limit : g;
}

inline float bounded_up(constant Glu& op, float up) {
    return bounded(up, op.limit) + op.up_offset;
}

inline float glu_value(constant Glu& op, float gate, float up) {
    if (op.modified) {
        gate = bounded_gate(op, gate);
        up = bounded_up(op, up);
    }
    return activation(op, gate).value * up;
}

// (dgate, dup). The gradient passes below the limit and is 0 at it and beyond; NaN is within.
inline float2 glu_slope(constant Glu& op, float gate, float up, float dy) {
    if (!op.modified) {
        const Slope a = activation(op, gate);
        return float2((dy * up) * a.slope, dy * a.value);
    }
    const Slope a = activation(op, bounded_gate(op, gate));
    const float dgate = op.gate_multiplier * ((dy * bounded_up(op, up)) * a.slope);
    const bool beyond_gate = op.limited && op.limit <= op.gate_multiplier * gate;
    const bool beyond_up = op.limited && op.limit <= fabs(up);
    return float2(beyond_gate ? 0.0f : dgate, beyond_up ? 0.0f : dy * a.value);
}

// ---------------------------------------------------------------- what a product is given

// x (rows, k) · w (columns or 2·columns, k)ᵀ -> out (rows, columns)
struct Product {
    uint rows;
    uint columns;                                 // I with a gate, else the number of w's rows
    uint k;
    uint has_bias;                                // bias: as many elements as w has rows
    float factor;                                 // of the sum and its bias, without a gate
    Glu glu;
};

// Sums of one element, with their biases -> its value
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

// Group (x, y): features from (x·SIMDGROUPS + simd)·FEATURES on, rows from y·ROWS on. Beyond the last row or feature the last one
// is computed again and not stored.
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

    // Lane f·ROWS + r keeps the sums of feature f and row r.
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

// 16 B of a row from element k on; 0 beyond the row's end and in rows that there are not
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

// Where the two neighbouring elements that a lane holds of an 8 x 8 fragment lie: (row, first column).
inline uint2 lane_position(uint lane) {
    return uint2(((lane / 4) & 4) + lane / 2 % 4, ((lane / 4) & 2) * 2 + lane % 2 * 2);
}

// An 8 x 8 fragment of f32 from elements of T, `down` and `right` apart
template <typename T>
inline void load_fragment(thread simdgroup_matrix<float, 8, 8>& fragment, threadgroup const T* src, uint2 at, uint down, uint right) {
    fragment.thread_elements()[0] = float(src[at.x * down + at.y * right]);
    fragment.thread_elements()[1] = float(src[at.x * down + at.y * right + right]);
}

// Group (x, y, z): row tile z·RASTER + x, column tile y. Simdgroup (sm, sn) makes BM/2 rows and 32 columns of sums: with a gate 16
// columns of gate and the same 16 of up.
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
    Glu glu;
};

// Elements i.. of a row: four at once if ALIGNED, else as many of the four as there are
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
void glu(device const T* gate [[buffer(0)]], device const T* up [[buffer(1)]], device T* out [[buffer(2)]],
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
void glu_gradient(device const T* gate [[buffer(0)]], device const T* up [[buffer(1)]], device const T* dy [[buffer(2)]],
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

#define INSTANTIATE_ALL(type, T)      \
    INSTANTIATE_DECODE(1, type, T)    \
    INSTANTIATE_DECODE(2, type, T)    \
    INSTANTIATE_DECODE(4, type, T)    \
    INSTANTIATE_DECODE(8, type, T)    \
    INSTANTIATE_TILE(32, type, T)     \
    INSTANTIATE_TILE(64, type, T)     \
    INSTANTIATE("glu_" #type, glu, T) \
    INSTANTIATE("glu_gradient_" #type, glu_gradient, T)

INSTANTIATE_ALL(f32, float)
INSTANTIATE_ALL(f16, half)
#if defined(__HAVE_BFLOAT__)
INSTANTIATE_ALL(bf16, bfloat)
#endif
