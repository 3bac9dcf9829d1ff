// The gate act(min(m·gate, limit)) · (clamp(up, ±limit) + c) on scalars, for CUDA (R = float or
// double) and Metal (R = float). Both share this table of activations. The formulas are those of
// src/cpu/activation.rs and src/cpu/glu.rs.
//
// Method. Every exponential is t = e^-|z| in [0, 1], which cannot overflow:
// 1. σ(z) = 1/(1+t) for z > 0 and t/(1+t) otherwise; σ'(z) = t/(1+t)².
// 2. Swish: g·σ(βg). GELU in its tanh form: g·σ(v), v = √(8/π)·(g + 0.044715·g³).
// 3. GELU: g·Φ(g). f64: ½·erfc(-g/√2). f32: Φ(-a) = e^(-a²/2)·E(a), where E is a polynomial of
//    degree 9 in (a-4)/(a+4) divided by a+4. The rounding error of a² is computed exactly with one
//    fma and corrected by a factor.
//
// NaN stays NaN: every comparison with NaN is false and selects the branch that keeps it. Where the
// tail underflows the result is -0, also at g = -∞.
//
// The including file first defines the following, because exponentials, reciprocals and their
// rounding differ between devices:
//   DEVICE                  precedes every function
//   PARAMS                  the type of a reference to GluParams
//   exp_neg(a)              e^-a
//   reciprocal(x)           1/x for x ≥ 1
//   absolute(x)             |x|
//   fused(a, b, c)          a·b + c with one rounding
//   one_plus_square(a, x)   1 + a·x²
//   SQRT_8_OVER_PI          √(8/π); in f32 the CPU kernels and Metal take the neighbour of the nearest number
//   Sigma<R>(z)             σ(z) as `value`, σ'(z) as `slope()`, and `plus_slope(f)` = σ(z) + f·σ'(z)
//   normal(double)          as below, where there is f64
#ifndef CANDLE_SWIGLU_GATE_H
#define CANDLE_SWIGLU_GATE_H

// The numbers of src/gate/params.rs, whose tests compare them.
enum Activation : int { SILU = 0, SWISH = 1, SIGMOID = 2, RELU = 3, GELU = 4, GELU_TANH = 5, IDENTITY = 6, RELU2 = 7 };

// `GluParams` of src/gate/params.rs: 20 bytes.
struct GluParams {
  int activation;
  float beta;             // Swish only
  float gate_multiplier;  // m
  float limit;            // +∞: none
  float up_offset;        // c
};

// ------------------------------------------------------------------------------ activations

// act(g) and act'(g)
template <typename R> struct Both {
  R value, slope;
};

// x clamped to ±bound; NaN stays.
template <typename R> DEVICE R bounded(R x, R bound) { return x >= bound ? bound : x <= -bound ? -bound : x; }

// g·f for a factor f in [0, 1] that underflows to 0 where g is very negative.
template <typename R> DEVICE R times_tail(R g, R f) { return f <= R(0) ? -R(0) : g * f; }

template <typename R> struct Swish {
  R beta;
  DEVICE R value(R g) const { return times_tail(g, Sigma<R>(beta * g).value); }
  DEVICE Both<R> both(R g) const {
    const R z = beta * g;
    const Sigma<R> s(z);
    // z·σ'(z) is 0 well before this bound, which only prevents ∞·0.
    return {times_tail(g, s.value), s.plus_slope(bounded(z, R(sizeof(R) == 8 ? 800 : 200)))};
  }
};

template <typename R> struct Logistic {
  DEVICE R value(R g) const { return Sigma<R>(g).value; }
  DEVICE Both<R> both(R g) const {
    const Sigma<R> s(g);
    return {s.value, s.slope()};
  }
};

template <typename R> struct Relu {
  DEVICE R value(R g) const { return g <= R(0) ? R(0) : g; }
  DEVICE Both<R> both(R g) const { return {value(g), g <= R(0) ? R(0) : R(1)}; }
};

template <typename R> struct Relu2 {
  DEVICE R value(R g) const { return Relu<R>().value(g) * Relu<R>().value(g); }
  DEVICE Both<R> both(R g) const {
    const R x = Relu<R>().value(g);
    return {x * x, x + x};
  }
};

