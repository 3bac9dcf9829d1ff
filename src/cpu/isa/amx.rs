//! AMX: `tdpbf16ps` multiplies tiles of bf16, 16 rows by 32 k by 16 columns in one instruction
//! (amx-tile and amx-bf16 beside the features of AVX-512).
//!
//! For each element, the products with even and with odd k of a tile are summed apart by fused
//! multiply-adds, added to each other, and then added to the sum. Denormals count as zeros, as
//! operands and as results (Intel's description of `TDPBF16PS`).

use std::arch::asm;
use std::arch::x86_64::{__cpuid, __cpuid_count, _xgetbv};

use super::avx512::Avx512;
use crate::cpu::kernels::{CpuKernels, TwoByTwelve, with_tiles};
use crate::cpu::tiles::{Saved, TileArgs, Tiles};
use crate::cpu::tuning::{AMX_ON_EMERALD_RAPIDS, CpuFamily};

/// The kernels, if the CPU has the instructions and the process may use them: those of AVX-512 but
/// for products in bf16.
pub(super) fn detect(family: CpuFamily) -> Option<CpuKernels> {
    let (isa, base, tiles) = (Avx512::new()?, super::avx512::detect(family)?, tiles()?);
    Some(with_tiles::<_, TwoByTwelve>("amx", isa, base, tiles))
}

/// The microkernels, if the CPU has the instructions and the process may use them.
pub(in crate::cpu) fn tiles() -> Option<Tiles> {
    (has_instructions() && is_permitted()).then_some(Tiles {
        configure,
        restore,
        pair,
        single,
        sweep: [one_panel, two_panels],
        row: super::amx_row::one_row,
        tuning: AMX_ON_EMERALD_RAPIDS,
    })
}

/// The CPU has the instructions, and the system saves tiles when it switches threads.
fn has_instructions() -> bool {
    const OSXSAVE: u32 = 1 << 27; // leaf 1, ECX
    const AMX_BF16_AND_TILE: u32 = 1 << 22 | 1 << 24; // leaf 7, EDX
    const TILE_STATE: u64 = 3 << 17; // XCR0: XTILECFG and XTILEDATA
    if __cpuid(0).eax < 7 || __cpuid(1).ecx & OSXSAVE == 0 {
        return false;
    }
    // SAFETY: OSXSAVE says that the CPU has XGETBV and that the system has enabled it.
    let enabled = unsafe { xcr0() };
    __cpuid_count(7, 0).edx & AMX_BF16_AND_TILE == AMX_BF16_AND_TILE
        && enabled & TILE_STATE == TILE_STATE
}

#[target_feature(enable = "xsave")]
fn xcr0() -> u64 {
    // SAFETY: the target feature; 0 names XCR0.
    unsafe { _xgetbv(0) }
}

/// Linux provides the 8 KiB of tile state only on request. The permission is valid for all threads
/// of the process. It is refused if a thread has an alternate signal stack that is too small for
/// the state, and by kernels older than 5.16.
#[cfg(target_os = "linux")]
fn is_permitted() -> bool {
    const ARCH_REQ_XCOMP_PERM: libc::c_long = 0x1023;
    const XTILEDATA: libc::c_long = 18;
    // SAFETY: the call takes two numbers and touches no memory of this process.
    unsafe { libc::syscall(libc::SYS_arch_prctl, ARCH_REQ_XCOMP_PERM, XTILEDATA) == 0 }
}

/// Other systems are untried.
#[cfg(not(target_os = "linux"))]
fn is_permitted() -> bool {
    false
}

/// Palette 1: tiles of `rows` rows for A and the sums, of 16 rows for B, all 64 bytes wide.
fn configuration(rows: u8) -> Saved {
    let mut bytes = [0; 64];
    bytes[0] = 1;
    for tile in 0..8 {
        bytes[16 + 2 * tile] = 64;
        bytes[48 + tile] = if tile >= 6 { 16 } else { rows };
    }
    Saved(bytes)
}

/// Another library's configuration may be in use on this thread, and that library need not check
/// again: candle's own AMX kernels configure a thread once.
///
/// # Safety
/// The CPU has the instructions and the process may use them; `rows` is 1 to 16.
unsafe fn configure(rows: usize) -> Saved {
    let mut saved = Saved([0; 64]);
    let wanted = configuration(rows as u8);
    // SAFETY: the caller's contract; both are 64 bytes, and the configuration is a valid one. The
    // compiler keeps nothing in tiles.
    unsafe {
        asm!(
            "sttilecfg [{saved}]",
            "ldtilecfg [{wanted}]",
            saved = in(reg) &raw mut saved,
            wanted = in(reg) &raw const wanted,
            options(nostack, preserves_flags),
        );
    }
    saved
}

