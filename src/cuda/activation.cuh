// The gate `act(min(m·gate, limit)) · (clamp(up, ±limit) + c)` and its gradients on scalars, in f32 or f64: the one table of
// activations for all kernels, with the formulas of src/cpu/activation.rs and src/cpu/glu.rs.
//
// Method. Everything exponential goes through t = e^-|z| in [0, 1], which cannot overflow:
// 1. σ(z) = 1/(1+t) for z > 0 and t/(1+t) otherwise; σ'(z) = t/(1+t)².
// 2. Swish: g·σ(βg). GELU in its tanh form: g·σ(v), v = √(8/π)·(g + 0.044715·g³).
// 3. GELU: g·Φ(g). f64: ½·erfc(-g/√2). f32: Φ(-a) = e^(-a²/2)·E(a), E a polynomial of degree 9 in (a-4)/(a+4) divided by
//    a+4; the rounding error of a² is known exactly (one fma) and put back as a factor.
// NaN stays NaN throughout (every comparison with NaN is false and takes the branch that keeps it); a tail that has vanished
// gives -0, also at g = -∞.
//
// Error in f32, in units of 2^-24 relative, from the documented errors of the GPU's expf (2 ulp, taken as 4 units) and
// rcp.approx (1 ulp, 2 units) and one unit for each other rounding: Silu and Sigmoid 9, Swish 9 + |βg|, Gelu 15,
// GeluTanh 9 + 4|v|; with the product one more.
#pragma once
#include "device.cuh"

enum Activation : int { SILU = 0, SWISH = 1, SIGMOID = 2, RELU = 3, GELU = 4, GELU_TANH = 5, IDENTITY = 6 };

// By value to every kernel; 20 bytes. No limit: +∞.
struct GluOp {
  int activation;
  float beta, gate_multiplier, limit, up_offset;
};

// ------------------------------------------------------------------------------------------------ device maths

DEVICE float exp_neg(float a) { return expf(-a); }
DEVICE double exp_neg(double a) { return exp(-a); }
DEVICE float absolute(float x) { return fabsf(x); }
DEVICE double absolute(double x) { return fabs(x); }
template <typename R> constexpr bool IS_F64 = sizeof(R) == 8;

// x within ±bound; NaN stays.
template <typename R> DEVICE R clamp(R x, R bound) { return x >= bound ? bound : x <= -bound ? -bound : x; }

// g·f for a factor f in [0, 1] that vanishes where g is very negative.
template <typename R> DEVICE R times_tail(R g, R f) { return f <= R(0) ? -R(0) : g * f; }

// σ(z) and σ'(z)
template <typename R> struct Sigma {
  R value, slope;
  DEVICE explicit Sigma(R z) {
    const R t = exp_neg(absolute(z)), q = reciprocal(R(1) + t), tq = t * q;
    value = z <= R(0) ? tq : q;
    slope = tq * q;
  }
};

// act(g) and act'(g)
template <typename R> struct Both { R value, slope; };

template <typename R> struct Swish {
  R beta;
  DEVICE R value(R g) const { return times_tail(g, Sigma<R>(beta * g).value); }
  DEVICE Both<R> both(R g) const {
    const R z = beta * g;
    const Sigma<R> s(z);
    // z·σ'(z) is 0 well before this bound, which only keeps ∞·0 away.
    return {times_tail(g, s.value), s.value + clamp(z, R(IS_F64<R> ? 800 : 200)) * s.slope};
  }
};

template <typename R> struct Logistic {
  DEVICE R value(R g) const { return Sigma<R>(g).value; }
  DEVICE Both<R> both(R g) const {
    const Sigma<R> s(g);
    return {s.value, s.slope};
  }
};

template <typename R> struct Relu {
  DEVICE R value(R g) const { return g <= R(0) ? R(0) : g; }
  DEVICE Both<R> both(R g) const { return {value(g), g <= R(0) ? R(0) : R(1)}; }
};

template <typename R> struct Identity {
  DEVICE R value(R g) const { return g; }
  DEVICE Both<R> both(R g) const { return {g, R(1)}; }
};

// Φ(x), and e^(-x²/2)
DEVICE void normal(double x, double& cdf, double& exp) {
  cdf = 0.5 * erfc(x * -0.70710678118654752440);
  exp = exp_neg(0.5 * x * x);
}
DEVICE void normal(float x, float& cdf, float& exp) {
  const float a = fabsf(x), a2 = a * a, rest = fmaf(a, a, -a2);
  const float e = exp_neg(0.5f * a2);
  exp = fmaf(e, -0.5f * rest, e);
  const float w = reciprocal(a + 4.0f), s = fmaf(-8.0f, w, 1.0f);
  float p = -0.00013807688f;
  p = fmaf(p, s, 0.00016672676f);
  p = fmaf(p, s, 0.0015663408f);
  p = fmaf(p, s, -0.0035058383f);
  p = fmaf(p, s, -0.007521953f);
  p = fmaf(p, s, 0.06040276f);
  p = fmaf(p, s, -0.18652403f);
  p = fmaf(p, s, 0.38713697f);
  p = fmaf(p, s, -0.60789657f);
  p = fmaf(p, s, 0.75528514f);
  const float tail = exp * (w * p);
  cdf = x <= 0.0f ? tail : 1.0f - tail;
}

