// The computation of each kernel by its contract, and the conditions of the contract on the launch.
// Our kernels come first, then those of candle that the tests need.
#include <cmath>
#include <map>
#include <tuple>

#include "model.h"

namespace {

constexpr size_t SMS = 7;

template <typename T> T argument(const Launch& launch, int n) {
  T value;
  memcpy(&value, launch.arguments[n], sizeof value);
  return value;
}

size_t ceil_div(size_t a, size_t b) { return (a + b - 1) / b; }

void require_grid(const Launch& launch, size_t grid, unsigned block) {
  REQUIRE(launch.grid == grid && launch.block == block && launch.shared == 0, "%s: grid %u, block %u, shared %u, expected %zu, %u, 0",
          launch.name.c_str(), launch.grid, launch.block, launch.shared, grid, block);
}

Type type_named(const std::string& name) {
  if (name == "f32") return Type::F32;
  if (name == "f64") return Type::F64;
  if (name == "f16") return Type::F16;
  REQUIRE(name == "bf16", "no type %s", name.c_str());
  return Type::BF16;
}

std::vector<std::string> split(const std::string& name) {
  std::vector<std::string> parts(1);
  for (char c : name)
    if (c == '_') parts.emplace_back();
    else parts.back().push_back(c);
  return parts;
}

bool begins(const std::string& name, const char* prefix) { return name.rfind(prefix, 0) == 0; }

// ---- the gate

struct GluParams {
  int activation;
  float beta, gate_multiplier, limit, up_offset;
};

// As in src/reference.rs.

struct Value {
  double value, slope;
};

Value sigmoid(double z) {
  const double t = std::exp(-std::fabs(z)), q = 1 / (1 + t);
  return {z < 0 ? t * q : q, t * q * q};
}

double bounded(double x, double bound) { return x > bound ? bound : x < -bound ? -bound : x; }

double tail(double g, double s) { return s == 0 ? -0.0 : g * s; }

Value swish(double g, double beta) {
  const double z = bounded(beta * g, 800);
  const auto [s, ds] = sigmoid(z);
  return {tail(g, s), s + z * ds};
}

Value act(const GluParams& op, double g) {
  constexpr double K = 1.5957691216057307, SQRT_HALF = 0.70710678118654752440, INV_SQRT_2PI = 0.3989422804014327;
  const double x = bounded(g, 40);
  switch (op.activation) {
    case 0: return swish(g, 1);
    case 1: return swish(g, op.beta);
    case 2: return sigmoid(g);
    case 3: return g <= 0 ? Value{0, 0} : Value{g, 1};
    case 4: {
      const double cdf = 0.5 * std::erfc(-x * SQRT_HALF);
      return {tail(g, cdf), cdf + x * INV_SQRT_2PI * std::exp(-0.5 * x * x)};
    }
    case 5: {
      const auto [s, ds] = sigmoid(K * (x + 0.044715 * x * x * x));
      return {tail(g, s), s + x * ds * K * (1 + 3 * 0.044715 * x * x)};
    }
    case 6: return {g, 1};
    case 7: return g <= 0 ? Value{0, 0} : Value{g * g, 2 * g};
  }
  fail("no activation %d", op.activation);
}

// The two factors of a pair, and whether each side is within the limit.
struct Factors {
  Value act;
  double up;
  bool in_gate, in_up;
};

Factors factors(const GluParams& op, double gate, double up) {
  const bool limited = std::isfinite(op.limit);
  const double g = gate * op.gate_multiplier;
  const bool beyond_gate = limited && g >= op.limit, beyond_up = limited && std::fabs(up) >= op.limit;
  return {act(op, beyond_gate ? op.limit : g), bounded(up, op.limit) + op.up_offset, !beyond_gate, !beyond_up};
}

double glu(const GluParams& op, double gate, double up) {
  const Factors f = factors(op, gate, up);
  return f.act.value * f.up;
}

// ---- decode.cu

struct Decode {
  std::string family;
  Type type;
  size_t rows, warps;  // the variant's
};

Decode decode_of(const std::string& name, const char* op) {
  const auto parts = split(name.substr(strlen(op)));
  Decode d{parts[0], type_named(parts[1]), 32, parts.back() == "w16" ? size_t(16) : size_t(8)};
  if (parts.size() > 2 && parts[2] == "n1") d.rows = 8;
  if (parts.size() > 2 && parts[2] == "n2") d.rows = 16;
  return d;
}

void require_decode(const Launch& launch, const Decode& d, size_t m, size_t k, bool linear, size_t features, std::initializer_list<uint64_t> aligned) {
  REQUIRE(m >= 1 && m <= d.rows && (m > d.rows / 2 || d.rows == 8 || d.family == "fma"), "%s for %zu rows", launch.name.c_str(), m);
  if (d.family == "fma") return require_grid(launch, ceil_div(features, linear ? 4 : 8), 128);
  REQUIRE(k % 8 == 0, "%s: K = %zu", launch.name.c_str(), k);
  for (uint64_t address : aligned) REQUIRE(address % 16 == 0, "%s: an operand off 16 bytes", launch.name.c_str());
  const size_t tiles = ceil_div(features, linear ? 16 : 8);
  REQUIRE(d.warps == (tiles <= SMS ? 16 : 8), "%s for %zu tiles", launch.name.c_str(), tiles);
  require_grid(launch, std::min(tiles, 16 / d.warps * SMS), 32 * d.warps);
}

std::vector<double> widened(const Operand& from, size_t start, size_t n) {
  std::vector<double> wide(n);
  for (size_t i = 0; i < n; ++i) wide[i] = from.at(start + i);
  return wide;
}

// Row `row` of x (M,K) · w (K)
double dot(const std::vector<double>& x, size_t row, const std::vector<double>& w) {
  double sum = 0;
  for (size_t p = 0; p < w.size(); ++p) sum += x[row * w.size() + p] * w[p];
  return sum;
}

Work gate_up(Type t, uint64_t x, uint64_t wg, uint64_t wu, uint64_t bg, uint64_t bu, uint64_t h, size_t m, size_t i, size_t k, GluParams op) {
  return [=] {
    const auto X = operand(t, x, m * k, "x"), G = operand(t, wg, i * k, "gate"), U = operand(t, wu, i * k, "up"), H = operand(t, h, m * i, "h");
    const auto BG = operand(t, bg, bg ? i : 0, "gate's bias"), BU = operand(t, bu, bu ? i : 0, "up's bias");
    const auto rows = widened(X, 0, m * k);
    for (size_t c = 0; c < i; ++c) {
      const auto gate = widened(G, c * k, k), up = widened(U, c * k, k);
      for (size_t r = 0; r < m; ++r)
        H.put(r * i + c, glu(op, dot(rows, r, gate) + (bg ? BG.at(c) : 0), dot(rows, r, up) + (bu ? BU.at(c) : 0)));
    }
  };
}

Work gate_up_kernel(const Launch& l) {
  const auto a = [&](int n) { return argument<uint64_t>(l, n); };
  const size_t m = argument<int>(l, 6), i = argument<int>(l, 7), h = argument<int>(l, 8);
  const Decode d = decode_of(l.name, "gate_up_");
  require_decode(l, d, m, h, false, i, {a(0), a(1), a(2)});
  return gate_up(d.type, a(0), a(1), a(2), a(3), a(4), a(5), m, i, h, argument<GluParams>(l, 9));
}

Work linear_kernel(const Launch& l) {
  const uint64_t x = argument<uint64_t>(l, 0), w = argument<uint64_t>(l, 1), bias = argument<uint64_t>(l, 2), y = argument<uint64_t>(l, 3);
  const size_t m = argument<int>(l, 4), n = argument<int>(l, 5), k = argument<int>(l, 6);
  const float factor = argument<float>(l, 7);
  const Decode d = decode_of(l.name, "linear_");
  require_decode(l, d, m, k, true, n, {x, w});
  return [=, t = d.type] {
    const auto X = operand(t, x, m * k, "x"), W = operand(t, w, n * k, "the weight"), Y = operand(t, y, m * n, "y");
    const auto B = operand(t, bias, bias ? n : 0, "the bias");
    const auto rows = widened(X, 0, m * k);
    for (size_t c = 0; c < n; ++c) {
      const auto weight = widened(W, c * k, k);
      for (size_t r = 0; r < m; ++r) Y.put(r * n + c, (dot(rows, r, weight) + (bias ? B.at(c) : 0)) * factor);
    }
  };
}

// ---- prefill_sm90.cu

struct Map {
  uint64_t address, rows, columns, box, type, box_columns, rest[10];
};

Work prefill_kernel(const Launch& l) {
  const Map x = argument<Map>(l, 0), g = argument<Map>(l, 1), u = argument<Map>(l, 2), h = argument<Map>(l, 3);
  const size_t m = argument<int>(l, 6), i = argument<int>(l, 7), k = argument<int>(l, 8);
  // gate_up_sm90_bf16_c2_w128
  const size_t c = split(l.name)[4][1] - '0', w = std::stoi(split(l.name)[5].substr(1));
  REQUIRE(k % 8 == 0 && i % 8 == 0 && (c == 1 || m > 128), "%s for M, H, I = %zu, %zu, %zu", l.name.c_str(), m, k, i);
  const std::map<size_t, unsigned> shared{{64, 214272}, {80, 206080}, {96, 230656}, {112, 210176}, {128, 230656}};
  const size_t tiles = ceil_div(m, 128 * c) * ceil_div(i, w), columns = w % 64 ? 16 : 64;
  REQUIRE(l.grid == c * std::min(tiles, SMS / c) && l.block == 384 && l.shared == shared.at(w), "%s: grid %u, block %u, shared %u", l.name.c_str(),
          l.grid, l.block, l.shared);
  for (auto [map, rows, columns, box, box_columns] : {std::tuple{x, m, k, size_t(128), size_t(64)}, {g, i, k, w, 64}, {u, i, k, w, 64}, {h, m, i, 64, columns}})
    REQUIRE(map.rows == rows && map.columns == columns && map.box == box && map.box_columns == box_columns,
            "a map of %lu by %lu in boxes of %lu rows by %lu", map.rows, map.columns, map.box, map.box_columns);
  return gate_up(type_named(split(l.name)[3]), x.address, g.address, u.address, argument<uint64_t>(l, 4), argument<uint64_t>(l, 5), h.address, m, i,
                 k, argument<GluParams>(l, 9));
}

// ---- gate.cu

void require_elementwise(const Launch& l, Type t, size_t rows, size_t columns) {
  const size_t threads = rows * ceil_div(columns, 16 / size_of(t));
  require_grid(l, std::min(std::max<size_t>(ceil_div(threads, 256), 1), 16 * SMS), 256);
}

size_t extent(size_t rows, size_t columns, size_t stride) { return rows && columns ? (rows - 1) * stride + columns : 0; }

Work gate_forward_kernel(const Launch& l) {
  const Type t = type_named(split(l.name)[2]);
  const auto a = [&](int n) { return argument<uint64_t>(l, n); };
  const size_t rows = a(5), columns = a(6), gs = a(7), us = a(8), os = a(9);
  require_elementwise(l, t, rows, columns);
  return [=, gate = a(0), up = a(1), bg = a(2), bu = a(3), out = a(4), op = argument<GluParams>(l, 10)] {
    const auto G = operand(t, gate, extent(rows, columns, gs), "gate"), U = operand(t, up, extent(rows, columns, us), "up");
    const auto O = operand(t, out, extent(rows, columns, os), "out");
    const auto BG = operand(t, bg, bg ? columns : 0, "gate's bias"), BU = operand(t, bu, bu ? columns : 0, "up's bias");
    for (size_t r = 0; r < rows; ++r)
      for (size_t c = 0; c < columns; ++c)
        O.put(r * os + c, glu(op, G.at(r * gs + c) + (bg ? BG.at(c) : 0), U.at(r * us + c) + (bu ? BU.at(c) : 0)));
  };
}

Work gate_backward_kernel(const Launch& l) {
  const Type t = type_named(split(l.name)[2]);
  const auto a = [&](int n) { return argument<uint64_t>(l, n); };
  const size_t rows = a(5), columns = a(6), gs = a(7), us = a(8), ds = a(9), dgs = a(10), dus = a(11);
  require_elementwise(l, t, rows, columns);
  return [=, gate = a(0), up = a(1), dy = a(2), dgate = a(3), dup = a(4), op = argument<GluParams>(l, 12)] {
    const auto G = operand(t, gate, extent(rows, columns, gs), "gate"), U = operand(t, up, extent(rows, columns, us), "up"),
               D = operand(t, dy, extent(rows, columns, ds), "dy");
    const auto DG = operand(t, dgate, extent(rows, columns, dgs), "dgate"), DU = operand(t, dup, extent(rows, columns, dus), "dup");
    for (size_t r = 0; r < rows; ++r)
      for (size_t c = 0; c < columns; ++c) {
        const Factors f = factors(op, G.at(r * gs + c), U.at(r * us + c));
        const double d = D.at(r * ds + c);
        DG.put(r * dgs + c, f.in_gate ? d * f.up * f.act.slope * op.gate_multiplier : 0);
        DU.put(r * dus + c, f.in_up ? d * f.act.value : 0);
      }
  };
}

Work bias_rows_kernel(const Launch& l) {
  const Type t = type_named(split(l.name)[2]);
  const size_t rows = argument<uint64_t>(l, 2), columns = argument<uint64_t>(l, 3);
  require_elementwise(l, t, rows, columns);
  return [=, bias = argument<uint64_t>(l, 0), y = argument<uint64_t>(l, 1)] {
    const auto B = operand(t, bias, columns, "the bias"), Y = operand(t, y, rows * columns, "y");
    for (size_t i = 0; i < rows * columns; ++i) Y.put(i, B.at(i % columns));
  };
}

// ---- candle's

// The position of element i of a strided tensor. `info` has dims, then strides (on the device), or
// is null.
struct Strided {
  std::vector<uint64_t> dims, strides;
  Strided(uint64_t info, size_t rank, size_t skip = 0) {
    if (!info) return;
    const auto* numbers = static_cast<const uint64_t*>(span(info, (2 + (skip > 0)) * rank * 8, "dims and strides"));
    dims.assign(numbers, numbers + rank);
    strides.assign(numbers + rank + skip * rank, numbers + 2 * rank + skip * rank);
  }
  size_t at(size_t i) const {
    if (dims.empty()) return i;
    size_t place = 0;
    for (size_t d = dims.size(); d-- > 0; i /= dims[d]) place += i % dims[d] * strides[d];
    return place;
  }
  size_t extent(size_t n) const {
    if (dims.empty() || n == 0) return n;
    size_t last = 1;
    for (size_t d = 0; d < dims.size(); ++d) last += (dims[d] - 1) * strides[d];
    return last;
  }
};

// out[i] = f(in[i]), for any layout: (n, rank, info, in, out, ...)
Work unary(const Launch& l, Type from, Type to, std::function<double(double)> f, int first = 3) {
  const size_t n = argument<uint64_t>(l, 0), rank = argument<uint64_t>(l, 1);
  return [=, info = argument<uint64_t>(l, 2), in = argument<uint64_t>(l, first), out = argument<uint64_t>(l, first + 1)] {
    const Strided strided(info, rank);
    const auto A = operand(from, in, strided.extent(n), "input"), O = operand(to, out, n, "output");
    for (size_t i = 0; i < n; ++i) O.put(i, f(A.at(strided.at(i))));
  };
}

Work binary(const Launch& l, Type t, std::function<double(double, double)> f) {
  const size_t n = argument<uint64_t>(l, 0), rank = argument<uint64_t>(l, 1);
  return [=, info = argument<uint64_t>(l, 2), a = argument<uint64_t>(l, 3), b = argument<uint64_t>(l, 4), out = argument<uint64_t>(l, 5)] {
    const Strided sa(info, rank), sb(info, rank, 1);
    const auto A = operand(t, a, sa.extent(n), "left"), B = operand(t, b, sb.extent(n), "right"), O = operand(t, out, n, "output");
    for (size_t i = 0; i < n; ++i) O.put(i, f(A.at(sa.at(i)), B.at(sb.at(i))));
  };
}

// out[j] = the sum of elements j·each.. of the strided input: (n, each, rank, info, in, out)
Work sum(const Launch& l, Type t, bool small) {
  const size_t each = argument<uint64_t>(l, 1), n = argument<uint64_t>(l, 0) * (small ? each : 1), rank = argument<uint64_t>(l, 2);
  return [=, info = argument<uint64_t>(l, 3), in = argument<uint64_t>(l, 4), out = argument<uint64_t>(l, 5)] {
    const Strided strided(info, rank);
    const auto A = operand(t, in, strided.extent(n), "input"), O = operand(t, out, n / each, "output");
    for (size_t j = 0; j < n / each; ++j) {
      double total = 0;
      for (size_t i = 0; i < each; ++i) total += A.at(strided.at(j * each + i));
      O.put(j, total);
    }
  };
}

// (n, rank, info, value, out)
Work constant(const Launch& l, Type t) {
  const size_t n = argument<uint64_t>(l, 0), rank = argument<uint64_t>(l, 1);
  return [=, info = argument<uint64_t>(l, 2), value = read_element(t, l.arguments[3], 0), out = argument<uint64_t>(l, 4)] {
    const Strided strided(info, rank);
    const auto O = operand(t, out, strided.extent(n), "output");
    for (size_t i = 0; i < n; ++i) O.put(strided.at(i), value);
  };
}

Work copy2d(const Launch& l, Type t) {
  const size_t d1 = argument<uint32_t>(l, 2), d2 = argument<uint32_t>(l, 3), ss = argument<uint32_t>(l, 4), ds = argument<uint32_t>(l, 5);
  return [=, from = argument<uint64_t>(l, 0), to = argument<uint64_t>(l, 1)] {
    const auto A = operand(t, from, extent(d1, d2, ss), "source"), O = operand(t, to, extent(d1, d2, ds), "target");
    for (size_t i = 0; i < d1; ++i)
      for (size_t j = 0; j < d2; ++j) O.put(i * ds + j, A.at(i * ss + j));
  };
}

}  // namespace

