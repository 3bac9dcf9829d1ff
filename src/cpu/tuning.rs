//! What depends on the CPU family rather than on its instruction set: streams, prefetching, block
//! sizes and thresholds. Each entry names the CPU that it was measured on.
//!
//! [`CpuFamily::detect`] finds the family. An instruction set's file (`isa/`) chooses the
//! [`Tuning`] that fits its family. A family without measurements gets the one of
//! [`CpuFamily::Other`].

use super::prefetch::Prefetch;
#[cfg(target_arch = "x86_64")]
use super::tiles::TileTuning;

/// A family of CPUs with one microarchitecture.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum CpuFamily {
    /// AMD family 0x19, models 0x00 to 0x0f, 0x20 to 0x5f (Milan, Vermeer, Cezanne).
    Zen3,
    /// AMD family 0x19, the other models (Genoa, Raphael, Phoenix).
    Zen4,
    /// AMD family 0x1a (Turin, Granite Ridge).
    Zen5,
    /// Intel family 6, models 143 and 207 (Sapphire Rapids, Emerald Rapids).
    SapphireRapids,
    Other,
}

impl CpuFamily {
    #[cfg(target_arch = "x86_64")]
    pub(super) fn detect() -> Self {
        use std::arch::x86_64::__cpuid;
        let (vendor, signature) = (__cpuid(0), __cpuid(1).eax);
        Self::of([vendor.ebx, vendor.edx, vendor.ecx], signature)
    }

    #[cfg(not(target_arch = "x86_64"))]
    pub(super) fn detect() -> Self {
        Self::Other
    }

    /// From the vendor's name in three words and the family, model and stepping of leaf 1.
    #[cfg(any(target_arch = "x86_64", test))]
    fn of(vendor: [u32; 3], signature: u32) -> Self {
        let base = signature >> 8 & 0xf;
        let family = if base == 0xf { base + (signature >> 20 & 0xff) } else { base };
        let model = signature >> 4 & 0xf | signature >> 12 & 0xf0;
        let name: Vec<u8> = vendor.into_iter().flat_map(u32::to_le_bytes).collect();
        match (name.as_slice(), family, model) {
            (b"AuthenticAMD", 0x19, 0x00..=0x0f | 0x20..=0x5f) => Self::Zen3,
            (b"AuthenticAMD", 0x19, _) => Self::Zen4,
            (b"AuthenticAMD", 0x1a, _) => Self::Zen5,
            (b"GenuineIntel", 6, 143 | 207) => Self::SapphireRapids,
            _ => Self::Other,
        }
    }
}

/// How microkernels read weights. This is compiled into them, and therefore a type.
pub(super) trait Access: 'static {
    /// Streams of a panel (`panels.rs`).
    const STREAMS: usize;
    /// Rows up to which a sweep along a panel uses `SWEEP[0]`; with more rows it uses `SWEEP[1]`.
    const SWEEP_ROWS: usize;
    /// `[few rows, more rows]`.
    const SWEEP: [Prefetch; 2];
    /// The same for products with few instructions per cache line
    /// ([`MEMORY_BOUND`](super::product::Product::MEMORY_BOUND)).
    const SWEEP_MEMORY_BOUND: [Prefetch; 2];
    /// While a k-block is multiplied.
    const BLOCK: Prefetch;
}

/// Block sizes and thresholds, used at run time.
#[derive(Clone, Copy, Debug)]
pub(super) struct Tuning {
    /// The CPU that the values were measured on.
    pub(super) measured_on: &'static str,
    /// Bytes of B in a k-block while there are at most `few_rows` rows.
    pub(super) few_rows_block: usize,
    /// Rows up to which the smaller k-block is faster.
    pub(super) few_rows: usize,
    /// Bytes of B in a k-block with more rows. Scratch holds one for each thread.
    pub(super) many_rows_block: usize,
    /// Rows from which a k-block is widened to f32 once instead of by every microkernel.
    pub(super) widen_from: usize,
    /// How far ahead of its use a sweep prefetches, in bytes.
    pub(super) sweep_ahead: usize,
    /// Matrices up to this many bytes usually still sit in a cache from the previous call. Then one
    /// panel is latency-bound, and several at once are faster.
    pub(super) adjacent_bytes: usize,
}

/// An [`Access`] with its [`Tuning`]: an entry of the table.
pub(super) trait Tuned {
    type Access: Access;
    const TUNING: Tuning;
}