template <typename R> struct Gelu {
  // Beyond the bound Φ has long reached 0 or 1.
  static constexpr R BOUND = IS_F64<R> ? 40 : 16;
  DEVICE R value(R g) const {
    R cdf, exp;
    normal(clamp(g, BOUND), cdf, exp);
    return times_tail(g, cdf);
  }
  DEVICE Both<R> both(R g) const {
    const R x = clamp(g, BOUND);
    R cdf, exp;
    normal(x, cdf, exp);
    return {times_tail(g, cdf), cdf + x * (R(0.39894228040143267794) * exp)};
  }
};

template <typename R> struct GeluTanh {
  static constexpr R SQRT_8_OVER_PI = R(1.5957691216057307117), CUBIC = R(0.044715);
  static constexpr R BOUND = IS_F64<R> ? 40 : 20;
  static DEVICE R argument(R x) { return SQRT_8_OVER_PI * x * (CUBIC * x * x + R(1)); }
  DEVICE R value(R g) const { return times_tail(g, Sigma<R>(argument(clamp(g, BOUND))).value); }
  DEVICE Both<R> both(R g) const {
    const R x = clamp(g, BOUND);
    const Sigma<R> s(argument(x));
    const R dv = SQRT_8_OVER_PI * (R(3) * CUBIC * x * x + R(1));
    return {times_tail(g, s.value), s.value + x * dv * s.slope};
  }
};

// ------------------------------------------------------------------------------------------------ the gate

// act(gate) · up
template <typename R, typename A> struct Plain {
  A act;
  DEVICE R value(R gate, R up) const { return act.value(gate) * up; }
  DEVICE void gradients(R gate, R up, R dy, R& dgate, R& dup) const {
    const Both<R> a = act.both(gate);
    dgate = dy * up * a.slope;
    dup = dy * a.value;
  }
};

// act(min(m·gate, limit)) · (clamp(up, ±limit) + c); the gradient passes below the limit and is 0 at it and beyond.
template <typename R, typename A> struct Modified {
  A act;
  R m, limit, c;
  DEVICE R gate_of(R gate) const {
    const R g = m * gate;
    return g >= limit ? limit : g;
  }
  DEVICE R up_of(R up) const { return clamp(up, limit) + c; }
  // NaN is within; so is everything when there is no limit.
  DEVICE R within(R x, R gradient) const { return limit < R(INFINITY) && x >= limit ? R(0) : gradient; }
  DEVICE R value(R gate, R up) const { return act.value(gate_of(gate)) * up_of(up); }
  DEVICE void gradients(R gate, R up, R dy, R& dgate, R& dup) const {
    const Both<R> a = act.both(gate_of(gate));
    dgate = within(m * gate, m * (dy * up_of(up) * a.slope));
    dup = within(absolute(up), dy * a.value);
  }
};

DEVICE bool is_plain(const GluOp& op) { return op.gate_multiplier == 1.0f && !(op.limit < INFINITY) && op.up_offset == 0.0f; }

template <typename R, typename A, typename F> DEVICE void with_modifiers(const GluOp& op, A act, F& f) {
  if (is_plain(op)) f(Plain<R, A>{act});
  else f(Modified<R, A>{act, R(op.gate_multiplier), R(op.limit), R(op.up_offset)});
}

// For a number that is no activation: NaN, not the result of another one.
template <typename R> struct Unknown {
  DEVICE R value(R, R) const { return R(NAN); }
  DEVICE void gradients(R, R, R, R& dgate, R& dup) const { dgate = dup = R(NAN); }
};

// f(formula), where formula has the gate's `value` and `gradients` with everything but its parameters known at compile time.
template <typename R, typename F> DEVICE void with_formula(const GluOp& op, F f) {
  // Without a default the compiler names an activation that has no case (-Wswitch, an error in the emulators' builds).
  switch (Activation(op.activation)) {
    case SILU: return with_modifiers<R>(op, Swish<R>{R(1)}, f);
    case SWISH: return with_modifiers<R>(op, Swish<R>{R(op.beta)}, f);
    case SIGMOID: return with_modifiers<R>(op, Logistic<R>{}, f);
    case RELU: return with_modifiers<R>(op, Relu<R>{}, f);
    case GELU: return with_modifiers<R>(op, Gelu<R>{}, f);
    case GELU_TANH: return with_modifiers<R>(op, GeluTanh<R>{}, f);
    case IDENTITY: return with_modifiers<R>(op, Identity<R>{}, f);
  }
  f(Unknown<R>{});
}
