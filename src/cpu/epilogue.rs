//! What surrounds a product: x becomes A before it, and the sums of a panel become h or y after it.
//! The formulas of the gate are in `glu.rs`.

use std::mem::MaybeUninit;

use half::bf16;

use super::activation::Activation;
use super::glu::{Formula, Modified, Plain, with_activation};
use super::simd::{Body, Element, MAX_LANES, Simd};
use crate::gate::activation::Glu;

/// The sums of one panel, as an epilogue reads them.
#[derive(Clone, Copy)]
pub(super) struct PanelSums {
    /// (rows, NR)
    pub(super) sums: *const f32,
    pub(super) rows: usize,
    /// (NR), or null.
    pub(super) bias: *const f32,
}

impl PanelSums {
    /// The sums from another column on. A reader must stop before the end of a row.
    pub(super) fn skip_columns(self, columns: usize) -> Self {
        let bias = if self.bias.is_null() { self.bias } else { self.bias.wrapping_add(columns) };
        Self { sums: self.sums.wrapping_add(columns), bias, ..self }
    }

    /// Vector v of a row, with its bias.
    ///
    /// # Safety
    /// The CPU has the instructions; the row and the vector exist.
    #[inline(always)]
    pub(super) unsafe fn vector<S: Simd, const NV: usize>(
        &self,
        s: S,
        row: usize,
        v: usize,
    ) -> S::F {
        // SAFETY: the caller's contract; a bias is as wide as a row.
        unsafe {
            let sum = s.load_f32(self.sums.add((row * NV + v) * S::LANES));
            if self.bias.is_null() {
                sum
            } else {
                s.add(sum, s.load_f32(self.bias.add(v * S::LANES)))
            }
        }
    }
}

/// How h of dtype T is stored until the down projection reads it as A: as T itself, or as f32 after
/// it was rounded to T.
pub(super) trait Hidden<T: Element>: Copy {
    /// # Safety
    /// The CPU has the instructions; `dst` has LANES writable elements.
    unsafe fn keep<S: Simd>(s: S, value: S::F, dst: *mut Self);
}

impl<T: Element> Hidden<T> for f32 {
    #[inline(always)]
    unsafe fn keep<S: Simd>(s: S, value: S::F, dst: *mut Self) {
        let mut rounded = [T::default(); MAX_LANES];
        // SAFETY: the buffer has MAX_LANES >= LANES elements; `dst` by the caller's contract.
        unsafe {
            T::store(s, value, rounded.as_mut_ptr());
            s.store_f32(T::load(s, rounded.as_ptr()), dst);
        }
    }
}

impl Hidden<bf16> for bf16 {
    #[inline(always)]
    unsafe fn keep<S: Simd>(s: S, value: S::F, dst: *mut Self) {
        // SAFETY: the caller's contract.
        unsafe { Self::store(s, value, dst) }
    }
}

/// Widens x (n) to A (n) in f32. Made by callers who have n readable elements and room for n f32.
pub(super) struct Widening<T> {
    pub(super) from: *const T,
    pub(super) n: usize,
    pub(super) to: *mut f32,
}

impl<S: Simd, T: Element> Body<S> for Widening<T> {
    type Output = ();
    #[inline(always)]
    fn run(self, s: S) {
        let Self { from, n, to } = self;
        let whole = n - n % S::LANES;
        let mut i = 0;
        // SAFETY: what the maker of this value has promised; the tail goes through a buffer.
        unsafe {
            while i < whole {
                s.store_f32(T::load(s, from.add(i)), to.add(i));
                i += S::LANES;
            }
            if whole < n {
                let mut tail = [T::default(); MAX_LANES];
                std::ptr::copy_nonoverlapping(from.add(whole), tail.as_mut_ptr(), n - whole);
                let mut wide = [0f32; MAX_LANES];
                s.store_f32(T::load(s, tail.as_ptr()), wide.as_mut_ptr());
                std::ptr::copy_nonoverlapping(wide.as_ptr(), to.add(whole), n - whole);
            }
        }
    }
}

/// Copies x (n) to A (n) in bf16.
///
/// # Safety
/// `from` has n elements, `to` room for them.
#[cfg(any(target_arch = "x86_64", target_arch = "aarch64", test))]
pub(super) unsafe fn copy_bf16(from: *const bf16, n: usize, to: *mut u8) {
    // SAFETY: the caller's contract.
    unsafe { std::ptr::copy_nonoverlapping(from, to.cast(), n) }
}

/// Sums of one panel (rows, NR), gate in the first NR/2 columns -> h (rows, NR/2), rounded once to
/// T.
///
/// # Safety
/// The CPU has the instructions. `panel.sums` points to rows·NV·LANES f32, `panel.bias` to
/// NV·LANES, if any; `h` to `rows` rows, `h_stride` apart, of NV/2·LANES writable elements.
#[inline(always)]
pub(super) unsafe fn hidden<S: Simd, T: Element, H: Hidden<T>, const NV: usize>(
    s: S,
    op: &Glu,
    panel: PanelSums,
    h: *mut H,
    h_stride: usize,
) {
    // SAFETY: the caller's contract.
    unsafe {
        with_activation!(op, act => hidden_with::<S, T, H, _, NV>(s, act, op, panel, h, h_stride))
    }
}

/// # Safety
/// As [`hidden`].
#[inline(always)]
unsafe fn hidden_with<S: Simd, T: Element, H: Hidden<T>, A: Activation, const NV: usize>(
    s: S,
    act: A,
    op: &Glu,
    panel: PanelSums,
    h: *mut H,
    h_stride: usize,
) {
    // SAFETY: the caller's contract.
    unsafe {
        if op.is_plain() {
            hidden_rows::<S, T, H, _, NV>(s, Plain(act), panel, h, h_stride);
        } else {
            hidden_rows::<S, T, H, _, NV>(s, Modified(act, op), panel, h, h_stride);
        }
    }
}

