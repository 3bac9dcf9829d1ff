//! The multiply-add peaks of this machine, measured with chains of independent sums in registers,
//! on all threads at once.
#![allow(unsafe_code)]

#[cfg(target_arch = "x86_64")]
use std::time::Instant;

use candle_core::DType;

/// Returns a function that executes, for about 20 ms, the instruction that bounds a kernel for a
/// dtype. Its result is the flop/s of all threads together. `None` where the kernel has no such
/// instruction.
pub fn peak_of(kernel: &str, dtype: DType) -> Option<fn() -> f64> {
    #[cfg(target_arch = "x86_64")]
    match (kernel.trim_start_matches("plain-"), dtype) {
        // A sixteenth of the rounds: each instruction takes 16 cycles.
        // SAFETY: as below; the process has the permission to use tiles.
        ("amx", DType::BF16) => return Some(|| burst(1024.0, |n| unsafe { x86::tiles(n / 16) })),
        // SAFETY: a kernel that runs implies that the CPU has its instructions.
        ("avx512bf16", DType::BF16) => return Some(|| burst(64.0, |n| unsafe { x86::bf16(n) })),
        ("amx" | "avx512bf16" | "avx512", _) => {
            // SAFETY: as above.
            return Some(|| burst(32.0, |n| unsafe { x86::f32_512(n) }));
        }
        // SAFETY: as above.
        ("avx2", _) => return Some(|| burst(16.0, |n| unsafe { x86::f32_256(n) })),
        _ => (),
    }
    let _ = (kernel, dtype); // unused on other architectures
    None
}

/// Runs `f(n)` on every thread of candle's pool, as many as the block uses. Each of the n rounds
/// executes [`x86::SUMS`] instructions of `flop` operations.
#[cfg(target_arch = "x86_64")]
fn burst(flop: f64, f: impl Fn(usize) + Sync) -> f64 {
    const ROUNDS: usize = 3_000_000;
    let pool = candle_core::utils::barrier_pool();
    let threads = pool.n_workers() + 1;
    let start = Instant::now();
    pool.execute(|_| f(ROUNDS));
    flop * (x86::SUMS * ROUNDS * threads) as f64 / start.elapsed().as_secs_f64()
}

#[cfg(target_arch = "x86_64")]
mod x86 {
    use std::arch::x86_64::*;
    use std::hint::black_box;

    /// Independent sums: slightly more than two pipes times a latency of up to five cycles.
    pub const SUMS: usize = 12;

    /// [`SUMS`] products of tiles in each round, in four independent sums.
    ///
    /// # Safety
    /// The CPU has AMX with bf16, the process may use it, and the thread has nothing in tiles.
    pub unsafe fn tiles(rounds: usize) {
        #[repr(align(64))]
        struct Configuration([u8; 64]);
        let mut wanted = Configuration([0; 64]);
        wanted.0[0] = 1;
        for tile in 0..8 {
            wanted.0[16 + 2 * tile] = 64;
            wanted.0[48 + tile] = 16;
        }
        // SAFETY: the caller's contract; the configuration is valid.
        unsafe {
            std::arch::asm!(
                "ldtilecfg [{wanted}]",
                "2:",
                "tdpbf16ps tmm0, tmm4, tmm6", "tdpbf16ps tmm1, tmm4, tmm7",
                "tdpbf16ps tmm2, tmm5, tmm6", "tdpbf16ps tmm3, tmm5, tmm7",
                "tdpbf16ps tmm0, tmm4, tmm6", "tdpbf16ps tmm1, tmm4, tmm7",
                "tdpbf16ps tmm2, tmm5, tmm6", "tdpbf16ps tmm3, tmm5, tmm7",
                "tdpbf16ps tmm0, tmm4, tmm6", "tdpbf16ps tmm1, tmm4, tmm7",
                "tdpbf16ps tmm2, tmm5, tmm6", "tdpbf16ps tmm3, tmm5, tmm7",
                "dec {rounds}",
                "jnz 2b",
                "tilerelease",
                wanted = in(reg) &raw const wanted,
                rounds = inout(reg) rounds.max(1) => _,
                out("tmm0") _, out("tmm1") _, out("tmm2") _, out("tmm3") _,
                out("tmm4") _, out("tmm5") _, out("tmm6") _, out("tmm7") _,
                options(nostack),
            );
        }
    }

    #[target_feature(enable = "avx512f,avx512bf16")]
    pub fn bf16(rounds: usize) {
        // SAFETY: both types have 64 bytes, and every bit pattern is valid.
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
