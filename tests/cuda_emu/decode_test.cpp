// decode.cu on the emulator against the definition.
//
// Bound of a sum of K products and a bias, in any order: (K + 2)·u·(Σ|x·w| + |b|), u = 2^-24. It
// holds for products that are exact in f32 (of two 16-bit floats) and for rounded ones (f32). The
// gate amplifies it by at most its steepest slope (check.h), and y is rounded once.
#include "check.h"
#include "decode.cu"

using namespace check;

namespace {

template <typename T> using GateUp = void (*)(const T*, const T*, const T*, const T*, const T*, T*, int, int, int, GluParams);
template <typename T> using Linear = void (*)(const T*, const T*, const T*, T*, int, int, int, float);

// The kernels for M ≤ 8, 16, 32 rows, and their launch with (size + per_block - 1) / per_block
// blocks. The blocks of mma are persistent, so fewer suffice: one, two or three here.
template <typename T> struct Family {
  const char* name;
  GateUp<T> gate_up[3];
  Linear<T> linear[3];
  int threads, gate_up_per_block, linear_per_block;
  bool any_shape;
  int blocks(int size, int per_block) const {
    const int all = (size + per_block - 1) / per_block;
    return any_shape ? all : std::min(all, 1 + int(seed() % 3));
  }
};

#define NAMES(KIND, FAMILY, T) {KIND##_##FAMILY##_##T##_n1, KIND##_##FAMILY##_##T##_n2, KIND##_##FAMILY##_##T##_n4}
#define NAMES_W(KIND, T, W) {KIND##_mma_##T##_n1_w##W, KIND##_mma_##T##_n2_w##W, KIND##_mma_##T##_n4_w##W}
#define MMA(T, W) Family<T>{"mma " #T " w" #W, NAMES_W(gate_up, T, W), NAMES_W(linear, T, W), 32 * W, 8, 16, false}
const Family<bf16> BF16[] = {MMA(bf16, 8), MMA(bf16, 16),
                             {"fma bf16", {gate_up_fma_bf16, gate_up_fma_bf16, gate_up_fma_bf16},
                              {linear_fma_bf16, linear_fma_bf16, linear_fma_bf16}, 128, 8, 4, true}};
const Family<f16> F16[] = {MMA(f16, 8), MMA(f16, 16),
                           {"fma f16", {gate_up_fma_f16, gate_up_fma_f16, gate_up_fma_f16},
                            {linear_fma_f16, linear_fma_f16, linear_fma_f16}, 128, 8, 4, true}};
const Family<float> F32[] = {{"fma f32", NAMES(gate_up, fma, f32), NAMES(linear, fma, f32), 128, 8, 4, true}};

int variant(int M) { return M <= 8 ? 0 : M <= 16 ? 1 : 2; }

// Σ x·w + b of one row and feature, and the bound of its error in f32.
struct Sum {
  Wide value = 0, error = 0;
};
template <typename T> Sum dot(const T* x, const T* w, const T* bias, int K) {
  Sum s;
  Wide size = bias ? fabsl(value(*bias)) : 0;
  s.value = bias ? Wide(value(*bias)) : 0;
  for (int k = 0; k < K; ++k) {
    const Wide product = Wide(value(x[k])) * value(w[k]);
    s.value += product;
    size += fabsl(product);
  }
  s.error = (K + 2) * Wide(U) * size;
  return s;
}

// Until the previous kernel is done, x is NaN and the output must not change.
template <typename T> struct Previous {
  Buffer<T>&x, &out;
  std::vector<T> real, before;
  Previous(Buffer<T>& x, Buffer<T>& out) : x(x), out(out), real(x.copy()) {}
  void operator()(bool done) {
    if (done) {
      if (!out.same(before)) report(false, "written before pdl_wait");
      std::copy(real.begin(), real.end(), x.data);
    } else {
      before = out.copy();
      x.poison();
    }
  }
};

enum BiasKind { NONE, BOTH, GATE_ONLY, UP_ONLY };

template <typename T> struct Block {
  int M, I, H;
  Buffer<T> x, gate_up, b_gate, b_up, h;
  Block(int M, int I, int H, size_t shift = 0)
      : M(M), I(I), H(H), x(size_t(M) * H, 16, shift), gate_up(size_t(2) * I * H, 16, shift), b_gate(I, 2), b_up(I, 2),
        h(size_t(M) * I, 2) {
    x.fill(1);
    gate_up.fill(2 / sqrt(H));
    b_gate.fill(1);
    b_up.fill(1);
  }
  const T* up() const { return gate_up.data + size_t(I) * H; }
  void run(const Family<T>& family, const GluParams& op, BiasKind bias, unsigned seed, int rows, int blocks = 0) {
    const T* bg = bias == BOTH || bias == GATE_ONLY ? b_gate.data : nullptr;
    const T* bu = bias == BOTH || bias == UP_ONLY ? b_up.data : nullptr;
    h.poison();
    emu::launch(blocks ? blocks : family.blocks(I, family.gate_up_per_block), family.threads, 1, 0, seed,
                [&] { family.gate_up[variant(rows)](x.data, gate_up.data, up(), bg, bu, h.data, rows, I, H, op); }, Previous<T>(x, h));
  }
  void verify(const GluParams& op, BiasKind bias) {
    bool ok = true;
    for (int m = 0; m < M; ++m)
      for (int i = 0; i < I; ++i) {
        const T* const row = x.data + size_t(m) * H;
        const T* const bg = bias == BOTH || bias == GATE_ONLY ? b_gate.data + i : nullptr;
        const T* const bu = bias == BOTH || bias == UP_ONLY ? b_up.data + i : nullptr;
        const Sum g = dot(row, gate_up.data + size_t(i) * H, bg, H), u = dot(row, up() + size_t(i) * H, bu, H);
        ok &= close(h.data[size_t(m) * I + i], glu(op, g.value, u.value), glu_error<float>(op, g.value, u.value, g.error, u.error));
      }
    report(ok, "h differs from the definition");
    report(h.surroundings_untouched(), "written beyond h");
  }
};

const GluParams PLAIN = {SILU, 0, 1, INFINITY, 0}, GPT_OSS = {SWISH, 1.702f, 1, 0.75f, 1};
const GluParams OPS[] = {PLAIN, {SWISH, 1.702f, 1, INFINITY, 0}, {SIGMOID, 0, 1, INFINITY, 0}, {RELU, 0, 1, INFINITY, 0},
                     {GELU, 0, 1, INFINITY, 0}, {GELU_TANH, 0, 1, INFINITY, 0}, {IDENTITY, 0, 1, INFINITY, 0}, GPT_OSS,
                     {SILU, 0, 0.5f, INFINITY, 0}, {GELU, 0, 2, 1.5f, -1}, {IDENTITY, 0, 1, 0.5f, 0}, {SILU, 0, 1, INFINITY, 0.25f},
                     {RELU2, 0, 1, INFINITY, 0}};

template <typename T>
void gate_up_case(const Family<T>& family, int M, int I, int H, const GluParams& op, BiasKind bias, size_t shift = 0) {
  current = std::string("gate_up ") + family.name + " M=" + std::to_string(M) + " I=" + std::to_string(I) + " H=" + std::to_string(H) +
            " activation " + std::to_string(op.activation) + " bias " + std::to_string(bias);
  Block<T> b(M, I, H, shift);
  b.run(family, op, bias, seed(), M);
  b.verify(op, bias);
}

template <typename T> void linear_case(const Family<T>& family, int M, int N, int K, float factor, bool bias, size_t shift = 0) {
  current = std::string("linear ") + family.name + " M=" + std::to_string(M) + " N=" + std::to_string(N) + " K=" + std::to_string(K);
  Buffer<T> x(size_t(M) * K, 16, shift), w(size_t(N) * K, 16, shift), b(N, 2), y(size_t(M) * N, 2);
  x.fill(1);
  w.fill(1 / sqrt(K));
  b.fill(1);
  const T* const bp = bias ? b.data : nullptr;
  emu::launch(family.blocks(N, family.linear_per_block), family.threads, 1, 0, seed(),
              [&] { family.linear[variant(M)](x.data, w.data, bp, y.data, M, N, K, factor); }, Previous<T>(x, y));
  bool ok = true;
  for (int m = 0; m < M; ++m)
    for (int n = 0; n < N; ++n) {
      const Sum s = dot(x.data + size_t(m) * K, w.data + size_t(n) * K, bias ? b.data + n : nullptr, K);
      const Wide want = s.value * factor;
      ok &= close(y.data[size_t(m) * N + n], want, fabsl(factor) * s.error + fabsl(want) * Wide(U));
    }
  report(ok, "y differs from the definition");
  report(y.surroundings_untouched(), "written beyond y");
}

// Sizes at the edges. mma: 8 k of a load, 32, chunk 64, run 128, and 8 and 16 times those. fma: 32
// and 128 k of a warp, and 4 times those. Features: 8 and 16, 2 and 4, and several tiles of a
// block.
const std::vector<int> MMA_K = {8, 24, 32, 40, 56, 64, 72, 120, 128, 136, 192, 200, 256, 264, 504, 512, 520, 1024, 1032, 1096, 2048, 2056, 2184};
const std::vector<int> FMA_K = {1, 2, 3, 4, 31, 32, 33, 100, 127, 128, 129, 131, 132, 255, 256, 257, 511, 512, 513, 516, 1027, 1028};
const std::vector<int> FEATURES = {1, 2, 3, 4, 5, 7, 8, 9, 15, 16, 17, 31, 32, 33, 65};

template <typename T, size_t N> void sizes(const Family<T> (&families)[N]) {
  for (const auto& family : families) {
    begin_group((std::string(family.name) + ": M = 1..32").c_str());
    for (int M = 1; M <= 32; ++M) {
      const int K = family.any_shape ? 65 + M : 64 + 8 * (M % 5), features = 9 + M % 3;
      gate_up_case(family, M, features, K, OPS[M % 12], BiasKind(M % 4));
      linear_case(family, M, features, K, M % 2 ? 1.0f : 0.75f, M % 3 == 0);
    }
    begin_group((std::string(family.name) + ": edges of K, of features").c_str());
    int i = 0;
    for (const int K : family.any_shape ? FMA_K : MMA_K) {
      gate_up_case(family, 1 + i % 9, FEATURES[i % FEATURES.size()], K, OPS[i % 12], BiasKind(i % 4));
      linear_case(family, 1 + i % 9, FEATURES[(i + 5) % FEATURES.size()], K, 1, i % 2);
      ++i;
    }
    for (const int features : FEATURES) {
      gate_up_case(family, 3, features, family.any_shape ? 37 : 80, PLAIN, NONE);
      linear_case(family, 17, features, family.any_shape ? 36 : 80, 2, true);
    }
    if (family.any_shape) {
      begin_group((std::string(family.name) + ": misaligned").c_str());
      for (size_t shift = 1; shift < 16 / sizeof(T); ++shift) {
        gate_up_case(family, 3, 5, 136, PLAIN, BOTH, shift);
        linear_case(family, 3, 5, 136, 1, true, shift);
      }
    }
  }
}

template <typename T> void every_activation(const Family<T>& family) {
  begin_group((std::string(family.name) + ": activations x biases").c_str());
  for (const GluParams& op : OPS)
    for (const BiasKind bias : {NONE, BOTH, GATE_ONLY, UP_ONLY}) gate_up_case(family, 9, 11, 72, op, bias);
}

// Some warps read the sums of one tile while others, in random order, compute the next.
template <typename T> void tiles_of_one_block(const Family<T>& family) {
  begin_group((std::string(family.name) + ": many tiles for a block").c_str());
  for (const int rows : {8, 16, 32}) {
    current = "tiles of one block, M=" + std::to_string(rows);
    Block<T> b(rows, 41, 72);
    for (unsigned turn = 0; turn < 8; ++turn) {
      b.run(family, PLAIN, BOTH, 2 + 3 * turn, rows, 1);
      b.verify(PLAIN, BOTH);
    }
  }
}

// The bits are the same in every order of execution, and for a row among more rows or fewer.
template <typename T> void determinism(const Family<T>& family) {
  begin_group((std::string(family.name) + ": the same bits").c_str());
  current = "determinism";
  const int I = 11, H = family.any_shape ? 515 : 2184;
  Block<T> b(32, I, H);
  b.run(family, GPT_OSS, BOTH, 0, 32);
  const std::vector<T> first = b.h.copy();
  for (unsigned seed = 1; seed < 5; ++seed) {
    b.run(family, GPT_OSS, BOTH, seed, 32);
    report(b.h.same(first), "another order of execution, other bits");
  }
  for (const int rows : {1, 8, 9, 16, 17}) {
    b.run(family, GPT_OSS, BOTH, unsigned(rows), rows);
    report(memcmp(b.h.data, first.data(), size_t(rows) * I * sizeof(T)) == 0, "fewer rows, other bits");
  }
}

// NaN and infinity affect all results that depend on them, and no others.
template <typename T> void propagation(const Family<T>& family) {
  begin_group((std::string(family.name) + ": NaN and infinity").c_str());
  const int M = 11, I = 13, H = 72;
  for (int where = 0; where < 3; ++where) {
    current = std::string("propagation ") + std::to_string(where);
    Block<T> b(M, I, H);
    b.run(family, PLAIN, BOTH, 1, M);
    const std::vector<T> clean = b.h.copy();
    const int row = 9, feature = 12, k = where == 1 ? 71 : 3;
    if (where == 0) b.x.data[row * H + k] = number<T>(NAN);
    if (where == 1) b.gate_up.data[(I + feature) * H + k] = number<T>(NAN);
    if (where == 2) {  // gate of one feature is -∞ in every row
      for (int m = 0; m < M; ++m) b.x.data[m * H + k] = number<T>(1);
      b.run(family, PLAIN, BOTH, 1, M);
      std::copy(b.h.data, b.h.data + M * I, const_cast<T*>(clean.data()));
      b.gate_up.data[feature * H + k] = number<T>(-INFINITY);
    }
    b.run(family, PLAIN, BOTH, 2, M);
    bool reached = true, others = true;
    for (int m = 0; m < M; ++m)
      for (int i = 0; i < I; ++i) {
        const double v = value(b.h.data[m * I + i]);
        const bool hit = where == 0 ? m == row : i == feature;
        if (hit) reached &= where == 2 ? v == 0 : v != v;
        else others &= memcmp(&b.h.data[m * I + i], &clean[m * I + i], sizeof(T)) == 0;
      }
    report(reached, where == 2 ? "silu(-inf) is not 0" : "NaN lost");
    report(others, "reached another row or feature");
  }
}

template <typename T, size_t N> void all(const Family<T> (&families)[N]) {
  sizes(families);
  for (const auto& family : families) {
    every_activation(family);
    if (!family.any_shape) tiles_of_one_block(family);
    determinism(family);
    propagation(family);
  }
}

}  // namespace

int main() {
  signal(SIGSEGV, on_segv);
  all(BF16);
  all(F16);
  all(F32);
  return summary();
}
