//! The functions of one instruction set, built once from its file in `isa/`.
//!
//! [`CpuKernels`] has the gate for each dtype and, for each weight format, the microkernels
//! ([`Sweep`]) and what surrounds them for each dtype of x, h and y ([`Edges`]).

use std::mem::MaybeUninit;

use candle_core::{DType, WithDType};
use half::{bf16, f16};

use super::epilogue::{self, GateGradients, Hidden, Output, PanelSums, Widening};
use super::format::{Format, Stored, widen};
use super::glu;
use super::micro::{Micro, Role, micro, micro_adjacent};
use super::product::{Product, Widen};
use super::simd::{Body, Element, Isa, Simd};
use super::sweep::{Rewritten, Sweep};
#[cfg(any(target_arch = "x86_64", test))]
use super::tiles::{self, Tiles};
use super::train::pack::{Pack, PackedFrom, pack};
use super::tuning::{Access, Tuned};
use crate::gate::activation::Glu;

/// One instruction set's functions. They exist only after the CPU's features were detected, and are
/// therefore safe to call.
pub(crate) struct CpuKernels {
    /// The name by which `CANDLE_SWIGLU_KERNEL` and [`cpu_kernels`](super::cpu_kernels) know it.
    pub(crate) name: &'static str,
    /// The instruction set that everything but products in bf16 uses.
    pub(super) base_name: &'static str,
    pub(super) gate_f32: GateKernels<f32>,
    pub(super) gate_bf16: GateKernels<bf16>,
    pub(super) gate_f16: GateKernels<f16>,
    pub(super) f32: FormatKernels,
    pub(super) bf16: FormatKernels,
    pub(super) f16: FormatKernels,
}

impl CpuKernels {
    /// The instruction set that products in this dtype use.
    pub(crate) fn name_of(&self, dtype: DType) -> &'static str {
        if dtype == DType::BF16 { self.name } else { self.base_name }
    }

    /// Products with weights of a format.
    pub(super) fn format(&self, format: Format) -> &FormatKernels {
        match format {
            Format::F32 => &self.f32,
            Format::Bf16 => &self.bf16,
            Format::F16 => &self.f16,
        }
    }
}

/// gate, up (n) -> out (n)
type GateForward<T> = fn(&Glu, &[T], &[T], &mut [MaybeUninit<T>]);
/// gate, up, dy (n) -> dgate, dup (n)
type GateBackward<T> = fn(&Glu, [&[T]; 3], [&mut [MaybeUninit<T>]; 2]);

/// The gate for one dtype.
#[derive(Clone, Copy)]
pub(super) struct GateKernels<T: 'static> {
    pub(super) forward: GateForward<T>,
    pub(super) backward: GateBackward<T>,
}

impl<T: Element> GateKernels<T> {
    pub(super) fn new<I: Isa>(_proof: I) -> Self {
        Self {
            forward: |op, gate, up, out| {
                // SAFETY: `new` was given the proof.
                unsafe { I::assume() }.vectorize(Forward { op, gate, up, out });
            },
            backward: |op, inputs, outputs| {
                // SAFETY: as above.
                unsafe { I::assume() }.vectorize(Backward { op, inputs, outputs });
            },
        }
    }
}

struct Forward<'a, T> {
    op: &'a Glu,
    gate: &'a [T],
    up: &'a [T],
    out: &'a mut [MaybeUninit<T>],
}

impl<S: Simd, T: Element> Body<S> for Forward<'_, T> {
    type Output = ();
    #[inline(always)]
    fn run(self, s: S) {
        glu::forward(s, self.op, self.gate, self.up, self.out);
    }
}

struct Backward<'a, T> {
    op: &'a Glu,
    inputs: [&'a [T]; 3],
    outputs: [&'a mut [MaybeUninit<T>]; 2],
}

impl<S: Simd, T: Element> Body<S> for Backward<'_, T> {
    type Output = ();
    #[inline(always)]
    fn run(self, s: S) {
        glu::backward(s, self.op, self.inputs, self.outputs);
    }
}

