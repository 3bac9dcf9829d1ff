// The definition in f64, as in src/reference.rs, and bounds of the error of f32 arithmetic.
#pragma once
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <string>
#include <vector>

namespace reference {

const double U = std::ldexp(1, -24); // half a unit in the last place of an f32 in [1, 2)
const double INF = std::numeric_limits<double>::infinity();

struct Op {
    std::string name;
    Activation activation; // of gate.h
    double beta = 1, m = 1, limit = INF, c = 0;
    bool plain() const { return m == 1 && limit == INF && c == 0; }
};

inline std::vector<Op> ops() {
    const double b = 1.702f, m = 0.6875f;
    return {
        {"silu", SILU},
        {"swish(1.702)", SWISH, b},
        {"swish(-0.5)", SWISH, -0.5},
        {"sigmoid", SIGMOID},
        {"relu", RELU},
        {"gelu", GELU},
        {"gelu_tanh", GELU_TANH},
        {"identity", IDENTITY},
        {"relu2", RELU2},
        {"gpt-oss", SWISH, b, 1, 7, 1},
        {"falcon-h1", SILU, 1, m},
        {"gelu, limit, offset, multiplier", GELU, 1, -1.25, 0.5, -0.25},
        {"relu, limit", RELU, 1, 1, 0.75, 0},
    };
}

struct Slope { double value, slope; };

inline Slope sigmoid(double z) {
    const double t = std::exp(-std::fabs(z)), q = 1 / (1 + t);
    return {z < 0 ? t * q : q, t * q * q};
}

inline double bounded(double x, double bound) { return x > bound ? bound : x < -bound ? -bound : x; }

// g·s for a factor s in [0, 1] that has underflowed to 0 where g is very negative
inline double times_tail(double g, double s) { return s == 0 ? -0.0 : g * s; }

inline Slope activation(const Op& op, double g) {
    const double k = 1.5957691216057307, inv_sqrt_2pi = 0.3989422804014327, x = bounded(g, 40);
    switch (op.activation) {
        case SILU:
        case SWISH: {
            const double z = bounded(op.beta * g, 800);
            const Slope s = sigmoid(z);
            return {times_tail(g, s.value), s.value + z * s.slope};
        }
        case SIGMOID: return sigmoid(g);
        case RELU: return {g <= 0 ? 0 : g, g <= 0 ? 0.0 : 1.0};
        case GELU: {
            const double cdf = 0.5 * std::erfc(-x * std::sqrt(0.5));
            return {times_tail(g, cdf), cdf + x * inv_sqrt_2pi * std::exp(-0.5 * x * x)};
        }
        case GELU_TANH: {
            const Slope s = sigmoid(k * (x + 0.044715 * x * x * x));
            return {times_tail(g, s.value), s.value + x * s.slope * k * (1 + 3 * 0.044715 * x * x)};
        }
        case IDENTITY: return {g, 1};
        case RELU2: return g <= 0 ? Slope{0, 0} : Slope{g * g, 2 * g};
    }
    return {NAN, NAN};
}

// The argument of the activation, the factor from up, and whether each side is within the limit.
struct Inputs { double g, u; bool gate_within, up_within; };

inline Inputs inputs(const Op& op, double gate, double up) {
    const double scaled = gate * op.m;
    const bool limited = op.limit != INF, beyond = limited && scaled >= op.limit;
    return {beyond ? op.limit : scaled, bounded(up, op.limit) + op.c, !beyond, !(limited && std::fabs(up) >= op.limit)};
}

inline double glu(const Op& op, double gate, double up) {
    const Inputs in = inputs(op, gate, up);
    return activation(op, in.g).value * in.u;
}

struct Gradients { double dgate, dup; };

inline Gradients glu_gradient(const Op& op, double gate, double up, double dy) {
    const Inputs in = inputs(op, gate, up);
    const Slope a = activation(op, in.g);
    return {in.gate_within ? dy * in.u * a.slope * op.m : 0, in.up_within ? dy * a.value : 0};
}

// ---------------------------------------------------------------- bounds

// Relative error of act(g) alone, in units of U, as the CPU kernels document and their tests check.
// The argument of the exponential is rounded, and the slope of the exponential amplifies that: |z|
// for Swish, 4|v| for the tanh form.
inline double units(const Op& op, double g) {
    switch (op.activation) {
        case SILU:
        case SWISH: return 6 + (op.beta == 1 ? 0 : std::min(std::fabs(op.beta * g), 750.0));
        case SIGMOID: return 6;
        case GELU: return 12;
        case GELU_TANH: return 6 + 4 * std::min(std::fabs(1.596 * g + 0.07136 * g * g * g), 750.0);
        case RELU:
        case IDENTITY: return 0;
        case RELU2: return 1;
    }
    return NAN;
}

// |act'| of the family: gelu'(√2) = 1.129, silu' and any swish' stay below 1.1.
inline double steepest(const Op& op, double g, double dg) { return op.activation == RELU2 ? 2 * (std::fabs(g) + dg) : 1.13; }

// Where σ or Φ is denormal its error is absolute, about one 2^-149. The products with g and up
// scale it.
inline double denormal(double gate, double up) {
    const auto size = [](double x) { return std::min(std::fabs(x), 3.4e38); };
    return std::ldexp(1, -149) * (2 + size(gate)) * (1 + size(up));
}

// The error of x after a rounding; an infinite x is exact.
inline double rounded(double x, double error) { return std::isinf(x) ? 0 : error + U * std::fabs(x); }

// The error of glu(gate, up) in f32, if gate and up are off by at most `dg` and `du`: the rounding
// of each step, and the propagated errors.
inline double glu_error(const Op& op, double gate, double up, double dg, double du) {
    const Inputs in = inputs(op, gate, up);
    const double a = std::fabs(activation(op, in.g).value), u = std::fabs(in.u);
    if (std::isinf(gate)) dg = 0;
    if (std::isinf(up)) du = 0;
    if (!op.plain()) {
        dg = rounded(op.m * gate, std::fabs(op.m) * dg);
        du = rounded(in.u, du) + U * std::fabs(op.c);
    }
    const double da = steepest(op, in.g, dg) * dg + U * units(op, in.g) * a;
    const double product = a * du + da * (u + du);
    return product + U * (a * u + product) + denormal(in.g, in.u);
}

// The errors of the gradients, for exact gate, up and dy. act' is a sum s + g·s' of terms of size
// at most 1 and |g·s'| ≤ 0.6 (swish: max of z·σ' is 0.24; gelu: of x·φ is 0.25; tanh form: 0.6
// bounds it). Each term has the activation's own relative error and at most four more roundings.
// The slope of the tanh form includes v's error once more.
inline Gradients gradient_error(const Op& op, double gate, double up, double dy) {
    const Inputs in = inputs(op, gate, up);
    const Slope a = activation(op, in.g);
    const double g = bounded(in.g, 12), relative = U * (units(op, g) + 4 + (op.activation == GELU_TANH ? units(op, g) : 0));
    const double slope_size = op.activation == RELU || op.activation == IDENTITY ? 0 : std::fabs(a.slope) + 2 * 0.6;
    const double dg = op.plain() ? 0 : rounded(op.m * gate, 0);
    const double slope = relative * slope_size + (op.activation == RELU2 ? 2 : 0.8 * std::max(1.0, std::fabs(op.beta))) * dg; // 0.8: the largest curvature of the others
    const double u = std::fabs(in.u), du = op.plain() ? 0 : rounded(in.u, U * std::fabs(op.c));
    const double d = std::fabs(dy), m = std::fabs(op.m), s = std::fabs(a.slope);
    const double dgate = d * m * ((u + du) * slope + s * du) + 3 * U * d * m * u * s;
    const double da = steepest(op, in.g, dg) * dg + U * units(op, in.g) * std::fabs(a.value);
    return {dgate + denormal(in.g, in.u) * (1 + std::min(d, 3.4e38)), d * da + U * d * std::fabs(a.value) + denormal(in.g, dy)};
}

// For an infinite or NaN error bound: a result that is finite nevertheless has a few roundings.
inline double or_few_roundings(double error, double exact) {
    return std::isfinite(error) ? error : std::isfinite(exact) ? 16 * U * std::fabs(exact) + std::ldexp(1, -140) : 0;
}

// A sum of n products of exact factors, in any order: γ·Σ|a||b| with γ = nU/(1-nU).
inline double gamma(size_t n) { return n * U / (1 - n * U); }

}  // namespace reference
