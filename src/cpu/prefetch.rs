//! Software prefetching: what a microkernel brings into the caches while it multiplies.

const PAGE: usize = 4096;
const LINE: usize = 64;

/// What a microkernel prefetches.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Prefetch {
    Nothing,
    /// The first line of every page, into L2. The hardware prefetcher fetches the rest.
    PageIntoL2,
    /// As many bytes as it reads, into L1.
    StepIntoL1,
    /// As many bytes as it reads, into L2.
    StepIntoL2,
    /// A share of the next k-block, into L1: all microkernels that read a block fetch the next one
    /// together.
    BlockIntoL1,
    /// A share of the next k-block, into L2, for blocks of which L1 does not hold two.
    BlockIntoL2,
}

/// Prefetches for `steps` steps of `step_bytes` bytes each (a line that two steps share twice), and
/// returns where to go on. `block_bytes` is the share of a step in the next k-block.
#[inline(always)]
pub(super) fn fetch(
    what: Prefetch,
    next: *const u8,
    steps: usize,
    step_bytes: usize,
    block_bytes: usize,
) -> *const u8 {
    let bytes = steps * step_bytes;
    let (bytes, further) = match what {
        Prefetch::Nothing => return next,
        Prefetch::PageIntoL2 => (usize::from(next.addr() % PAGE < bytes), bytes),
        // Half of a step: at least two row groups share each block, and each prefetches its part.
        Prefetch::BlockIntoL1 | Prefetch::BlockIntoL2 => (bytes / 2, steps * block_bytes),
        Prefetch::StepIntoL1 | Prefetch::StepIntoL2 => (bytes, bytes),
    };
    for line in 0..bytes.div_ceil(LINE) {
        let line = next.wrapping_add(line * LINE);
        if matches!(what, Prefetch::StepIntoL1 | Prefetch::BlockIntoL1) {
            prefetch(line)
        } else {
            prefetch_far(line)
        }
    }
    next.wrapping_add(further)
}

macro_rules! prefetch {
    ($(#[$doc:meta])* $name:ident, $x86:ident, $arm:literal) => {
        $(#[$doc])*
        #[inline(always)]
        pub(super) fn $name(p: *const u8) {
            #[cfg(target_arch = "x86_64")]
            // SAFETY: a prefetch reads nothing and cannot fault.
            unsafe {
                std::arch::x86_64::_mm_prefetch::<{ std::arch::x86_64::$x86 }>(p.cast())
            };
            #[cfg(target_arch = "aarch64")]
            // SAFETY: as above.
            unsafe {
                std::arch::asm!(concat!("prfm ", $arm, ", [{p}]"), p = in(reg) p, options(nomem, nostack, preserves_flags))
            };
            #[cfg(not(any(target_arch = "x86_64", target_arch = "aarch64")))]
            let _ = p;
        }
    };
}

prefetch!(
    /// Prefetches the line at `p` into L1. Any address is allowed.
    prefetch,
    _MM_HINT_T0,
    "pldl1keep"
);
prefetch!(
    /// Prefetches the line at `p` into L2.
    prefetch_far,
    _MM_HINT_T1,
    "pldl2keep"
);
