//! AVX-512: 16 lanes (avx512f, avx512bw, avx512dq; avx512vl is not needed).

use std::arch::asm;
use std::arch::x86_64::*;

use half::{bf16, f16};

use crate::cpu::kernels::{CpuKernels, FourBySix, TwoByTwelve, kernels};
use crate::cpu::simd::{Body, Isa, Simd};
use crate::cpu::tuning::{Avx512OnSapphireRapids, Avx512OnZen4, CpuFamily};

/// Proof that the CPU has avx512f, avx512bw and avx512dq. The `unsafe` blocks below rely on it.
#[derive(Clone, Copy)]
pub(super) struct Avx512(());

impl Avx512 {
    pub(super) fn new() -> Option<Self> {
        let has = is_x86_feature_detected!("avx512f")
            && is_x86_feature_detected!("avx512bw")
            && is_x86_feature_detected!("avx512dq");
        has.then_some(Self(()))
    }
}

impl Isa for Avx512 {
    type Simd = Self;

    #[inline(always)]
    unsafe fn assume() -> Self {
        Self(())
    }

    #[inline(always)]
    fn vectorize<B: Body<Self>>(self, body: B) -> B::Output {
        #[target_feature(enable = "avx512f,avx512bw,avx512dq")]
        fn enabled<B: Body<Avx512>>(s: Avx512, body: B) -> B::Output {
            body.run(s)
        }
        // SAFETY: `self` proves the target features.
        unsafe { enabled(self, body) }
    }
}

/// The kernels, if the CPU has the instructions. bf16 and f16 use panels of four vectors: with two,
/// too few loads are in flight (on Zen 4, 3 to 6 rows are 5 to 20 % slower).
pub(super) fn detect(family: CpuFamily) -> Option<CpuKernels> {
    let isa = Avx512::new()?;
    Some(match family {
        // f32 as well: a multiply-add shares its port with other instructions, of which four
        // vectors and six rows need the fewest (2 vectors and 12 rows: up to a fifth slower).
        CpuFamily::SapphireRapids => {
            kernels::<_, FourBySix, FourBySix, FourBySix, Avx512OnSapphireRapids>("avx512", isa)
        }
        // Measured on Zen 4 and 5 alone.
        CpuFamily::Zen3 | CpuFamily::Zen4 | CpuFamily::Zen5 | CpuFamily::Other => {
            kernels::<_, TwoByTwelve, FourBySix, FourBySix, Avx512OnZen4>("avx512", isa)
        }
    })
}

/// See [`Simd::pin`]. Assembly accepts vectors only in a function with the target features.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512dq")]
fn pin(mut a: __m512) -> __m512 {
    // SAFETY: the assembly is a comment. The compiler must assume that it changes `a` and memory.
    unsafe { asm!("/* {0} */", inout(zmm_reg) a, options(nostack, preserves_flags)) };
    a
}

impl Simd for Avx512 {
    const LANES: usize = 16;
    const UNROLL: usize = 2;
    /// The six rows beside four vectors have an address register each; twelve would not fit.
    const UNROLL_FROM: usize = 4;
    type F = __m512;
    type Mask = __mmask16;

    #[inline(always)]
    fn splat(self, value: f32) -> __m512 {
        // SAFETY: `self` proves the instructions.
        unsafe { _mm512_set1_ps(value) }
    }
    #[inline(always)]
    fn add(self, a: __m512, b: __m512) -> __m512 {
        // SAFETY: `self` proves the instructions.
        unsafe { _mm512_add_ps(a, b) }
    }
    #[inline(always)]
    fn sub(self, a: __m512, b: __m512) -> __m512 {
        // SAFETY: `self` proves the instructions.
        unsafe { _mm512_sub_ps(a, b) }
    }
    #[inline(always)]
    fn mul(self, a: __m512, b: __m512) -> __m512 {
        // SAFETY: `self` proves the instructions.
        unsafe { _mm512_mul_ps(a, b) }
    }
    #[inline(always)]
    fn div(self, a: __m512, b: __m512) -> __m512 {
        // SAFETY: `self` proves the instructions.
        unsafe { _mm512_div_ps(a, b) }
    }
    #[inline(always)]
    fn fma(self, a: __m512, b: __m512, c: __m512) -> __m512 {
        // SAFETY: `self` proves the instructions.
        unsafe { _mm512_fmadd_ps(a, b, c) }
    }
    #[inline(always)]
    fn pin(self, a: __m512) -> __m512 {
        // SAFETY: `self` proves the instructions.
        unsafe { pin(a) }
    }
    #[inline(always)]
    fn hide<T>(self, mut row: *const T) -> *const T {
        // SAFETY: the assembly is a comment. The compiler must assume that it changes `row`.
        unsafe {
            asm!("/* {0} */", inout(reg) row, options(pure, readonly, nostack, preserves_flags));
        }
        row
    }
    #[inline(always)]
    fn abs(self, a: __m512) -> __m512 {
        // SAFETY: `self` proves the instructions.
        unsafe { _mm512_abs_ps(a) }
    }
    #[inline(always)]
    fn round(self, a: __m512) -> __m512 {
        // SAFETY: `self` proves the instructions.
        unsafe { _mm512_roundscale_ps::<_MM_FROUND_TO_NEAREST_INT>(a) }
    }
    #[inline(always)]
    fn scale(self, a: __m512, n: __m512) -> __m512 {
        // SAFETY: `self` proves the instructions.
        unsafe { _mm512_scalef_ps(a, n) }
    }
    #[inline(always)]
    fn le(self, a: __m512, b: __m512) -> __mmask16 {
        // SAFETY: `self` proves the instructions.
        unsafe { _mm512_cmp_ps_mask::<_CMP_LE_OQ>(a, b) }
    }
    #[inline(always)]
    fn select(self, mask: __mmask16, yes: __m512, no: __m512) -> __m512 {
        // SAFETY: `self` proves the instructions.
        unsafe { _mm512_mask_blend_ps(mask, no, yes) }
    }