/// # Safety
/// As [`hidden`].
#[inline(always)]
unsafe fn hidden_rows<S: Simd, T: Element, H: Hidden<T>, F: Formula, const NV: usize>(
    s: S,
    formula: F,
    panel: PanelSums,
    h: *mut H,
    h_stride: usize,
) {
    for row in 0..panel.rows {
        for v in 0..NV / 2 {
            // SAFETY: the caller's contract.
            unsafe {
                let (gate, up) =
                    (panel.vector::<S, NV>(s, row, v), panel.vector::<S, NV>(s, row, NV / 2 + v));
                H::keep(s, formula.value(s, gate, up), h.add(row * h_stride + v * S::LANES));
            }
        }
    }
}

/// Gate and up of the channels of a panel, each as wide as the panel.
#[derive(Clone, Copy)]
pub(super) enum GateUp<T> {
    /// The sums of two panels of gate and up, each with half of the channels.
    Sums([PanelSums; 2]),
    /// Rows of gate and of up, and the elements from one row to the next.
    Rows { gate: *const T, up: *const T, stride: usize },
}

/// The arguments of [`gradients`].
pub(super) struct GateGradients<'a, T> {
    pub(super) op: &'a Glu,
    pub(super) gate_up: GateUp<T>,
    /// dh (rows, NR), up to `factor`
    pub(super) dh: PanelSums,
    pub(super) factor: f32,
    /// h, dgate and dup as A (rows, NR), and the elements from one row to the next.
    pub(super) outputs: [(*mut u8, usize); 3],
}

/// h = act(gate) ⊙ up and the gradients of gate and up under dh, each rounded once to T.
///
/// # Safety
/// The CPU has the instructions. The sums have NV·LANES columns and as many rows as `dh`; the rows
/// of gate, up and the outputs have NV·LANES elements.
#[inline(always)]
pub(super) unsafe fn gradients<S: Simd, T: Element, H: Hidden<T>, const NV: usize>(
    s: S,
    args: &GateGradients<T>,
) {
    let op = args.op;
    with_activation!(op, act => if op.is_plain() {
        // SAFETY: the caller's contract.
        unsafe { gradient_rows::<S, T, H, _, NV>(s, Plain(act), args) }
    } else {
        // SAFETY: the caller's contract.
        unsafe { gradient_rows::<S, T, H, _, NV>(s, Modified(act, op), args) }
    });
}

/// # Safety
/// As [`gradients`].
#[inline(always)]
unsafe fn gradient_rows<S: Simd, T: Element, H: Hidden<T>, F: Formula, const NV: usize>(
    s: S,
    formula: F,
    args: &GateGradients<T>,
) {
    let factor = s.splat(args.factor);
    for row in 0..args.dh.rows {
        for v in 0..NV {
            // SAFETY: the caller's contract.
            unsafe {
                let (gate, up) = match &args.gate_up {
                    GateUp::Sums(panels) => {
                        let (panel, at) = (&panels[v / (NV / 2)], v % (NV / 2));
                        (
                            panel.vector::<S, NV>(s, row, at),
                            panel.vector::<S, NV>(s, row, NV / 2 + at),
                        )
                    }
                    &GateUp::Rows { gate, up, stride } => {
                        let at = row * stride + v * S::LANES;
                        (T::load(s, gate.add(at)), T::load(s, up.add(at)))
                    }
                };
                let dh = s.mul(args.dh.vector::<S, NV>(s, row, v), factor);
                let (dgate, dup) = formula.gradients(s, gate, up, dh);
                let values = [formula.value(s, gate, up), dgate, dup];
                for (value, (to, stride)) in values.into_iter().zip(args.outputs) {
                    H::keep(s, value, to.cast::<H>().add(row * stride + v * S::LANES));
                }
            }
        }
    }
}

/// The sums of a panel, plus their bias, times `factor`, rounded once -> y (rows, columns). Made by
/// callers whose panel has NV·LANES columns and whose `y` has `rows` rows, `y_stride` apart, of
/// `columns` writable elements.
pub(super) struct Output<Y, const NV: usize> {
    pub(super) panel: PanelSums,
    pub(super) factor: f32,
    pub(super) y: *mut Y,
    pub(super) y_stride: usize,
    pub(super) columns: usize,
}

impl<S: Simd, Y: Element, const NV: usize> Body<S> for Output<Y, NV> {
    type Output = ();
    #[inline(always)]
    fn run(self, s: S) {
        let Self { panel, factor, y, y_stride, columns } = self;
        let factor = s.splat(factor);
        for row in 0..panel.rows {
            for v in 0..NV {
                let at = v * S::LANES;
                if at >= columns {
                    break; // the panel's padding, beyond y, or columns that were skipped
                }
                // SAFETY: what the maker of this value has promised; an incomplete vector goes
                // through a buffer.
                unsafe {
                    let value = s.mul(panel.vector::<S, NV>(s, row, v), factor);
                    let out = y.add(row * y_stride + at);
                    if at + S::LANES <= columns {
                        Y::store(s, value, out);
                    } else {
                        let mut buffer = [MaybeUninit::<Y>::uninit(); MAX_LANES];
                        Y::store(s, value, buffer.as_mut_ptr().cast());
                        std::ptr::copy_nonoverlapping(
                            buffer.as_ptr().cast::<Y>(),
                            out,
                            columns - at,
                        );
                    }
                }
            }
        }
    }
}
