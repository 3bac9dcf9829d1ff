//! The fused gate: `out = act(clamp(m·gate)) ⊙ (clamp(up) + c)` and its gradients, one pass over
//! memory.
//!
//! Written once over [`Simd`] and [`Element`]: elements are widened to f32 on load, everything
//! happens in f32, and each result is rounded once, on store. `epilogue.rs` applies the same formulas
//! to the sums of gate and up.

use std::mem::MaybeUninit;

use super::activation::{self, Activation};
use super::simd::{Element, MAX_LANES, Simd};
use crate::gate::activation::Glu;

/// `$body` with `$act` bound to the activation of `$op` as a type of its own.
macro_rules! with_activation {
    ($op:expr, $act:ident => $body:expr) => {{
        use $crate::cpu::activation::*;
        use $crate::gate::activation::GluActivation;
        match $op.activation {
            GluActivation::Silu => with_activation!(Swish(1.0), $act, $body),
            GluActivation::Swish { beta } => with_activation!(Swish(beta), $act, $body),
            GluActivation::Sigmoid => with_activation!(Sigmoid, $act, $body),
            GluActivation::Relu => with_activation!(Relu, $act, $body),
            GluActivation::Gelu => with_activation!(Gelu, $act, $body),
            GluActivation::GeluTanh => with_activation!(GeluTanh, $act, $body),
            GluActivation::Identity => with_activation!(Identity, $act, $body),
            GluActivation::Relu2 => with_activation!(Relu2, $act, $body),
        }
    }};
    ($value:expr, $act:ident, $body:expr) => {{
        let $act = $value;
        $body
    }};
}
pub(super) use with_activation;

/// gate, up (n) -> out (n)
#[inline(always)]
pub(super) fn forward<S: Simd, T: Element>(
    s: S,
    op: &Glu,
    gate: &[T],
    up: &[T],
    out: &mut [MaybeUninit<T>],
) {
    with_activation!(op, act => forward_with(s, act, op, gate, up, out))
}

/// gate, up, dy (n) -> dgate, dup (n)
#[inline(always)]
pub(super) fn backward<S: Simd, T: Element>(
    s: S,
    op: &Glu,
    inputs: [&[T]; 3],
    outputs: [&mut [MaybeUninit<T>]; 2],
) {
    with_activation!(op, act => backward_with(s, act, op, inputs, outputs))
}

#[inline(always)]
fn forward_with<S: Simd, T: Element, A: Activation>(
    s: S,
    act: A,
    op: &Glu,
    gate: &[T],
    up: &[T],
    out: &mut [MaybeUninit<T>],
) {
    if op.is_plain() {
        map_pair(s, Plain(act), gate, up, out);
    } else {
        map_pair(s, Modified(act, op), gate, up, out);
    }
}

#[inline(always)]
fn backward_with<S: Simd, T: Element, A: Activation>(
    s: S,
    act: A,
    op: &Glu,
    inputs: [&[T]; 3],
    outputs: [&mut [MaybeUninit<T>]; 2],
) {
    if op.is_plain() {
        map_triple(s, Plain(act), inputs, outputs);
    } else {
        map_triple(s, Modified(act, op), inputs, outputs);
    }
}

/// The formula of one vector. (A closure would not take on the caller's target features; an
/// `inline(always)` method does.)
pub(super) trait Formula: Copy {
    /// gate, up -> out
    fn value<S: Simd>(self, s: S, gate: S::F, up: S::F) -> S::F;
    /// gate, up, dy -> (dgate, dup)
    fn gradients<S: Simd>(self, s: S, gate: S::F, up: S::F, dy: S::F) -> (S::F, S::F);
}

/// act(gate) ⊙ up
#[derive(Clone, Copy)]
pub(super) struct Plain<A>(pub(super) A);

impl<A: Activation> Formula for Plain<A> {
    #[inline(always)]
    fn value<S: Simd>(self, s: S, gate: S::F, up: S::F) -> S::F {
        s.mul(self.0.value(s, gate), up)
    }
    #[inline(always)]
    fn gradients<S: Simd>(self, s: S, gate: S::F, up: S::F, dy: S::F) -> (S::F, S::F) {
        let (a, da) = self.0.value_and_derivative(s, gate);
        (s.mul(s.mul(dy, up), da), s.mul(dy, a))
    }
}

/// act(min(m·gate, limit)) ⊙ (clamp(up) + c)
#[derive(Clone, Copy)]
pub(super) struct Modified<'a, A>(pub(super) A, pub(super) &'a Glu);

