//! AVX-512 with `vdpbf16ps`, which multiplies pairs of bf16 and adds them to sums in f32
//! (avx512bf16 beside the features of AVX-512).

use std::arch::x86_64::*;

use half::bf16;

use super::avx512::Avx512;
use crate::cpu::format::Format;
use crate::cpu::kernels::{CpuKernels, TwoByTwelve, with_bf16};
use crate::cpu::product::{DotBf16, Product};
use crate::cpu::simd::{Body, Isa, Simd};
use crate::cpu::tuning::{Avx512OnZen4, CpuFamily};

/// Proof that the CPU has avx512bf16 and what [`Avx512`] proves.
#[derive(Clone, Copy)]
pub(super) struct Avx512Bf16(Avx512);

impl Avx512Bf16 {
    pub(super) fn new() -> Option<Self> {
        Avx512::new().filter(|_| is_x86_feature_detected!("avx512bf16")).map(Self)
    }
}

impl Isa for Avx512Bf16 {
    type Simd = Avx512;

    #[inline(always)]
    unsafe fn assume() -> Self {
        // SAFETY: the caller's contract.
        Self(unsafe { Avx512::assume() })
    }

    #[inline(always)]
    fn vectorize<B: Body<Avx512>>(self, body: B) -> B::Output {
        #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512bf16")]
        fn enabled<B: Body<Avx512>>(s: Avx512, body: B) -> B::Output {
            body.run(s)
        }
        // SAFETY: `self` proves the target features.
        unsafe { enabled(self.0, body) }
    }
}

/// The kernels, if the CPU has the instructions: those of AVX-512 but for products in bf16.
pub(super) fn detect(family: CpuFamily) -> Option<CpuKernels> {
    let (isa, base) = (Avx512Bf16::new()?, super::avx512::detect(family)?);
    Some(with_bf16::<_, DotBf16, TwoByTwelve, Avx512OnZen4>("avx512bf16", isa, base, None))
}

/// acc + a₀·b₀ + a₁·b₁ in every lane: a pair of bf16 from `a` with each pair of `b`. `vdpbf16ps`
/// treats denormals as 0.
///
/// # Safety
/// The CPU has avx512bf16.
#[inline(always)]
unsafe fn dot_bf16(acc: __m512, a: __m512, b: __m512) -> __m512 {
    // SAFETY: the caller's contract; both types are 64 bytes without invalid patterns.
    unsafe {
        let (a, b) = (
            std::mem::transmute::<__m512, __m512bh>(a),
            std::mem::transmute::<__m512, __m512bh>(b),
        );
        _mm512_dpbf16_ps(acc, a, b)
    }
}

/// A pair of bf16 in every lane.
///
/// # Safety
/// The CPU has avx512f; `src` points to two readable bf16, at any alignment.
#[inline(always)]
unsafe fn splat_pair(src: *const bf16) -> __m512 {
    // SAFETY: the caller's contract.
    unsafe { _mm512_set1_ps(src.cast::<f32>().read_unaligned()) }
}

impl Product<Avx512> for DotBf16 {
    type A = bf16;
    type B = bf16;
    const FORMAT: Format = Format::Bf16;
    /// No intermediate flush is needed: rounding the result to bf16 loses about 1,000 times more
    /// than summing in f32.
    const SUM_K: usize = usize::MAX;
    const MEMORY_BOUND: bool = true;

    #[inline(always)]
    unsafe fn step<const MR: usize, const NV: usize>(
        s: Avx512,
        acc: &mut [[__m512; NV]; MR],
        a: &[*const bf16; MR],
        at: usize,
        b: *const bf16,
    ) {
        // SAFETY: the caller's contract.
        unsafe {
            let mut columns = [s.splat(0.0); NV];
            for (v, column) in columns.iter_mut().enumerate() {
                *column = s.load_f32(b.add(v * 32).cast());
            }
            for r in 0..MR {
                let a = splat_pair(a[r].add(at));
                for v in 0..NV {
                    acc[r][v] = s.pin(dot_bf16(acc[r][v], a, columns[v]));
                }
            }
        }
    }
}