/// Products with weights of one format.
pub(super) struct FormatKernels {
    pub(super) sweep: Sweep,
    pub(super) f32: Option<Edges<f32>>,
    pub(super) bf16: Option<Edges<bf16>>,
    pub(super) f16: Option<Edges<f16>>,
}

/// What surrounds a product whose x, h and y have dtype T.
#[derive(Clone, Copy)]
pub(super) struct Edges<T: 'static> {
    /// x (n) -> A (n), both contiguous.
    pub(super) take_x: unsafe fn(*const T, usize, *mut u8),
    /// The sums of a gate and up panel -> h as A: operation, sums, first element and stride of h.
    pub(super) gate: unsafe fn(&Glu, PanelSums, *mut u8, usize),
    /// The sums of a panel times a factor -> y.
    pub(super) output: OutputFn<T>,
    /// The same with y in f32.
    pub(super) output_f32: OutputFn<f32>,
    /// Packs B of dtype T into the panels of one unit.
    pub(super) pack: Pack,
    /// Packs B, whose elements are those of A, in the same way.
    pub(super) pack_a: Pack,
    /// h and the gradients of gate and up, rounded to T, as A.
    pub(super) gate_gradients: unsafe fn(&GateGradients<T>),
}

impl<T> Edges<T> {
    /// The sums of a panel -> A: first element and stride of A, columns, and bytes of an element.
    /// With 2 of them A is bf16, and so is T.
    ///
    /// # Safety
    /// As [`Edges::output`].
    pub(super) unsafe fn output_a(
        &self,
        sums: PanelSums,
        a: *mut u8,
        stride: usize,
        columns: usize,
        a_bytes: usize,
    ) {
        // SAFETY: the caller's contract.
        unsafe {
            if a_bytes == size_of::<f32>() {
                (self.output_f32)(sums, 1.0, a.cast(), stride, columns);
            } else {
                (self.output)(sums, 1.0, a.cast(), stride, columns);
            }
        }
    }
}

/// Writes y from the sums of a panel: sums, factor, first element and stride of y, columns.
pub(super) type OutputFn<Y> = unsafe fn(PanelSums, f32, *mut Y, usize, usize);

/// A dtype of x, h and y.
pub(super) trait Io: Element + WithDType {
    /// What surrounds products with weights of a format; none if the format does not support this
    /// dtype.
    fn edges(kernels: &FormatKernels) -> Option<&Edges<Self>>;
}

macro_rules! io {
    ($dtype:ty, $field:ident) => {
        impl Io for $dtype {
            fn edges(kernels: &FormatKernels) -> Option<&Edges<Self>> {
                kernels.$field.as_ref()
            }
        }
    };
}

io!(f32, f32);
io!(bf16, bf16);
io!(f16, f16);

/// The element type of A beside tensors of dtype T.
pub(super) trait Operand<T: Element>:
    Element + Hidden<T> + PackedFrom<T> + PackedFrom<Self>
{
}

impl<T: Element, H: Element + Hidden<T> + PackedFrom<T> + PackedFrom<H>> Operand<T> for H {}

/// The size of an instruction set's microkernels: NV vectors of columns, and heights up to MR rows.
/// MR·NV sums, NV columns of B and one value of A are to fit the registers.
pub(super) trait Shape {
    /// Vectors of a panel.
    const NV: usize;
    /// Microkernels for 1, 2, .., MR rows.
    fn micro<I: Isa, P: Product<I::Simd>, A: Access, const ROLE: u8>() -> Vec<Micro>;
    /// Microkernels for several adjacent panels, for 1, 2, .. rows.
    fn adjacent<I: Isa, P: Product<I::Simd>, A: Access>() -> Vec<(usize, Micro)>;
    /// Rewrites a k-block of T as f32.
    fn widen<I: Isa, T: Stored, A: Access>() -> unsafe fn(*const u8, usize, usize, *mut u8);
    /// What surrounds products; h is stored as H.
    fn edges<I: Isa, T: Io, H: Operand<T>>(take_x: unsafe fn(*const T, usize, *mut u8))
    -> Edges<T>;
}

