//! The multiply-add peaks of this machine, measured: chains of independent sums in registers, on every thread at once.
#![allow(unsafe_code)]

use std::time::Instant;

use candle_core::DType;

/// The peak that bounds a kernel for a dtype.
pub fn peak_of(kernel: &str, dtype: DType) -> &'static str {
    match (kernel.trim_start_matches("plain-"), dtype) {
        ("avx512bf16", DType::BF16) => "vdpbf16ps",
        ("avx512bf16" | "avx512", _) => "f32 fma 512",
        ("avx2", _) => "f32 fma 256",
        _ => "none",
    }
}

/// Flop/s of all threads together, for every instruction set that is here.
pub fn peaks() -> Vec<(&'static str, f64)> {
    #[cfg(target_arch = "x86_64")]
    {
        let mut peaks = vec![];
        if is_x86_feature_detected!("avx512f") && is_x86_feature_detected!("avx512bf16") {
            // SAFETY: just detected.
            peaks.push(("vdpbf16ps", measure(64.0 * x86::SUMS as f64, |n| unsafe { x86::bf16(n) })));
        }
        if is_x86_feature_detected!("avx512f") {
            // SAFETY: just detected.
            peaks.push(("f32 fma 512", measure(32.0 * x86::SUMS as f64, |n| unsafe { x86::f32_512(n) })));
        }
        if is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma") {
            // SAFETY: just detected.
            peaks.push(("f32 fma 256", measure(16.0 * x86::SUMS as f64, |n| unsafe { x86::f32_256(n) })));
        }
        peaks
    }
    #[cfg(not(target_arch = "x86_64"))]
    vec![]
}

/// The best of several runs of `f(n)` on every thread, where one round of n is so many flop.
fn measure(flop: f64, f: impl Fn(usize) + Sync) -> f64 {
    const ROUNDS: usize = 4_000_000;
    let threads = candle_core::utils::get_num_threads();
    let run = || {
        let start = Instant::now();
        std::thread::scope(|scope| (0..threads).for_each(|_| drop(scope.spawn(|| f(ROUNDS)))));
        flop * (ROUNDS * threads) as f64 / start.elapsed().as_secs_f64()
    };
    (0..7).map(|_| run()).fold(0.0, f64::max)
}

#[cfg(target_arch = "x86_64")]
mod x86 {
    use std::arch::x86_64::*;
    use std::hint::black_box;

    /// Independent sums: two pipes times a latency of up to five cycles, and some.
    pub const SUMS: usize = 12;

    #[target_feature(enable = "avx512f,avx512bf16")]
    pub fn bf16(rounds: usize) {
        // SAFETY: 64 bytes each, and any pattern is a number.
        let a: __m512bh = unsafe { std::mem::transmute(_mm512_set1_epi16(black_box(0x3f80))) };
        let mut sums = [_mm512_setzero_ps(); SUMS];
        for _ in 0..rounds {
            sums.iter_mut().for_each(|sum| *sum = _mm512_dpbf16_ps(*sum, a, a));
        }
        black_box(sums);
    }

    #[target_feature(enable = "avx512f")]
    pub fn f32_512(rounds: usize) {
        let a = _mm512_set1_ps(black_box(1.0));
        let mut sums = [_mm512_setzero_ps(); SUMS];
        for _ in 0..rounds {
            sums.iter_mut().for_each(|sum| *sum = _mm512_fmadd_ps(a, a, *sum));
        }
        black_box(sums);
    }

    #[target_feature(enable = "avx2,fma")]
    pub fn f32_256(rounds: usize) {
        let a = _mm256_set1_ps(black_box(1.0));
        let mut sums = [_mm256_setzero_ps(); SUMS];
        for _ in 0..rounds {
            sums.iter_mut().for_each(|sum| *sum = _mm256_fmadd_ps(a, a, *sum));
        }
        black_box(sums);
    }
}
