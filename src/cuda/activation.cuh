// The gate of src/gate/gate.h on CUDA, in f32 and f64.
//
// Relative error in f32, in units of 2^-24: Silu and Sigmoid 9, Swish 9 + |βg|, Gelu 15, GeluTanh 9
// + 4|v|, and one more for the product. These bounds follow from the documented errors of the GPU's
// expf (2 ulp, counted as 4 units) and rcp.approx (1 ulp, 2 units), with one unit for each other
// rounding.
#pragma once
#include "device.cuh"

#define PARAMS const GluParams&
#define SQRT_8_OVER_PI 1.5957691216057307117

// ----------------------------------------------------------------------------- device maths

DEVICE float exp_neg(float a) { return expf(-a); }
DEVICE double exp_neg(double a) { return exp(-a); }
DEVICE float absolute(float x) { return fabsf(x); }
DEVICE double absolute(double x) { return fabs(x); }
DEVICE float fused(float a, float b, float c) { return fmaf(a, b, c); }
DEVICE double fused(double a, double b, double c) { return fma(a, b, c); }
template <typename R> DEVICE R one_plus_square(R a, R x) { return a * x * x + R(1); }

template <typename R> struct Sigma {
  R value, slope_;
  DEVICE explicit Sigma(R z) {
    const R t = exp_neg(absolute(z)), q = reciprocal(R(1) + t), tq = t * q;
    value = z <= R(0) ? tq : q;
    slope_ = tq * q;
  }
  DEVICE R slope() const { return slope_; }
  DEVICE R plus_slope(R factor) const { return value + factor * slope_; }
};

template <typename R> struct Normal;
DEVICE Normal<double> normal(double x);

#include "../gate/gate.h"

DEVICE Normal<double> normal(double x) { return {0.5 * erfc(x * -0.70710678118654752440), exp_neg(0.5 * x * x)}; }

// --------------------------------------------------------------------------------- the gate

template <typename R> struct Gradients {
  R gate, up;
};

// act(gate) · up
template <typename R, typename A> struct Plain {
  A act;
  DEVICE R value(R gate, R up) const { return act.value(gate) * up; }
  DEVICE Gradients<R> gradients(R gate, R up, R dy) const {
    const Both<R> a = act.both(gate);
    return {dy * up * a.slope, dy * a.value};
  }
};

// act(min(m·gate, limit)) · (clamp(up, ±limit) + c). The gradient passes below the limit and is 0
// at it and beyond.
template <typename R, typename A> struct Modified {
  A act;
  R m, limit, c;
  DEVICE R value(R gate, R up) const { return act.value(bounded_gate(m, limit, gate)) * bounded_up(limit, c, up); }
  DEVICE Gradients<R> gradients(R gate, R up, R dy) const {
    const Both<R> a = act.both(bounded_gate(m, limit, gate));
    return {below(limit, m * gate, m * (dy * bounded_up(limit, c, up) * a.slope)), below(limit, absolute(up), dy * a.value)};
  }
};

template <typename R> struct Unknown {
  DEVICE R value(R, R) const { return R(NAN); }
  DEVICE Gradients<R> gradients(R, R, R) const { return {R(NAN), R(NAN)}; }
};

// Calls f(formula) for an activation with the modifiers of `op`.
template <typename R, typename F> struct WithModifiers {
  const GluParams& op;
  F& f;
  template <typename A> DEVICE void operator()(A act) const {
    if (is_plain(op)) f(Plain<R, A>{act});
    else f(Modified<R, A>{act, R(op.gate_multiplier), R(op.limit), R(op.up_offset)});
  }
  DEVICE void operator()(NoActivation<R>) const { f(Unknown<R>{}); }
};

// Calls f(formula), where formula has the gate's `value` and `gradients`. Everything except its
// parameters is known at compile time.
template <typename R, typename F> DEVICE void with_formula(const GluParams& op, F f) {
  with_activation<R>(op.activation, R(op.beta), WithModifiers<R, F>{op, f});
}