/// A [`Shape`]: its vectors, its heights, and how many adjacent panels it multiplies for how many
/// rows.
macro_rules! shape {
    ($name:ident, $nv:literal, [$($mr:literal),*], [$($rows:literal => $panels:literal),*]) => {
        #[allow(dead_code, reason = "not every target has an instruction set of this shape")]
        pub(super) struct $name;

        impl Shape for $name {
            const NV: usize = $nv;
            fn micro<I: Isa, P: Product<I::Simd>, A: Access, const ROLE: u8>() -> Vec<Micro> {
                vec![$(micro::<I, P, A, ROLE, $mr, $nv>),*]
            }
            fn adjacent<I: Isa, P: Product<I::Simd>, A: Access>() -> Vec<(usize, Micro)> {
                vec![$(($panels, micro_adjacent::<I, P, A, $rows, $nv, $panels>)),*]
            }
            fn widen<I: Isa, T: Stored, A: Access>() -> unsafe fn(*const u8, usize, usize, *mut u8) {
                widen_block::<I, T, A, $nv>
            }
            fn edges<I: Isa, T: Io, H: Operand<T>>(take_x: unsafe fn(*const T, usize, *mut u8)) -> Edges<T> {
                Edges {
                    take_x,
                    gate: gate::<I, T, H, $nv>,
                    output: output::<I, T, $nv>,
                    output_f32: output::<I, f32, $nv>,
                    pack: pack::<I, T, H>,
                    pack_a: pack::<I, H, H>,
                    gate_gradients: gate_gradients::<I, T, H, $nv>,
                }
            }
        }
    };
}

shape!(TwoByTwelve, 2, [1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12], [1 => 2, 2 => 2, 3 => 2, 4 => 2, 5 => 2, 6 => 2]);
shape!(TwoBySix, 2, [1, 2, 3, 4, 5, 6], [1 => 2, 2 => 2, 3 => 2]);
shape!(TwoByFour, 2, [1, 2, 3, 4], []);
shape!(FourBySix, 4, [1, 2, 3, 4, 5, 6], []);
shape!(FourByFive, 4, [1, 2, 3, 4, 5], []);
shape!(EightByTwo, 8, [1, 2], []);
#[cfg(test)]
shape!(ThirtyTwo, 32, [], []);

/// # Safety
/// The CPU has the instructions of I; otherwise as [`widen`].
unsafe fn widen_block<I: Isa, T: Stored, A: Access, const NV: usize>(
    b: *const u8,
    stream_stride: usize,
    steps: usize,
    out: *mut u8,
) {
    struct Block<T, A>(*const u8, usize, usize, *mut u8, std::marker::PhantomData<(T, A)>);
    struct Sized<B, const NV: usize>(B);
    impl<S: Simd, T: Stored, A: Access, const NV: usize> Body<S> for Sized<Block<T, A>, NV> {
        type Output = ();
        #[inline(always)]
        fn run(self, s: S) {
            let Block(b, stream_stride, steps, out, _) = self.0;
            // SAFETY: `widen_block`'s contract.
            unsafe {
                match A::STREAMS {
                    1 => widen::<S, T, NV, 1>(s, b.cast(), stream_stride, steps, out.cast()),
                    _ => widen::<S, T, NV, 4>(s, b.cast(), stream_stride, steps, out.cast()),
                }
            }
        }
    }
    let block = Block::<T, A>(b, stream_stride, steps, out, std::marker::PhantomData);
    // SAFETY: the caller's contract.
    unsafe { I::assume() }.vectorize(Sized::<_, NV>(block));
}

