//! The fused gate: `out = act(clamp(m·gate)) ⊙ (clamp(up) + c)` and its gradients, one pass over memory.
//!
//! Written once over [`Simd`] and [`Element`]: elements are widened to f32 on load, everything happens in f32, and each
//! result is rounded once, on store. The instruction-set files instantiate [`forward`] and [`backward`].

use std::mem::MaybeUninit;

use super::activation::{self, Activation, Gelu, GeluTanh, Identity, Relu, Sigmoid, Swish};
use super::simd::{Element, MAX_LANES, Simd};
use crate::activation::GluActivation;
use crate::glu::Glu;

/// gate, up (n) -> out (n)
#[inline(always)]
pub(super) fn forward<S: Simd, T: Element>(s: S, op: &Glu, gate: &[T], up: &[T], out: &mut [MaybeUninit<T>]) {
    match op.activation {
        GluActivation::Silu => forward_with(s, op, Swish(1.0), gate, up, out),
        GluActivation::Swish { beta } => forward_with(s, op, Swish(beta), gate, up, out),
        GluActivation::Sigmoid => forward_with(s, op, Sigmoid, gate, up, out),
        GluActivation::Relu => forward_with(s, op, Relu, gate, up, out),
        GluActivation::Gelu => forward_with(s, op, Gelu, gate, up, out),
        GluActivation::GeluTanh => forward_with(s, op, GeluTanh, gate, up, out),
        GluActivation::Identity => forward_with(s, op, Identity, gate, up, out),
    }
}

/// gate, up, dy (n) -> dgate, dup (n)
#[inline(always)]
pub(super) fn backward<S: Simd, T: Element>(s: S, op: &Glu, inputs: [&[T]; 3], outputs: [&mut [MaybeUninit<T>]; 2]) {
    match op.activation {
        GluActivation::Silu => backward_with(s, op, Swish(1.0), inputs, outputs),
        GluActivation::Swish { beta } => backward_with(s, op, Swish(beta), inputs, outputs),
        GluActivation::Sigmoid => backward_with(s, op, Sigmoid, inputs, outputs),
        GluActivation::Relu => backward_with(s, op, Relu, inputs, outputs),
        GluActivation::Gelu => backward_with(s, op, Gelu, inputs, outputs),
        GluActivation::GeluTanh => backward_with(s, op, GeluTanh, inputs, outputs),
        GluActivation::Identity => backward_with(s, op, Identity, inputs, outputs),
    }
}

#[inline(always)]
fn forward_with<S: Simd, T: Element, A: Activation>(s: S, op: &Glu, act: A, gate: &[T], up: &[T], out: &mut [MaybeUninit<T>]) {
    if op.is_plain() {
        map(s, [gate, up], [out], |[g, u]| [s.mul(act.value(s, g), u)]);
    } else {
        map(s, [gate, up], [out], |[g, u]| {
            let (g, u) = (bounded_gate(s, op, g), bounded_up(s, op, u));
            [s.mul(act.value(s, g), u)]
        });
    }
}

#[inline(always)]
fn backward_with<S: Simd, T: Element, A: Activation>(
    s: S,
    op: &Glu,
    act: A,
    inputs: [&[T]; 3],
    outputs: [&mut [MaybeUninit<T>]; 2],
) {
    if op.is_plain() {
        map(s, inputs, outputs, |[g, u, dy]| {
            let (a, da) = act.value_and_derivative(s, g);
            [s.mul(s.mul(dy, u), da), s.mul(dy, a)]
        });
    } else {
        map(s, inputs, outputs, |[g, u, dy]| bounded_gradients(s, op, act, g, u, dy));
    }
}

/// min(m·gate, limit)
#[inline(always)]
fn bounded_gate<S: Simd>(s: S, op: &Glu, gate: S::F) -> S::F {
    let limit = s.splat(op.limit.unwrap_or(f32::INFINITY));
    let g = s.mul(s.splat(op.gate_multiplier), gate);
    s.select(s.le(limit, g), limit, g)
}

/// clamp(up) + c
#[inline(always)]
fn bounded_up<S: Simd>(s: S, op: &Glu, up: S::F) -> S::F {
    s.add(activation::clamp(s, up, op.limit.unwrap_or(f32::INFINITY)), s.splat(op.up_offset))
}

/// As PyTorch's clamp: the gradient passes up to and at the limit, and is 0 beyond it. NaN is within.
#[inline(always)]
fn bounded_gradients<S: Simd, A: Activation>(s: S, op: &Glu, act: A, gate: S::F, up: S::F, dy: S::F) -> [S::F; 2] {
    let (limit, zero, m) = (s.splat(op.limit.unwrap_or(f32::INFINITY)), s.splat(0.0), s.splat(op.gate_multiplier));
    let (a, da) = act.value_and_derivative(s, bounded_gate(s, op, gate));
    let dgate = s.mul(m, s.mul(s.mul(dy, bounded_up(s, op, up)), da));
    let dup = s.mul(dy, a);
    let within = |x: S::F, value: S::F| s.select(s.le(x, limit), value, s.select(s.le(limit, x), zero, value));
    [within(s.mul(m, gate), dgate), within(s.abs(up), dup)]
}

/// `outputs[..][i] = f(inputs[..][i])`, a vector at a time; the tail goes through a padded buffer.
#[inline(always)]
fn map<S: Simd, T: Element, const I: usize, const O: usize>(
    s: S,
    inputs: [&[T]; I],
    mut outputs: [&mut [MaybeUninit<T>]; O],
    f: impl Fn([S::F; I]) -> [S::F; O],
) {
    let n = inputs[0].len();
    assert!(inputs.iter().all(|x| x.len() == n) && outputs.iter().all(|y| y.len() == n));
    let whole = n - n % S::LANES;
    for i in (0..whole).step_by(S::LANES) {
        // SAFETY: i + LANES <= n, the length of every slice.
        let x = inputs.map(|x| unsafe { T::load(s, x.as_ptr().add(i)) });
        for (y, value) in outputs.iter_mut().zip(f(x)) {
            // SAFETY: as above; MaybeUninit<T> has T's layout.
            unsafe { T::store(s, value, y.as_mut_ptr().add(i).cast()) };
        }
    }
    if whole == n {
        return;
    }
    let mut buffer = [T::default(); MAX_LANES];
    let x = inputs.map(|x| {
        buffer[..n - whole].copy_from_slice(&x[whole..]);
        // SAFETY: the buffer has MAX_LANES >= LANES elements.
        unsafe { T::load(s, buffer.as_ptr()) }
    });
    for (y, value) in outputs.iter_mut().zip(f(x)) {
        // SAFETY: as above.
        unsafe { T::store(s, value, buffer.as_mut_ptr()) };
        for (y, &value) in y[whole..].iter_mut().zip(&buffer) {
            y.write(value);
        }
    }
}
