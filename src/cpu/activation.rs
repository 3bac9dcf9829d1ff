//! The activations and their derivatives on vectors of f32.
//!
//! Method. Everything exponential goes through `t = e^-|z|` in [0, 1], which cannot overflow and
//! underflows gradually:
//!
//! 1. σ(z) = 1/(1+t) for z > 0 and t/(1+t) otherwise, so σ keeps its relative accuracy down to the
//!    smallest denormal; σ'(z) = t/(1+t)².
//! 2. Swish: g·σ(βg). GELU in its tanh form is g·σ(v) with v = √(8/π)·(g + 0.044715·g³), since ½(1
//!    + tanh(v/2)) = σ(v).
//! 3. GELU: Φ(-a) = e^(-a²/2)·E(a) for a ≥ 0, where E(a) = ½·erfcx(a/√2) decays only like 1/a: a
//!    polynomial of degree 9 in (a-4)/(a+4), divided by a+4, fits it to 1e-8 relative on [0, 16].
//!    The rounding error of a² is known exactly (one fma) and put back as a factor, so the tail
//!    stays accurate.
//! 4. e^-|z|: n = round(-|z|·log₂e), r = -|z| - n·ln 2 in two steps, e^r = 1 + r + r²·q(r) with q
//!    of degree 4 (3e-9 relative on |r| ≤ 0.3467), times 2ⁿ with one rounding. Below -104 the
//!    result is 0, as it is in f32.
//!
//! Both polynomials are our own weighted least-squares (Lawson) fits against 40-digit values;
//! coefficients rounded to f32.
//!
//! Error against the f64 definition, in units of 2⁻²⁴ relative, as the tests bound it: Silu and
//! Sigmoid 6; Swish 6 + |z|; Gelu 12; GeluTanh 6 + 4|v|; Relu2 1, where z = βg and v as above
//! (their own rounding, amplified by the exponential's slope).

use super::simd::Simd;

/// act(g), and act(g) with act'(g).
pub(super) trait Activation: Copy {
    fn value<S: Simd>(self, s: S, g: S::F) -> S::F;
    fn value_and_derivative<S: Simd>(self, s: S, g: S::F) -> (S::F, S::F);
}

#[inline(always)]
fn horner<S: Simd, const N: usize>(s: S, x: S::F, coefficients: [f32; N]) -> S::F {
    let mut sum = s.splat(coefficients[N - 1]);
    for &c in coefficients[..N - 1].iter().rev() {
        sum = s.fma(sum, x, s.splat(c));
    }
    sum
}

/// e^-a for a ≥ 0; NaN for NaN.
#[inline(always)]
fn exp_neg<S: Simd>(s: S, a: S::F) -> S::F {
    const LN2_HI: f32 = std::f32::consts::LN_2;
    const LN2_LO: f32 = -1.904_654_3e-9;
    const Q: [f32; 5] = [0.499_999_94, 0.166_665_21, 0.041_668_39, 0.008_368_745, 0.001_381_453_8];
    let bound = s.splat(104.0);
    let x = s.sub(s.splat(0.0), s.select(s.le(bound, a), bound, a));
    let n = s.round(s.mul(x, s.splat(std::f32::consts::LOG2_E)));
    let r = s.fma(n, s.splat(-LN2_LO), s.fma(n, s.splat(-LN2_HI), x));
    let tail = s.mul(s.mul(r, r), horner(s, r, Q));
    s.scale(s.add(s.splat(1.0), s.add(r, tail)), n)
}

/// t = e^-|z| and q = 1/(1+t).
#[inline(always)]
fn logistic<S: Simd>(s: S, z: S::F) -> (S::F, S::F) {
    let t = exp_neg(s, s.abs(z));
    (t, s.div(s.splat(1.0), s.add(s.splat(1.0), t)))
}

#[inline(always)]
fn sigmoid<S: Simd>(s: S, z: S::F, (t, q): (S::F, S::F)) -> S::F {
    s.select(s.le(z, s.splat(0.0)), s.mul(t, q), q)
}

/// g·f for a factor f in [0, 1] that vanishes where g is very negative: -0 there, also for g = -∞.
#[inline(always)]
fn times_tail<S: Simd>(s: S, g: S::F, f: S::F) -> S::F {
    s.select(s.le(f, s.splat(0.0)), s.splat(-0.0), s.mul(g, f))
}

/// x within ±bound; NaN stays.
#[inline(always)]
pub(super) fn clamp<S: Simd>(s: S, x: S::F, bound: f32) -> S::F {
    let (low, high) = (s.splat(-bound), s.splat(bound));
    let x = s.select(s.le(high, x), high, x);
    s.select(s.le(x, low), low, x)
}

/// g·σ(βg)
#[derive(Clone, Copy)]
pub(super) struct Swish(pub(super) f32);

impl Activation for Swish {
    #[inline(always)]
    fn value<S: Simd>(self, s: S, g: S::F) -> S::F {
        let z = s.mul(s.splat(self.0), g);
        times_tail(s, g, sigmoid(s, z, logistic(s, z)))
    }
    #[inline(always)]
    fn value_and_derivative<S: Simd>(self, s: S, g: S::F) -> (S::F, S::F) {
        let z = s.mul(s.splat(self.0), g);
        let (t, q) = logistic(s, z);
        let sigma = sigmoid(s, z, (t, q));
        // z·t is 0 well before |z| reaches 200, so the bound only keeps ∞·0 away.
        let slope = s.mul(s.mul(clamp(s, z, 200.0), t), s.mul(q, q));
        (times_tail(s, g, sigma), s.add(sigma, slope))
    }
}

/// σ(g)
#[derive(Clone, Copy)]
pub(super) struct Sigmoid;