/// # Safety
/// The CPU has the instructions of I; otherwise as [`Edges::take_x`].
unsafe fn widen_x<I: Isa, T: Element>(from: *const T, n: usize, to: *mut u8) {
    // SAFETY: the caller's contract.
    unsafe { I::assume() }.vectorize(Widening { from, n, to: to.cast() });
}

/// # Safety
/// The CPU has the instructions of I; otherwise as [`epilogue::hidden`].
unsafe fn gate<I: Isa, T: Element, H: Hidden<T>, const NV: usize>(
    op: &Glu,
    panel: PanelSums,
    h: *mut u8,
    h_stride: usize,
) {
    struct Gate<'a, T, H, const NV: usize>(
        &'a Glu,
        PanelSums,
        *mut H,
        usize,
        std::marker::PhantomData<T>,
    );
    impl<S: Simd, T: Element, H: Hidden<T>, const NV: usize> Body<S> for Gate<'_, T, H, NV> {
        type Output = ();
        #[inline(always)]
        fn run(self, s: S) {
            // SAFETY: `gate`'s contract.
            unsafe { epilogue::hidden::<S, T, H, NV>(s, self.0, self.1, self.2, self.3) }
        }
    }
    let body = Gate::<T, H, NV>(op, panel, h.cast(), h_stride, std::marker::PhantomData);
    // SAFETY: the caller's contract.
    unsafe { I::assume() }.vectorize(body);
}

/// # Safety
/// The CPU has the instructions of I; otherwise as [`epilogue::gradients`].
unsafe fn gate_gradients<I: Isa, T: Element, H: Hidden<T>, const NV: usize>(
    args: &GateGradients<T>,
) {
    struct Gradients<'a, T, H, const NV: usize>(
        &'a GateGradients<'a, T>,
        std::marker::PhantomData<H>,
    );
    impl<S: Simd, T: Element, H: Hidden<T>, const NV: usize> Body<S> for Gradients<'_, T, H, NV> {
        type Output = ();
        #[inline(always)]
        fn run(self, s: S) {
            // SAFETY: `gate_gradients`'s contract.
            unsafe { epilogue::gradients::<S, T, H, NV>(s, self.0) }
        }
    }
    // SAFETY: the caller's contract.
    unsafe { I::assume() }.vectorize(Gradients::<T, H, NV>(args, std::marker::PhantomData));
}

/// # Safety
/// The CPU has the instructions of I; otherwise as [`Output`].
unsafe fn output<I: Isa, Y: Element, const NV: usize>(
    panel: PanelSums,
    factor: f32,
    y: *mut Y,
    y_stride: usize,
    columns: usize,
) {
    // SAFETY: the caller's contract.
    unsafe { I::assume() }.vectorize(Output::<Y, NV> { panel, factor, y, y_stride, columns });
}

/// The microkernels of a product, in a shape and with a tuning.
pub(super) fn sweep<I: Isa, P: Product<I::Simd>, M: Shape, U: Tuned>(
    rewritten: Option<Rewritten>,
) -> Sweep {
    Sweep {
        nr: M::NV * I::Simd::LANES,
        streams: U::Access::STREAMS,
        a_bytes: size_of::<P::A>(),
        format: P::FORMAT,
        micro: M::micro::<I, P, U::Access, { Role::QUIET }>(),
        micro_block: M::micro::<I, P, U::Access, { Role::BLOCK }>(),
        micro_sweep: M::micro::<I, P, U::Access, { Role::SWEEP }>(),
        micro_adjacent: M::adjacent::<I, P, U::Access>(),
        rewritten,
        tiles: None,
        tuning: U::TUNING,
    }
}