Work kernel(const Launch& l) {
  const std::string& name = l.name;
  const auto parts = split(name);
  if (begins(name, "gate_up_sm90")) return prefill_kernel(l);
  if (begins(name, "gate_up")) return gate_up_kernel(l);
  if (begins(name, "linear")) return linear_kernel(l);
  if (begins(name, "gate_forward")) return gate_forward_kernel(l);
  if (begins(name, "gate_backward")) return gate_backward_kernel(l);
  if (begins(name, "bias_rows")) return bias_rows_kernel(l);
  if (begins(name, "copy2d")) return copy2d(l, type_named(parts[1]));
  if (begins(name, "ucopy")) return unary(l, type_named(parts[1]), type_named(parts[1]), [](double v) { return v; });
  if (begins(name, "cast")) return unary(l, type_named(parts[1]), type_named(parts[2]), [](double v) { return v; });
  if (begins(name, "affine"))
    return unary(l, type_named(parts[1]), type_named(parts[1]),
                 [m = read_element(type_named(parts[1]), l.arguments[5], 0),
                  a = read_element(type_named(parts[1]), l.arguments[6], 0)](double v) { return v * m + a; });
  if (begins(name, "fast_sum_small")) return sum(l, type_named(parts[3]), true);
  if (begins(name, "fast_sum")) return sum(l, type_named(parts[2]), false);
  if (begins(name, "const_set")) return constant(l, type_named(parts[2]));
  if (begins(name, "usqr")) return unary(l, type_named(parts[1]), type_named(parts[1]), [](double v) { return v * v; });
  for (auto [prefix, activation] : {std::pair{"usilu", 0}, {"usigmoid", 2}, {"urelu", 3}, {"ugelu_erf", 4}, {"ugelu", 5}})
    if (begins(name, prefix))
      return unary(l, type_named(parts.back()), type_named(parts.back()),
                   [op = GluParams{activation, 1, 1, INFINITY, 0}](double v) { return act(op, v).value; });
  if (begins(name, "badd")) return binary(l, type_named(parts[1]), [](double a, double b) { return a + b; });
  if (begins(name, "bmul")) return binary(l, type_named(parts[1]), [](double a, double b) { return a * b; });
  fail("no model of kernel %s", name.c_str());
}