template <typename R> struct Identity {
  DEVICE R value(R g) const { return g; }
  DEVICE Both<R> both(R g) const { return {g, R(1)}; }
};

// Φ(x), and e^(-x²/2)
template <typename R> struct Normal {
  R cdf, exp;
};
DEVICE Normal<float> normal(float x) {
  const float a = absolute(x), a2 = a * a, rest = fused(a, a, -a2);
  const float e = exp_neg(0.5f * a2);
  const float exp = fused(e, -0.5f * rest, e);
  const float w = reciprocal(a + 4.0f), s = fused(-8.0f, w, 1.0f);
  float p = -0.00013807688f;
  p = fused(p, s, 0.00016672676f);
  p = fused(p, s, 0.0015663408f);
  p = fused(p, s, -0.0035058383f);
  p = fused(p, s, -0.007521953f);
  p = fused(p, s, 0.06040276f);
  p = fused(p, s, -0.18652403f);
  p = fused(p, s, 0.38713697f);
  p = fused(p, s, -0.60789657f);
  p = fused(p, s, 0.75528514f);
  const float tail = exp * (w * p);
  return {x <= 0.0f ? tail : 1.0f - tail, exp};
}

template <typename R> struct Gelu {
  // Beyond the bound Φ rounds to 0 or 1.
  DEVICE R within(R g) const { return bounded(g, R(sizeof(R) == 8 ? 40 : 16)); }
  DEVICE R value(R g) const { return times_tail(g, normal(within(g)).cdf); }
  DEVICE Both<R> both(R g) const {
    const R x = within(g);
    const Normal<R> n = normal(x);
    return {times_tail(g, n.cdf), fused(x, R(0.39894228040143267794) * n.exp, n.cdf)};
  }
};

template <typename R> struct GeluTanh {
  DEVICE R within(R g) const { return bounded(g, R(sizeof(R) == 8 ? 40 : 20)); }
  DEVICE R cubic() const { return R(0.044715); }
  DEVICE R argument(R x) const { return R(SQRT_8_OVER_PI) * x * one_plus_square(cubic(), x); }
  DEVICE R value(R g) const { return times_tail(g, Sigma<R>(argument(within(g))).value); }
  DEVICE Both<R> both(R g) const {
    const R x = within(g);
    const Sigma<R> s(argument(x));
    const R dv = R(SQRT_8_OVER_PI) * one_plus_square(R(3) * cubic(), x);
    return {times_tail(g, s.value), s.value + x * dv * s.slope()};
  }
};

// For a number that names no activation: NaN instead of the result of another activation.
template <typename R> struct NoActivation {
  DEVICE R value(R) const { return R(NAN); }
  DEVICE Both<R> both(R) const { return {R(NAN), R(NAN)}; }
};

// Calls f(act) for the activation of this number. The switch has no default, so that the compiler
// names an activation without a case (-Wswitch, an error in the emulators' builds).
template <typename R, typename F> DEVICE auto with_activation(int activation, R beta, F f) {
  switch (Activation(activation)) {
    case SILU: return f(Swish<R>{R(1)});
    case SWISH: return f(Swish<R>{beta});
    case SIGMOID: return f(Logistic<R>{});
    case RELU: return f(Relu<R>{});
    case GELU: return f(Gelu<R>{});
    case GELU_TANH: return f(GeluTanh<R>{});
    case IDENTITY: return f(Identity<R>{});
    case RELU2: return f(Relu2<R>{});
  }
  return f(NoActivation<R>{});
}

// -------------------------------------------------------------------------------- modifiers

DEVICE bool is_plain(PARAMS op) { return op.gate_multiplier == 1.0f && !(op.limit < INFINITY) && op.up_offset == 0.0f; }

// min(m·gate, limit)
template <typename R> DEVICE R bounded_gate(R m, R limit, R gate) {
  const R g = m * gate;
  return g >= limit ? limit : g;
}

// clamp(up, ±limit) + c
template <typename R> DEVICE R bounded_up(R limit, R c, R up) { return bounded(up, limit) + c; }

// The gradient of x where it is below the limit, else 0. NaN is below; so is everything when there
// is no limit.
template <typename R> DEVICE R below(R limit, R x, R gradient) { return limit < R(INFINITY) && x >= limit ? R(0) : gradient; }

#endif