impl Activation for Sigmoid {
    #[inline(always)]
    fn value<S: Simd>(self, s: S, g: S::F) -> S::F {
        sigmoid(s, g, logistic(s, g))
    }
    #[inline(always)]
    fn value_and_derivative<S: Simd>(self, s: S, g: S::F) -> (S::F, S::F) {
        let (t, q) = logistic(s, g);
        (sigmoid(s, g, (t, q)), s.mul(t, s.mul(q, q)))
    }
}

/// max(g, 0); NaN stays.
#[derive(Clone, Copy)]
pub(super) struct Relu;

impl Activation for Relu {
    #[inline(always)]
    fn value<S: Simd>(self, s: S, g: S::F) -> S::F {
        let zero = s.splat(0.0);
        s.select(s.le(g, zero), zero, g)
    }
    #[inline(always)]
    fn value_and_derivative<S: Simd>(self, s: S, g: S::F) -> (S::F, S::F) {
        let zero = s.splat(0.0);
        (self.value(s, g), s.select(s.le(g, zero), zero, s.splat(1.0)))
    }
}

/// max(g, 0)²; NaN stays.
#[derive(Clone, Copy)]
pub(super) struct Relu2;

impl Activation for Relu2 {
    #[inline(always)]
    fn value<S: Simd>(self, s: S, g: S::F) -> S::F {
        let x = Relu.value(s, g);
        s.mul(x, x)
    }
    #[inline(always)]
    fn value_and_derivative<S: Simd>(self, s: S, g: S::F) -> (S::F, S::F) {
        let x = Relu.value(s, g);
        (s.mul(x, x), s.add(x, x))
    }
}

/// g
#[derive(Clone, Copy)]
pub(super) struct Identity;

impl Activation for Identity {
    #[inline(always)]
    fn value<S: Simd>(self, _: S, g: S::F) -> S::F {
        g
    }
    #[inline(always)]
    fn value_and_derivative<S: Simd>(self, s: S, g: S::F) -> (S::F, S::F) {
        (g, s.splat(1.0))
    }
}

/// g·Φ(g)
#[derive(Clone, Copy)]
pub(super) struct Gelu;

/// (Φ(g), e^(-g²/2), g within ±16, where both have long reached 0 or 1)
#[inline(always)]
fn normal<S: Simd>(s: S, g: S::F) -> (S::F, S::F, S::F) {
    const E: [f32; 10] = [
        0.755_285_14,
        -0.607_896_57,
        0.387_136_97,
        -0.186_524_03,
        0.060_402_76,
        -0.007_521_953,
        -0.003_505_838_3,
        0.001_566_340_8,
        0.000_166_726_76,
        -0.000_138_076_88,
    ];
    let x = clamp(s, g, 16.0);
    let a = s.abs(x);
    let a2 = s.mul(a, a);
    let rest = s.fma(a, a, s.sub(s.splat(0.0), a2));
    let exp = exp_neg(s, s.mul(s.splat(0.5), a2));
    let exp = s.fma(exp, s.mul(s.splat(-0.5), rest), exp);
    let w = s.div(s.splat(1.0), s.add(a, s.splat(4.0)));
    let tail = s.mul(exp, s.mul(w, horner(s, s.fma(s.splat(-8.0), w, s.splat(1.0)), E)));
    let cdf = s.select(s.le(x, s.splat(0.0)), tail, s.sub(s.splat(1.0), tail));
    (cdf, exp, x)
}

impl Activation for Gelu {
    #[inline(always)]
    fn value<S: Simd>(self, s: S, g: S::F) -> S::F {
        times_tail(s, g, normal(s, g).0)
    }
    #[inline(always)]
    fn value_and_derivative<S: Simd>(self, s: S, g: S::F) -> (S::F, S::F) {
        const INV_SQRT_2PI: f32 = 0.398_942_3;
        let (cdf, exp, x) = normal(s, g);
        (times_tail(s, g, cdf), s.fma(x, s.mul(s.splat(INV_SQRT_2PI), exp), cdf))
    }
}

/// g·σ(√(8/π)·(g + 0.044715·g³))
#[derive(Clone, Copy)]
pub(super) struct GeluTanh;

const SQRT_8_OVER_PI: f32 = 1.595_769;
const CUBIC: f32 = 0.044_715;

/// (g within ±20, where σ(v) has long reached 0 or 1; its square; v)
#[inline(always)]
fn tanh_argument<S: Simd>(s: S, g: S::F) -> (S::F, S::F, S::F) {
    let x = clamp(s, g, 20.0);
    let x2 = s.mul(x, x);
    let v = s.mul(s.mul(s.splat(SQRT_8_OVER_PI), x), s.fma(s.splat(CUBIC), x2, s.splat(1.0)));
    (x, x2, v)
}

impl Activation for GeluTanh {
    #[inline(always)]
    fn value<S: Simd>(self, s: S, g: S::F) -> S::F {
        let (_, _, v) = tanh_argument(s, g);
        times_tail(s, g, sigmoid(s, v, logistic(s, v)))
    }
    #[inline(always)]
    fn value_and_derivative<S: Simd>(self, s: S, g: S::F) -> (S::F, S::F) {
        let (x, x2, v) = tanh_argument(s, g);
        let (t, q) = logistic(s, v);
        let sigma = sigmoid(s, v, (t, q));
        let dv = s.mul(s.splat(SQRT_8_OVER_PI), s.fma(s.splat(3.0 * CUBIC), x2, s.splat(1.0)));
        let slope = s.mul(s.mul(x, dv), s.mul(t, s.mul(q, q)));
        (times_tail(s, g, sigma), s.add(sigma, slope))
    }
}
