//! The vectors that the CPU kernels are written with, and how each dtype is loaded and stored.
//!
//! Every operation is a correctly rounded IEEE one, so an algorithm gives the same bits on every
//! instruction set; the tests assert it. The exception is `mul_add`, the step of long sums. It
//! rounds the product too where an instruction set has no fused multiply-add (scalar, simd128).
//!
//! A value of a type that implements [`Simd`] is the proof that the CPU has the instructions: it
//! can be made only inside this folder's instruction-set files, after detection.

use half::{bf16, f16};

/// f32 vectors of one instruction set. All methods are `inline(always)`, so that they are compiled
/// with the caller's target features.
pub(super) trait Simd: Copy {
    /// Elements of one vector.
    const LANES: usize;
    /// Values of A that a microkernel loads at once and selects with [`Simd::mul_add_lane`]. 1 if a
    /// broadcast from memory costs no more than a load.
    const GROUP: usize = 1;
    /// Steps per iteration of a microkernel's loop. More than 1 if a step is so short that the loop
    /// itself takes a noticeable share of the time.
    const UNROLL: usize = 1;
    /// The narrowest panel, in vectors, for which the loop is unrolled and addresses are hidden.
    const UNROLL_FROM: usize = 0;
    /// A vector of f32.
    type F: Copy;
    /// One boolean per lane.
    type Mask: Copy;

    fn splat(self, value: f32) -> Self::F;
    fn add(self, a: Self::F, b: Self::F) -> Self::F;
    fn sub(self, a: Self::F, b: Self::F) -> Self::F;
    fn mul(self, a: Self::F, b: Self::F) -> Self::F;
    fn div(self, a: Self::F, b: Self::F) -> Self::F;
    /// a·b + c with one rounding.
    fn fma(self, a: Self::F, b: Self::F, c: Self::F) -> Self::F;
    /// a·b + c, with one rounding if the instruction set has a fused multiply-add: the step of a
    /// sum.
    #[inline(always)]
    fn mul_add(self, a: Self::F, b: Self::F, c: Self::F) -> Self::F {
        self.fma(a, b, c)
    }
    /// The element `LANE` < `GROUP` of a, times b, + c, as [`Simd::mul_add`].
    #[inline(always)]
    fn mul_add_lane<const LANE: usize>(self, a: Self::F, b: Self::F, c: Self::F) -> Self::F {
        self.mul_add(a, b, c)
    }
    /// Returns `a` unchanged. Acts as a scheduling fence: without it the compiler hoists loads,
    /// runs out of registers and spills accumulators.
    #[inline(always)]
    fn pin(self, a: Self::F) -> Self::F {
        a
    }
    /// Returns the address of a row unchanged, but hides from the compiler how the rows' addresses
    /// follow from each other. It then keeps each in a register. Otherwise it computes them in
    /// every step, and on Intel CPUs those instructions use the ports of the multiply-adds.
    #[inline(always)]
    fn hide<T>(self, row: *const T) -> *const T {
        row
    }
    fn abs(self, a: Self::F) -> Self::F;
    /// The nearest integer, ties to even.
    fn round(self, a: Self::F) -> Self::F;
    /// a·2ⁿ with one rounding, for a in [½, 2] and an integer n in [-252, 0].
    fn scale(self, a: Self::F, n: Self::F) -> Self::F;
    /// a ≤ b; false where either is NaN.
    fn le(self, a: Self::F, b: Self::F) -> Self::Mask;
    fn select(self, mask: Self::Mask, yes: Self::F, no: Self::F) -> Self::F;

    /// # Safety
    /// `src` points to `LANES` readable f32, at any alignment.
    unsafe fn load_f32(self, src: *const f32) -> Self::F;
    /// # Safety
    /// `dst` points to `LANES` writable f32, at any alignment.
    unsafe fn store_f32(self, value: Self::F, dst: *mut f32);
    /// # Safety
    /// `src` points to `LANES` readable bf16, at any alignment.
    unsafe fn load_bf16(self, src: *const bf16) -> Self::F;
    /// Elements 0, 2, 4, ..
    /// # Safety
    /// `src` points to 2·`LANES` readable bf16, at any alignment.
    unsafe fn load_bf16_even(self, src: *const bf16) -> Self::F;
    /// Elements 1, 3, 5, ..
    /// # Safety
    /// `src` points to 2·`LANES` readable bf16, at any alignment.
    unsafe fn load_bf16_odd(self, src: *const bf16) -> Self::F;
    /// Rounds to nearest even; a NaN stays a NaN.
    /// # Safety
    /// `dst` points to `LANES` writable bf16, at any alignment.
    unsafe fn store_bf16(self, value: Self::F, dst: *mut bf16);
    /// # Safety
    /// `src` points to `LANES` readable f16, at any alignment.
    unsafe fn load_f16(self, src: *const f16) -> Self::F;
    /// Rounds to nearest even; a NaN stays a NaN.
    /// # Safety
    /// `dst` points to `LANES` writable f16, at any alignment.
    unsafe fn store_f16(self, value: Self::F, dst: *mut f16);
}

/// An instruction set that the CPU has: a value is the proof, and is made only after detection.
pub(super) trait Isa: Copy + 'static {
    /// Its vectors. Instruction sets that differ in products alone share them.
    type Simd: Simd;

    /// # Safety
    /// The CPU has the instructions.
    unsafe fn assume() -> Self;

    /// Runs `body` in a function that is compiled with the instruction set's target features. The
    /// body is inlined into it and takes them on, as closures would not.
    fn vectorize<B: Body<Self::Simd>>(self, body: B) -> B::Output;
}

/// Code to be compiled for an instruction set.
pub(super) trait Body<S: Simd> {
    type Output;
    /// Every implementation is `#[inline(always)]`.
    fn run(self, s: S) -> Self::Output;
}

/// A dtype that the vector kernels read and write.
pub(super) trait Element: Copy + Default + Send + Sync + 'static {
    /// # Safety
    /// As the `load_` of its dtype in [`Simd`].
    unsafe fn load<S: Simd>(simd: S, src: *const Self) -> S::F;
    /// # Safety
    /// As the `store_` of its dtype in [`Simd`].
    unsafe fn store<S: Simd>(simd: S, value: S::F, dst: *mut Self);
}

macro_rules! element {
    ($dtype:ty, $load:ident, $store:ident) => {
        impl Element for $dtype {
            #[inline(always)]
            unsafe fn load<S: Simd>(simd: S, src: *const Self) -> S::F {
                // SAFETY: the same contract.
                unsafe { simd.$load(src) }
            }
            #[inline(always)]
            unsafe fn store<S: Simd>(simd: S, value: S::F, dst: *mut Self) {
                // SAFETY: the same contract.
                unsafe { simd.$store(value, dst) }
            }
        }
    };
}

element!(f32, load_f32, store_f32);
element!(bf16, load_bf16, store_bf16);
element!(f16, load_f16, store_f16);

/// The largest number of lanes of any instruction set: the size of a buffer for the tail of a
/// slice.
pub(super) const MAX_LANES: usize = 16;
