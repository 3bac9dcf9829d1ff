// prefill_sm90.cu on the emulator against the definition. Bounds as in decode_test.cpp.
#include "check.h"
#include "prefill_sm90.cu"

using namespace check;

namespace {

template <typename T> using Kernel = void (*)(TensorMap, TensorMap, TensorMap, TensorMap, const T*, const T*, int, int, int, GluParams);
// One kernel: blocks of a cluster, features of a tile, and the shared memory it needs.
template <typename T> struct Variant {
  int cluster, width;
  Kernel<T> kernel;
  uint32_t shared;
};
#define VARIANT(T, C, W) {C, W, gate_up_sm90_##T##_c##C##_w##W, Size<W>::SHARED}
#define VARIANTS(T)                                                                                                          \
  {VARIANT(T, 1, 64), VARIANT(T, 1, 80),  VARIANT(T, 1, 96),  VARIANT(T, 1, 112),                                            \
   VARIANT(T, 1, 128), VARIANT(T, 2, 96), VARIANT(T, 2, 112), VARIANT(T, 2, 128)}
const Variant<bf16> BF16[] = VARIANTS(bf16);
const Variant<f16> F16[] = VARIANTS(f16);
template <typename T> const Variant<T>& variant(int cluster, int width) {
  if constexpr (std::is_same<T, bf16>::value) return *std::find_if(BF16, BF16 + 8, [=](const auto& v) { return v.cluster == cluster && v.width == width; });
  else return *std::find_if(F16, F16 + 8, [=](const auto& v) { return v.cluster == cluster && v.width == width; });
}
const int WIDTHS[] = {128, 112, 96, 80, 64};  // the first three in clusters of 2 too

template <typename T> TensorMap map_of(Buffer<T>& buffer, size_t offset, int rows, int columns, uint32_t box_rows, uint32_t box_columns = 64) {
  return {buffer.data + offset, uint64_t(columns), uint64_t(rows), box_columns, box_rows};
}

struct Shape {
  int M, I, H, cluster, most_clusters, width = 128;
};

template <typename T> struct Layer {
  Shape s;
  Buffer<T> x, gate_up, b_gate, b_up, h;
  explicit Layer(Shape s)
      : s(s), x(size_t(s.M) * s.H), gate_up(size_t(2) * s.I * s.H), b_gate(s.I, 2), b_up(s.I, 2), h(size_t(s.M) * s.I) {
    x.fill(1);
    gate_up.fill(2 / sqrt(s.H));
    b_gate.fill(1);
    b_up.fill(1);
  }
  void run(const GluParams& op, bool bg, bool bu, unsigned seed) {
    const std::vector<T> real = x.copy();
    std::vector<T> before;
    const auto previous = [&](bool done) {
      if (done) {
        if (!h.same(before)) report(false, "written before pdl_wait");
        std::copy(real.begin(), real.end(), x.data);
      } else {
        before = h.copy();
        x.poison();
      }
    };
    const Variant<T>& v = variant<T>(s.cluster, s.width);
    const TensorMap mx = map_of(x, 0, s.M, s.H, 128), mg = map_of(gate_up, 0, s.I, s.H, s.width),
                    mu = map_of(gate_up, size_t(s.I) * s.H, s.I, s.H, s.width), mh = map_of(h, 0, s.M, s.I, 64, s.width % 64 ? 16 : 64);
    const int tiles = (s.M + 128 * s.cluster - 1) / (128 * s.cluster) * ((s.I + s.width - 1) / s.width);
    h.poison();
    emu::launch(std::min(tiles, s.most_clusters) * s.cluster, 384, s.cluster, v.shared, seed, [&] {
      v.kernel(mx, mg, mu, mh, bg ? b_gate.data : nullptr, bu ? b_up.data : nullptr, s.M, s.I, s.H, op);
    }, previous);
  }
  void verify(const GluParams& op, bool bg, bool bu) {
    std::vector<double> xs(x.n), ws(gate_up.n);
    for (size_t i = 0; i < x.n; ++i) xs[i] = value(x.data[i]);
    for (size_t i = 0; i < gate_up.n; ++i) ws[i] = value(gate_up.data[i]);
    // Sums in f64, whose error is 2^-29 of the bound.
    const auto dot = [&](int m, int row, double bias, double& size) {
      double sum = bias;
      size = fabs(bias);
      for (int k = 0; k < s.H; ++k) {
        const double product = xs[size_t(m) * s.H + k] * ws[size_t(row) * s.H + k];
        sum += product;
        size += fabs(product);
      }
      return sum;
    };
    bool ok = true;
    for (int m = 0; m < s.M; ++m)
      for (int i = 0; i < s.I; ++i) {
        double gate_size, up_size;
        const double g = dot(m, i, bg ? value(b_gate.data[i]) : 0, gate_size);
        const double u = dot(m, s.I + i, bu ? value(b_up.data[i]) : 0, up_size);
        const Wide unit = (s.H + 2) * Wide(U);
        const Wide error = glu_error<float>(op, g, u, unit * gate_size, unit * up_size);
        ok &= close(h.data[size_t(m) * s.I + i], glu(op, g, u), error);
      }
    report(ok, "h differs from the definition");
    report(h.surroundings_untouched(), "written beyond h");
  }
};

const float INF = INFINITY;
const GluParams PLAIN = {SILU, 0, 1, INF, 0};
const GluParams OPS[] = {PLAIN, {SWISH, 1.702f, 1, INF, 0}, {SIGMOID, 0, 1, INF, 0}, {RELU, 0, 1, INF, 0}, {GELU, 0, 1, INF, 0},
                     {GELU_TANH, 0, 1, INF, 0}, {IDENTITY, 0, 1, INF, 0}, {SWISH, 1.702f, 1, 0.75f, 1}, {SILU, 0, 0.5f, INF, 0},
                     {GELU, 0, 2, 1.5f, -1}, {RELU2, 0, 1, INF, 0}};

int turn = 0;
template <typename T> void run_case(Shape s, const GluParams& op, int bias) {
  current = "M=" + std::to_string(s.M) + " I=" + std::to_string(s.I) + " H=" + std::to_string(s.H) + " c" + std::to_string(s.cluster) +
            " w" + std::to_string(s.width) + " activation " + std::to_string(op.activation) + " bias " + std::to_string(bias) + " seed " + std::to_string(turn);
  Layer<T> layer(s);
  layer.run(op, bias & 1, bias & 2, unsigned(turn++));  // every order with every timing in nine turns
  layer.verify(op, bias & 1, bias & 2);
}

// Rows at the edges of 64 and 128 (256 in a cluster of 2), features at those of 64 and 128, k at
// those of 16, 64 and the ring of 4 x 64.
template <typename T> void shapes(const char* name) {
  for (const int width : WIDTHS)
    for (int cluster = 1; cluster <= (width >= 96 ? 2 : 1); ++cluster) {
      begin_group((std::string("sm90 ") + name + " c" + std::to_string(cluster) + " w" + std::to_string(width)).c_str());
      for (const int I : {8, 16, width - 8, width, width + 8, width + 16, 2 * width, 2 * width + 72})
        run_case<T>({20 + I % 90, I, 8 + I % 5 * 72, cluster, 1 + I % 3, width}, OPS[I / 8 % 10], I / 8 % 4);
      for (const int H : {64, 256, 264, 320, 328, 384, 392, 520}) run_case<T>({130, width + 24, H, cluster, 1, width}, PLAIN, 0);
    }
  begin_group((std::string("sm90 ") + name + ": M = 1..40").c_str());
  for (int M = 1; M <= 40; ++M) run_case<T>({M, 8 + 8 * (M % 3), 8 + 8 * (M % 11), 1 + M % 2, 99}, PLAIN, 0);
  begin_group((std::string("sm90 ") + name + ": M around 64, 128, 256, 384").c_str());
  for (const int M : {63, 64, 65, 127, 128, 129, 191, 193, 255, 256, 257, 383, 385})
    for (const int cluster : {1, 2}) run_case<T>({M, 72, 72, cluster, 99}, PLAIN, 0);
  begin_group((std::string("sm90 ") + name + ": edges of I and of H").c_str());
  for (const int I : {8, 56, 64, 72, 120, 128, 136, 192, 200, 264}) run_case<T>({40, I, 24, 1 + I / 8 % 2, 99}, PLAIN, 3);
  for (const int H : {8, 16, 24, 56, 64, 72, 120, 128, 136, 192, 248, 256, 264, 320, 520})
    run_case<T>({20, 16, H, 1 + H / 8 % 2, 99}, PLAIN, 0);
  begin_group((std::string("sm90 ") + name + ": many tiles for a block").c_str());
  for (const int cluster : {1, 2})
    for (const int most : {1, 2, 3}) run_case<T>({150 * cluster, 264, 136, cluster, most}, PLAIN, most);
  run_case<T>({128 * 9 + 1, 136, 8, 1, 3}, PLAIN, 0);  // more than one strip of 8 tile rows
  run_case<T>({256 * 9 + 1, 136, 8, 2, 2}, PLAIN, 0);
}

// A store is late while other warps run ahead: the next tile must not overwrite the one that is
// being stored. The test repeats random order with effects at the last moment, because the error
// shows only if a warp sleeps at that moment.
template <typename T> void late_stores(const char* name) {
  begin_group((std::string("sm90 ") + name + ": late stores").c_str());
  for (unsigned seed = 5; seed < 5 + 9 * 16; seed += 9) {
    current = "late stores, seed " + std::to_string(seed);
    Layer<T> layer({128, 64 * 6, 8, 1, 1, 64});
    layer.run(PLAIN, false, false, seed);
    layer.verify(PLAIN, false, false);
  }
}

template <typename T> void operations(const char* name) {
  begin_group((std::string("sm90 ") + name + ": activations x biases").c_str());
  for (const GluParams& op : OPS)
    for (int bias = 0; bias < 4; ++bias) run_case<T>({33, 136, 72, 1 + bias % 2, 99}, op, bias);
}

template <typename T> void same_bits(const char* name) {
  begin_group((std::string("sm90 ") + name + ": the same bits, NaN and infinity").c_str());
  for (const int cluster : {1, 2}) {
    current = "determinism";
    Layer<T> layer({140, 136, 328, cluster, 1});
    layer.run(OPS[7], true, true, 0);
    const std::vector<T> first = layer.h.copy();
    for (unsigned seed = 1; seed < 9; ++seed) {
      layer.run(OPS[7], true, true, seed);
      report(layer.h.same(first), "another order of execution, other bits");
    }
    current = "propagation";
    layer.run(PLAIN, false, false, 0);
    const std::vector<T> clean = layer.h.copy();
    layer.x.data[130 * 328 + 327] = number<T>(NAN);
    layer.gate_up.data[(136 + 131) * 328 + 5] = number<T>(NAN);
    layer.run(PLAIN, false, false, 4);
    bool reached = true, others = true;
    for (int m = 0; m < 140; ++m)
      for (int i = 0; i < 136; ++i) {
        const size_t at = size_t(m) * 136 + i;
        const double v = value(layer.h.data[at]);
        if (m == 130 || i == 131) reached &= v != v;
        else others &= memcmp(&layer.h.data[at], &clean[at], sizeof(T)) == 0;
      }
    report(reached, "NaN lost");
    report(others, "NaN reached another row or feature");
  }
}

}  // namespace

int main() {
  signal(SIGSEGV, on_segv);
  shapes<bf16>("bf16");
  late_stores<bf16>("bf16");
  operations<bf16>("bf16");
  same_bits<bf16>("bf16");
  shapes<f16>("f16");
  operations<f16>("f16");
  return summary();
}