/// # Safety
/// As [`configure`], which returned `saved`.
unsafe fn restore(saved: &Saved) {
    // SAFETY: the caller's contract. Without a configuration the tiles are released, so that the
    // system saves nothing for this thread.
    unsafe {
        if saved.0[0] == 0 {
            asm!("tilerelease", options(nostack, nomem, preserves_flags));
        } else {
            asm!("ldtilecfg [{}]", in(reg) saved, options(nostack, readonly, preserves_flags));
        }
    }
}

/// Prefetches `lines` cache lines at `next` into L2: a share of the next k-block.
macro_rules! some_lines {
    () => {
        "mov {line}, {lines}
        test {line}, {line}
        jz 6f
        5:
        prefetcht1 [{next}]
        add {next}, 64
        dec {line}
        jnz 5b
        6:"
    };
}

/// Prefetches 8 cache lines at `next` into L1, a quarter of a step; with `both`, 8 lines of each of
/// two panels. A core can wait for 16 lines at most. The prefetches are therefore spread over the
/// step.
macro_rules! eight_lines {
    () => {
        ".irp at, 0, 64, 128, 192, 256, 320, 384, 448
        prefetcht0 [{next} + \\at]
        .endr
        add {next}, 512"
    };
    (both) => {
        ".irp at, 0, 64, 128, 192, 256, 320, 384, 448
        prefetcht0 [{next} + \\at]
        prefetcht0 [{next} + {panel} + \\at]
        .endr
        add {next}, 512"
    };
}