impl<A: Activation> Formula for Modified<'_, A> {
    #[inline(always)]
    fn value<S: Simd>(self, s: S, gate: S::F, up: S::F) -> S::F {
        s.mul(self.0.value(s, bounded_gate(s, self.1, gate)), bounded_up(s, self.1, up))
    }
    /// As PyTorch's clamp: the gradient passes below the limit, and is 0 at it and beyond. NaN is
    /// within.
    #[inline(always)]
    fn gradients<S: Simd>(self, s: S, gate: S::F, up: S::F, dy: S::F) -> (S::F, S::F) {
        let m = s.splat(self.1.gate_multiplier);
        let (a, da) = self.0.value_and_derivative(s, bounded_gate(s, self.1, gate));
        let dgate = s.mul(m, s.mul(s.mul(dy, bounded_up(s, self.1, up)), da));
        let dup = s.mul(dy, a);
        (within(s, self.1, s.mul(m, gate), dgate), within(s, self.1, s.abs(up), dup))
    }
}

/// The gradient where x < limit, x is NaN or there is no limit, else 0.
#[inline(always)]
fn within<S: Simd>(s: S, op: &Glu, x: S::F, gradient: S::F) -> S::F {
    match op.limit {
        Some(limit) => s.select(s.le(s.splat(limit), x), s.splat(0.0), gradient),
        None => gradient,
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

/// `out[i] = formula(gate[i], up[i])`, a vector at a time; the tail goes through padded buffers.
#[inline(always)]
fn map_pair<S: Simd, T: Element>(
    s: S,
    formula: impl Formula,
    gate: &[T],
    up: &[T],
    out: &mut [MaybeUninit<T>],
) {
    let n = out.len();
    assert!(gate.len() == n && up.len() == n);
    let whole = n - n % S::LANES;
    let mut i = 0;
    while i < whole {
        // SAFETY: i + LANES <= n, the length of all three slices; MaybeUninit<T> has T's layout.
        unsafe {
            let (g, u) = (T::load(s, gate.as_ptr().add(i)), T::load(s, up.as_ptr().add(i)));
            T::store(s, formula.value(s, g, u), out.as_mut_ptr().add(i).cast());
        }
        i += S::LANES;
    }
    if whole < n {
        let mut y = [T::default(); MAX_LANES];
        // SAFETY: the buffers have MAX_LANES >= LANES elements.
        unsafe {
            let (g, u) = (
                T::load(s, padded(&gate[whole..]).as_ptr()),
                T::load(s, padded(&up[whole..]).as_ptr()),
            );
            T::store(s, formula.value(s, g, u), y.as_mut_ptr());
        }
        write_tail(&mut out[whole..], &y);
    }
}

/// `(dgate[i], dup[i]) = formula(gate[i], up[i], dy[i])`, as [`map_pair`].
#[inline(always)]
fn map_triple<S: Simd, T: Element>(
    s: S,
    formula: impl Formula,
    [gate, up, dy]: [&[T]; 3],
    [dgate, dup]: [&mut [MaybeUninit<T>]; 2],
) {
    let n = gate.len();
    assert!(up.len() == n && dy.len() == n && dgate.len() == n && dup.len() == n);
    let whole = n - n % S::LANES;
    let mut i = 0;
    while i < whole {
        // SAFETY: i + LANES <= n, the length of all five slices; MaybeUninit<T> has T's layout.
        unsafe {
            let (g, u) = (T::load(s, gate.as_ptr().add(i)), T::load(s, up.as_ptr().add(i)));
            let (dg, du) = formula.gradients(s, g, u, T::load(s, dy.as_ptr().add(i)));
            T::store(s, dg, dgate.as_mut_ptr().add(i).cast());
            T::store(s, du, dup.as_mut_ptr().add(i).cast());
        }
        i += S::LANES;
    }
    if whole < n {
        let (mut yg, mut yu) = ([T::default(); MAX_LANES], [T::default(); MAX_LANES]);
        // SAFETY: the buffers have MAX_LANES >= LANES elements.
        unsafe {
            let (g, u) = (
                T::load(s, padded(&gate[whole..]).as_ptr()),
                T::load(s, padded(&up[whole..]).as_ptr()),
            );
            let (dg, du) = formula.gradients(s, g, u, T::load(s, padded(&dy[whole..]).as_ptr()));
            T::store(s, dg, yg.as_mut_ptr());
            T::store(s, du, yu.as_mut_ptr());
        }
        write_tail(&mut dgate[whole..], &yg);
        write_tail(&mut dup[whole..], &yu);
    }
}

/// The tail of a slice, filled up with zeros.
#[inline(always)]
fn padded<T: Element>(tail: &[T]) -> [T; MAX_LANES] {
    let mut buffer = [T::default(); MAX_LANES];
    buffer[..tail.len()].copy_from_slice(tail);
    buffer
}

#[inline(always)]
fn write_tail<T: Element>(out: &mut [MaybeUninit<T>], values: &[T; MAX_LANES]) {
    for (out, &value) in out.iter_mut().zip(values) {
        out.write(value);
    }
}