/// One stream with the hardware prefetcher doing most of the work.
///
/// Measured on Zen 4: four streams are 5 to 20 % slower. Up to 6 rows, prefetching every line costs
/// 1 to 12 % (6 rows) and up to 40 % (4 rows); with 8 rows it gains 8 to 20 % while memory is fast.
pub(super) struct OneStreamByPages;

impl Access for OneStreamByPages {
    const STREAMS: usize = 1;
    const SWEEP_ROWS: usize = 6;
    const SWEEP: [Prefetch; 2] = [Prefetch::PageIntoL2, Prefetch::StepIntoL2];
    const SWEEP_MEMORY_BOUND: [Prefetch; 2] = Self::SWEEP;
    const BLOCK: Prefetch = Prefetch::BlockIntoL2;
}

/// Four streams. Measured on Zen 3, which reads 22 to 24 GB/s from one stream and 26 to 28 GB/s
/// from four while it multiplies 2 to 6 rows.
pub(super) struct FourStreams;

impl Access for FourStreams {
    const STREAMS: usize = 4;
    const SWEEP_ROWS: usize = usize::MAX;
    const SWEEP: [Prefetch; 2] = [Prefetch::StepIntoL1; 2];
    const SWEEP_MEMORY_BOUND: [Prefetch; 2] = [Prefetch::Nothing; 2];
    const BLOCK: Prefetch = Prefetch::BlockIntoL1;
}

/// Four streams, every line prefetched.
///
/// Measured with AVX-512 on Emerald Rapids, in f16 and with 4 rows in f32: one stream by pages
/// takes up to 1.6 times as long, four streams with half of their lines prefetched 1.1 times.
pub(super) struct FourStreamsPrefetched;

impl Access for FourStreamsPrefetched {
    const STREAMS: usize = 4;
    const SWEEP_ROWS: usize = usize::MAX;
    const SWEEP: [Prefetch; 2] = [Prefetch::StepIntoL1; 2];
    const SWEEP_MEMORY_BOUND: [Prefetch; 2] = [Prefetch::StepIntoL1; 2];
    const BLOCK: Prefetch = Prefetch::BlockIntoL1;
}

/// One stream, every line prefetched. Not measured.
pub(super) struct OneStream;

impl Access for OneStream {
    const STREAMS: usize = 1;
    const SWEEP_ROWS: usize = usize::MAX;
    const SWEEP: [Prefetch; 2] = [Prefetch::StepIntoL1; 2];
    const SWEEP_MEMORY_BOUND: [Prefetch; 2] = [Prefetch::StepIntoL1; 2];
    const BLOCK: Prefetch = Prefetch::BlockIntoL1;
}

/// AVX-512 on Zen 4 and 5. Also the default for AVX-512.
#[cfg(target_arch = "x86_64")]
pub(super) struct Avx512OnZen4;

#[cfg(target_arch = "x86_64")]
impl Tuned for Avx512OnZen4 {
    type Access = OneStreamByPages;
    const TUNING: Tuning = Tuning {
        measured_on: "AMD Zen 4",
        // Two blocks exceed L1, so blocks wait in L2 (16 KiB: 1 to 10 % slower; 32 KiB: up to 4 %;
        // 256 KiB: up to 10 %).
        few_rows_block: 64 << 10,
        // Measured: the smaller block is 1.2 times as fast at 16 rows and equal at 32.
        few_rows: 24,
        // A quarter of 1 MiB of L2. Accumulators are loaded and stored rarely enough not to matter
        // (64 KiB: 3 % slower in f32).
        many_rows_block: 256 << 10,
        // Measured: 0.96 to 1.1 times as fast at 128 rows, 1.0 to 1.2 times at 512.
        widen_from: 160,
        // Enough to be bandwidth-bound (4 KiB: up to 20 % slower; 16 KiB: up to 4 %).
        sweep_ahead: 8 << 10,
        // Larger matrices stream best one panel at a time.
        adjacent_bytes: 8 << 20,
    };
}

/// AVX-512 on Emerald Rapids.
#[cfg(target_arch = "x86_64")]
pub(super) struct Avx512OnSapphireRapids;

#[cfg(target_arch = "x86_64")]
impl Tuned for Avx512OnSapphireRapids {
    type Access = FourStreamsPrefetched;
    const TUNING: Tuning = Tuning {
        measured_on: "Intel Emerald Rapids",
        // Of 48 KiB of L1 (16 KiB: equal in f16, and in f32 the same block; 64 KiB: 5 % slower at
        // 16 rows in f32). Prefetching the next block into L2 instead of L1 is no faster.
        few_rows_block: 32 << 10,
        // L2 supplies B as fast as L1 would (32 KiB: up to a fifth slower in f32; 64 KiB: equal).
        many_rows_block: 256 << 10,
        // Measured: equal at 16 and 32 rows, 1.05 times as fast at 128.
        widen_from: 48,
        // As on Zen 4: `few_rows`. The rest has no effect with four streams and without adjacent
        // panels.
        ..Avx512OnZen4::TUNING
    };
}