/// A microkernel: the sums' tiles are set, each step loads tiles and multiplies them, the sums'
/// tiles are stored. It is one block of assembly, since the compiler promises nothing about tiles
/// between two of them.
macro_rules! tile_micro {
    (
        $(#[$doc:meta])* $name:ident: zero [$($zero:literal),*], load [$($load:literal),*],
        step [$($step:expr),* $(,)?], store [$($store:literal),*],
        with |$args:ident| [$($operand:tt)*]
    ) => {
        $(#[$doc])*
        ///
        /// # Safety
        /// The thread's tiles are configured ([`configure`]); the arguments as [`TileArgs`] says.
        unsafe fn $name($args: &TileArgs) {
            let args = $args;
            // SAFETY: the caller's contract.
            unsafe {
                asm!(
                    "/* {c2} {next} */",
                    "test {line}, {line}",
                    "jnz 2f",
                    $($zero,)*
                    "jmp 3f",
                    "2:",
                    $($load,)*
                    "3:",
                    ".p2align 5",
                    "4:",
                    $($step,)*
                    "add {a}, 64",
                    "add {b}, 2048",
                    "dec {steps}",
                    "jnz 4b",
                    $($store,)*
                    a = inout(reg) args.a => _,
                    a_stride = in(reg) args.a_stride,
                    b = inout(reg) args.b => _,
                    b_stride = in(reg) 128usize,
                    c = in(reg) args.sums,
                    c2 = in(reg) args.sums.cast::<u8>().wrapping_add(args.sums_stride),
                    steps = inout(reg) args.steps => _,
                    next = inout(reg) args.prefetch => _,
                    line = inout(reg) usize::from(args.accumulate) => _,
                    $($operand)*
                    out("tmm0") _, out("tmm1") _, out("tmm2") _, out("tmm3") _,
                    out("tmm4") _, out("tmm5") _, out("tmm6") _, out("tmm7") _,
                    options(nostack),
                );
            }
        }
    };
}

tile_micro! {
    /// Two tiles of rows and one panel. A is read with a hint that keeps it from displacing B in L1.
    pair:
    zero ["tilezero tmm0", "tilezero tmm1", "tilezero tmm2", "tilezero tmm3"],
    load [
        "tileloadd tmm0, [{c} + {b_stride}]", "tileloadd tmm1, [{c} + {b_stride} + 64]",
        "tileloadd tmm2, [{c2} + {b_stride}]", "tileloadd tmm3, [{c2} + {b_stride} + 64]"
    ],
    step [
        "tileloaddt1 tmm4, [{a} + {a_stride}]",
        "tileloadd tmm6, [{b} + {b_stride}]",
        "tileloadd tmm7, [{b} + {b_stride} + 64]",
        "prefetcht0 [{next_c}]", "prefetcht0 [{next_c} + 64]",
        "tdpbf16ps tmm0, tmm4, tmm6",
        "prefetcht1 [{next_a}]", "prefetcht1 [{next_a} + {a_stride}]",
        "tdpbf16ps tmm1, tmm4, tmm7",
        "tileloaddt1 tmm5, [{a2} + {a_stride}]",
        "prefetcht0 [{next_c} + 128]", "prefetcht0 [{next_c} + 192]",
        "tdpbf16ps tmm2, tmm5, tmm6",
        "prefetcht1 [{next_a} + 2*{a_stride}]",
        "lea {line}, [{next_a} + 2*{a_stride}]", "prefetcht1 [{line} + {a_stride}]",
        "tdpbf16ps tmm3, tmm5, tmm7",
        "add {a2}, 64", "add {next_c}, 256", "add {next_a}, 64",
        some_lines!(),
    ],
    store [
        "tilestored [{c} + {b_stride}], tmm0", "tilestored [{c} + {b_stride} + 64], tmm1",
        "tilestored [{c2} + {b_stride}], tmm2", "tilestored [{c2} + {b_stride} + 64], tmm3"
    ],
    with |args| [
        lines = in(reg) args.lines,
        a2 = inout(reg) args.a.wrapping_add(args.height * args.a_stride) => _,
        next_a = inout(reg) args.next_a => _,
        next_c = inout(reg) args.next_sums => _,
    ]
}

tile_micro! {
    /// One tile of rows and one panel: the last rows of a k-block.
    single:
    zero ["tilezero tmm0", "tilezero tmm1"],
    load ["tileloadd tmm0, [{c} + {b_stride}]", "tileloadd tmm1, [{c} + {b_stride} + 64]"],
    step [
        "tileloadd tmm4, [{a} + {a_stride}]",
        "tileloadd tmm6, [{b} + {b_stride}]",
        "tdpbf16ps tmm0, tmm4, tmm6",
        "tileloadd tmm7, [{b} + {b_stride} + 64]",
        "tdpbf16ps tmm1, tmm4, tmm7",
        some_lines!(),
    ],
    store ["tilestored [{c} + {b_stride}], tmm0", "tilestored [{c} + {b_stride} + 64], tmm1"],
    with |args| [lines = in(reg) args.lines,]
}

tile_micro! {
    /// One tile of rows and one panel: a sweep.
    one_panel:
    zero ["tilezero tmm0", "tilezero tmm1"],
    load ["tileloadd tmm0, [{c} + {b_stride}]", "tileloadd tmm1, [{c} + {b_stride} + 64]"],
    step [
        "tileloadd tmm4, [{a} + {a_stride}]", eight_lines!(),
        "tileloadd tmm6, [{b} + {b_stride}]", eight_lines!(),
        "tdpbf16ps tmm0, tmm4, tmm6",
        "tileloadd tmm7, [{b} + {b_stride} + 64]", eight_lines!(),
        "tdpbf16ps tmm1, tmm4, tmm7", eight_lines!(),
    ],
    store ["tilestored [{c} + {b_stride}], tmm0", "tilestored [{c} + {b_stride} + 64], tmm1"],
    with |args| []
}

tile_micro! {
    /// One tile of rows and two panels: a sweep.
    two_panels:
    zero ["tilezero tmm0", "tilezero tmm1", "tilezero tmm2", "tilezero tmm3"],
    load [
        "tileloadd tmm0, [{c} + {b_stride}]", "tileloadd tmm1, [{c} + {b_stride} + 64]",
        "tileloadd tmm2, [{c2} + {b_stride}]", "tileloadd tmm3, [{c2} + {b_stride} + 64]"
    ],
    step [
        "lea {line}, [{b} + {panel}]",
        "tileloadd tmm4, [{a} + {a_stride}]",
        "tileloadd tmm6, [{b} + {b_stride}]",
        "tdpbf16ps tmm0, tmm4, tmm6", eight_lines!(both),
        "tileloadd tmm7, [{b} + {b_stride} + 64]",
        "tdpbf16ps tmm1, tmm4, tmm7", eight_lines!(both),
        "tileloadd tmm6, [{line} + {b_stride}]",
        "tdpbf16ps tmm2, tmm4, tmm6", eight_lines!(both),
        "tileloadd tmm7, [{line} + {b_stride} + 64]",
        "tdpbf16ps tmm3, tmm4, tmm7", eight_lines!(both),
    ],
    store [
        "tilestored [{c} + {b_stride}], tmm0", "tilestored [{c} + {b_stride} + 64], tmm1",
        "tilestored [{c2} + {b_stride}], tmm2", "tilestored [{c2} + {b_stride} + 64], tmm3"
    ],
    with |args| [panel = in(reg) args.panel_stride,]
}

#[cfg(test)]
mod tests {
    use super::*;

    /// candle's own AMX kernels configure a thread once and do not check again.
    #[test]
    fn a_configuration_of_another_library_survives() {
        if tiles().is_none() {
            return;
        }
        let read = || {
            let mut bytes = Saved([0; 64]);
            // SAFETY: the CPU has the instructions; 64 writable bytes.
            unsafe { asm!("sttilecfg [{}]", in(reg) &raw mut bytes, options(nostack)) };
            bytes.0
        };
        // SAFETY: the CPU has the instructions, and the heights are valid.
        unsafe {
            let before = configure(3);
            let theirs = read();
            let saved = configure(16);
            assert_ne!(read(), theirs);
            restore(&saved);
            assert_eq!(read(), theirs);
            restore(&before);
            assert_eq!(read(), before.0);
        }
    }
}
