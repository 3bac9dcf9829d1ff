//! The read bandwidth of this machine: all threads read every byte of the given buffers once.
#![allow(unsafe_code, unreachable_pub, reason = "intrinsics; a benchmark and a test use it")]

use std::sync::atomic::{AtomicU32, AtomicUsize, Ordering};

/// Bytes that a thread claims at a time.
const PIECE: usize = 512 << 10;

/// Reads the buffers once with every thread of candle's pool, as many as the block uses, and
/// returns the sum of their 32-bit words mod 2³². A thread reads its piece in order, or as four
/// parallel streams; processors differ in which of the two is faster. `kernel` names the
/// instruction set of the loads, as [`candle_swiglu::SwiGluFfn::kernel`] does.
pub fn read_all(kernel: &str, buffers: &[&[u8]], streams: usize) -> u32 {
    let sum_words = sum_words_of(kernel);
    let pieces: Vec<&[u8]> = buffers.iter().flat_map(|buffer| buffer.chunks(PIECE)).collect();
    let (next, sum) = (AtomicUsize::new(0), AtomicU32::new(0));
    candle_core::utils::barrier_pool().execute(|_| {
        while let Some(piece) = pieces.get(next.fetch_add(1, Ordering::Relaxed)) {
            sum.fetch_add(sum_words(piece, streams), Ordering::Relaxed);
        }
    });
    sum.into_inner()
}

type SumWords = fn(&[u8], usize) -> u32;

fn sum_words_of(kernel: &str) -> SumWords {
    match kernel {
        // SAFETY: the kernel's name says that the CPU has the instructions.
        #[cfg(target_arch = "x86_64")]
        "amx" | "avx512bf16" | "avx512" => |bytes, streams| unsafe { x86::sum_512(bytes, streams) },
        // SAFETY: as above.
        #[cfg(target_arch = "x86_64")]
        "avx2" => |bytes, streams| unsafe { x86::sum_256(bytes, streams) },
        _ => sum_portable,
    }
}

/// Uses the vectors that the compiler chooses. On 64-bit ARM these have 128 bits, which is enough
/// for the bandwidth of its caches.
fn sum_portable(bytes: &[u8], streams: usize) -> u32 {
    sum_streams::<[u32; 4]>(bytes, streams, |sum, at| {
        // SAFETY: `sum_streams` passes the address of 16 bytes of the slice.
        let words = unsafe { at.cast::<[u32; 4]>().read_unaligned() };
        std::array::from_fn(|i| sum[i].wrapping_add(words[i]))
    })
}

/// Adds up vectors of `V` with `add`. Each of the four accumulators reads its own vector of a step.
/// With several streams, the steps alternate between equal sections of the bytes.
#[inline(always)]
fn sum_streams<V: Copy>(bytes: &[u8], streams: usize, add: impl Fn(V, *const u8) -> V) -> u32 {
    const ACCUMULATORS: usize = 4;
    let (size, streams) = (size_of::<V>(), streams.max(1));
    let step = ACCUMULATORS * size;
    let each = bytes.len() / streams / step * step;
    // SAFETY: `V` is a vector of integers, for which zeros are a value.
    let mut sums: [V; ACCUMULATORS] = unsafe { std::mem::zeroed() };
    for at in (0..each).step_by(step) {
        for stream in 0..streams {
            let vectors = bytes[stream * each + at..][..step].as_ptr();
            for (i, sum) in sums.iter_mut().enumerate() {
                // SAFETY: the step has ACCUMULATORS vectors.
                *sum = add(*sum, unsafe { vectors.add(i * size) });
            }
        }
    }
    // SAFETY: vectors of integers have no padding.
    let sums =
        unsafe { std::slice::from_raw_parts(sums.as_ptr().cast::<u8>(), size_of_val(&sums)) };
    let words = sums.chunks_exact(4).chain(bytes[streams * each..].chunks_exact(4));
    words.fold(0, |sum, word| {
        sum.wrapping_add(u32::from_ne_bytes([word[0], word[1], word[2], word[3]]))
    })
}

#[cfg(target_arch = "x86_64")]
mod x86 {
    use std::arch::x86_64::*;

    use super::sum_streams;

    #[target_feature(enable = "avx512f")]
    pub fn sum_512(bytes: &[u8], streams: usize) -> u32 {
        // SAFETY: `sum_streams` passes the address of 64 bytes of the slice.
        sum_streams(bytes, streams, |sum: __m512i, at| unsafe {
            _mm512_add_epi32(sum, _mm512_loadu_si512(at.cast()))
        })
    }

    #[target_feature(enable = "avx2")]
    pub fn sum_256(bytes: &[u8], streams: usize) -> u32 {
        // SAFETY: `sum_streams` passes the address of 32 bytes of the slice.
        sum_streams(bytes, streams, |sum: __m256i, at| unsafe {
            _mm256_add_epi32(sum, _mm256_loadu_si256(at.cast()))
        })
    }
}