    #[inline(always)]
    unsafe fn load_f32(self, src: *const f32) -> __m512 {
        // SAFETY: `self` proves the instructions, the caller gives 16 readable elements.
        unsafe { _mm512_loadu_ps(src) }
    }
    #[inline(always)]
    unsafe fn store_f32(self, value: __m512, dst: *mut f32) {
        // SAFETY: `self` proves the instructions, the caller gives 16 writable elements.
        unsafe { _mm512_storeu_ps(dst, value) }
    }
    #[inline(always)]
    unsafe fn load_bf16(self, src: *const bf16) -> __m512 {
        // SAFETY: `self` proves the instructions, the caller gives 16 readable elements; bf16 is
        // the upper half of f32.
        unsafe {
            let bits = _mm512_cvtepu16_epi32(_mm256_loadu_si256(src.cast()));
            _mm512_castsi512_ps(_mm512_slli_epi32::<16>(bits))
        }
    }
    /// The even element of each pair is the lower half of 32 bits.
    #[inline(always)]
    unsafe fn load_bf16_even(self, src: *const bf16) -> __m512 {
        // SAFETY: `self` proves the instructions, the caller gives 32 readable elements.
        unsafe { _mm512_castsi512_ps(_mm512_slli_epi32::<16>(_mm512_loadu_si512(src.cast()))) }
    }
    #[inline(always)]
    unsafe fn load_bf16_odd(self, src: *const bf16) -> __m512 {
        // SAFETY: `self` proves the instructions, the caller gives 32 readable elements.
        unsafe {
            let upper = _mm512_set1_epi32(0xffff_0000u32 as i32);
            _mm512_castsi512_ps(_mm512_and_si512(_mm512_loadu_si512(src.cast()), upper))
        }
    }
    /// Adds 0x7fff and the last kept bit, then truncates. `vcvtneps2bf16` would flush denormals.
    #[inline(always)]
    unsafe fn store_bf16(self, value: __m512, dst: *mut bf16) {
        // SAFETY: `self` proves the instructions, the caller gives 16 writable elements.
        unsafe {
            let bits = _mm512_castps_si512(value);
            let odd = _mm512_and_si512(_mm512_srli_epi32::<16>(bits), _mm512_set1_epi32(1));
            let rounded = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
            let nan = _mm512_cmp_ps_mask::<_CMP_UNORD_Q>(value, value);
            let quiet = _mm512_or_si512(bits, _mm512_set1_epi32(0x0040_0000));
            let kept = _mm512_srli_epi32::<16>(_mm512_mask_blend_epi32(nan, rounded, quiet));
            _mm256_storeu_si256(dst.cast(), _mm512_cvtepi32_epi16(kept));
        }
    }
    #[inline(always)]
    unsafe fn load_f16(self, src: *const f16) -> __m512 {
        // SAFETY: `self` proves the instructions, the caller gives 16 readable elements.
        unsafe { _mm512_cvt_roundph_ps::<_MM_FROUND_CUR_DIRECTION>(_mm256_loadu_si256(src.cast())) }
    }
    #[inline(always)]
    unsafe fn store_f16(self, value: __m512, dst: *mut f16) {
        // SAFETY: `self` proves the instructions, the caller gives 16 writable elements.
        unsafe {
            _mm256_storeu_si256(dst.cast(), _mm512_cvtps_ph::<_MM_FROUND_TO_NEAREST_INT>(value))
        }
    }
}