/// Block sizes and thresholds for vectors of at most 256 bits, measured with AVX2 on Zen 3.
const SHORT_VECTORS: Tuning = Tuning {
    measured_on: "AMD Zen 3",
    // Leaves room in L1 for the sums and for the same k of the rows (4 KiB: 2 to 8 % slower in 16
    // bit; 16 KiB: up to 10 %).
    few_rows_block: 8 << 10,
    few_rows: 24,
    many_rows_block: 256 << 10,
    widen_from: 160,
    sweep_ahead: 8 << 10,
    adjacent_bytes: usize::MAX,
};

/// AVX2 on Zen 3. Also the default for AVX2.
#[cfg(target_arch = "x86_64")]
pub(super) struct Avx2OnZen3;

#[cfg(target_arch = "x86_64")]
impl Tuned for Avx2OnZen3 {
    type Access = FourStreams;
    const TUNING: Tuning = SHORT_VECTORS;
}

/// Vectors of 128 bits, on CPUs that were never measured.
pub(super) struct Unmeasured;

impl Tuned for Unmeasured {
    type Access = OneStream;
    const TUNING: Tuning = Tuning { measured_on: "none", ..SHORT_VECTORS };
}

/// No vectors: widening a k-block once always pays.
pub(super) struct Scalars;

impl Tuned for Scalars {
    type Access = OneStream;
    const TUNING: Tuning = Tuning { widen_from: 0, ..Unmeasured::TUNING };
}

/// AMX, measured on Emerald Rapids. Also the default for AMX.
#[cfg(target_arch = "x86_64")]
pub(super) const AMX_ON_EMERALD_RAPIDS: TileTuning = TileTuning {
    measured_on: "Intel Emerald Rapids",
    // B takes 32 KiB of 48 KiB of L1 (8 and 32 steps: up to a fifth slower).
    block_steps: 16,
    // A's k of a block, 512 KiB for 512 rows, is then read from L3 once for 8 panels (2 panels: a
    // third slower; 16: equal at H = 4096, up to a fifth slower at 2048).
    many_rows_panels: 8,
    // As many as the microkernel multiplies at once (8 and 16: up to a tenth slower where a thread
    // gets few units).
    row_panels: 4,
    // Two streams, and as many panels in a unit (one: 6 to 10 % slower; 4 or 8 panels in a unit: up
    // to 4 % slower).
    few_rows_panels: 2,
    // 4 KiB: equal; 6 and 8 KiB: up to 4 % slower; nothing: up to twice as slow.
    sweep_ahead: 2 << 10,
};

#[cfg(test)]
mod tests {
    use super::CpuFamily;

    fn words(name: &[u8; 12]) -> [u32; 3] {
        [0, 4, 8].map(|at| u32::from_le_bytes([name[at], name[at + 1], name[at + 2], name[at + 3]]))
    }

    /// Signatures as the vendors publish them.
    #[test]
    fn families_are_told_by_their_signature() {
        let (amd, intel) = (words(b"AuthenticAMD"), words(b"GenuineIntel"));
        for (vendor, signature, family) in [
            (amd, 0x00a0_0f11, CpuFamily::Zen3),             // EPYC 7003
            (amd, 0x00a2_0f10, CpuFamily::Zen3),             // Ryzen 5000
            (amd, 0x00a1_0f11, CpuFamily::Zen4),             // EPYC 9004
            (amd, 0x00a6_0f12, CpuFamily::Zen4),             // Ryzen 7000
            (amd, 0x00b0_0f21, CpuFamily::Zen5),             // EPYC 9005
            (amd, 0x0083_0f10, CpuFamily::Other),            // EPYC 7002
            (intel, 0x000c_06f2, CpuFamily::SapphireRapids), // Emerald Rapids
            (intel, 0x0008_06f8, CpuFamily::SapphireRapids), // Sapphire Rapids
            (intel, 0x0006_06a6, CpuFamily::Other),          // Ice Lake
            (intel, 0x00a0_0f11, CpuFamily::Other),
        ] {
            assert_eq!(CpuFamily::of(vendor, signature), family, "{signature:#x}");
        }
    }
}