/// Products in f32 with weights of dtype T, each of which is widened when it is loaded, and x, h
/// and y of the same dtype. With many rows a k-block is widened once.
fn widening<I: Isa, T: Io + Stored, M: Shape, U: Tuned>() -> (Sweep, Edges<T>)
where
    Widen<T>: Product<I::Simd>,
    Widen<f32>: Product<I::Simd>,
{
    let rewritten = (T::FORMAT != Format::F32).then(|| Rewritten {
        from_rows: U::TUNING.widen_from,
        rewrite: M::widen::<I, T, U::Access>(),
        micro: M::micro::<I, Widen<f32>, super::tuning::OneStream, { Role::QUIET }>(),
        value_bytes: size_of::<f32>(),
    });
    (sweep::<I, Widen<T>, M, U>(rewritten), M::edges::<I, T, f32>(widen_x::<I, T>))
}

/// The kernels of an instruction set that multiplies f32: shapes for f32, bf16 and f16, and a
/// tuning.
pub(super) fn kernels<I: Isa, F32: Shape, Bf16: Shape, F16: Shape, U: Tuned>(
    name: &'static str,
    isa: I,
) -> CpuKernels {
    let (f32, f32_edges) = widening::<I, f32, F32, U>();
    let (bf16, bf16_edges) = widening::<I, bf16, Bf16, U>();
    let (f16, f16_edges) = widening::<I, f16, F16, U>();
    CpuKernels {
        name,
        base_name: name,
        gate_f32: GateKernels::new(isa),
        gate_bf16: GateKernels::new(isa),
        gate_f16: GateKernels::new(isa),
        f32: FormatKernels {
            sweep: f32,
            f32: Some(f32_edges),
            bf16: Some(F32::edges::<I, bf16, f32>(widen_x::<I, bf16>)),
            f16: Some(F32::edges::<I, f16, f32>(widen_x::<I, f16>)),
        },
        bf16: FormatKernels { sweep: bf16, f32: None, bf16: Some(bf16_edges), f16: None },
        f16: FormatKernels { sweep: f16, f32: None, bf16: None, f16: Some(f16_edges) },
    }
}

/// [`kernels`] of a base instruction set whose products in bf16 are replaced by `P` of `I`, which
/// multiplies bf16 as it is stored. `rewritten` is for instructions that want another order with
/// many rows.
#[cfg(any(target_arch = "x86_64", target_arch = "aarch64"))]
pub(super) fn with_bf16<I: Isa, P: Product<I::Simd, A = bf16>, M: Shape, U: Tuned>(
    name: &'static str,
    _proof: I,
    base: CpuKernels,
    rewritten: Option<Rewritten>,
) -> CpuKernels {
    let sweep = sweep::<I, P, M, U>(rewritten);
    let edges = M::edges::<I, bf16, bf16>(epilogue::copy_bf16);
    CpuKernels {
        name,
        bf16: FormatKernels { sweep, f32: None, bf16: Some(edges), f16: None },
        ..base
    }
}

/// [`kernels`] of a base instruction set whose products in bf16 are computed by a matrix unit.
#[cfg(any(target_arch = "x86_64", test))]
pub(super) fn with_tiles<I: Isa, M: Shape>(
    name: &'static str,
    _proof: I,
    base: CpuKernels,
    tiles: Tiles,
) -> CpuKernels {
    let sweep = Sweep {
        nr: tiles::NR,
        streams: 1,
        a_bytes: size_of::<bf16>(),
        format: Format::Bf16,
        micro: vec![],
        micro_block: vec![],
        micro_sweep: vec![],
        micro_adjacent: vec![],
        rewritten: None,
        tiles: Some(tiles),
        tuning: base.bf16.sweep.tuning,
    };
    assert!(M::NV * I::Simd::LANES == tiles::NR, "the epilogues are for these columns");
    let edges = M::edges::<I, bf16, bf16>(epilogue::copy_bf16);
    CpuKernels {
        name,
        bf16: FormatKernels { sweep, f32: None, bf16: Some(edges), f16: None },
        ..base
    }
}
