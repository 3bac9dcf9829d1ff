//! The arithmetic of `tdpbf16ps` in vectors of AVX-512, for one row: the same panels, the same sums
//! in the same order, the same bits.
//!
//! One row is bandwidth-bound. A tile load reads every other cache line of one panel, which the
//! hardware prefetcher does not follow. Here, each pair of k loads two lines of each of four
//! panels.

use std::arch::asm;

use crate::cpu::tiles::{NR, ROW_PANELS, TileArgs};

/// What the microkernel keeps in memory.
#[repr(C)]
struct Mxcsr {
    saved: u32,
    mode: u32,
}

/// Rounding to nearest even, no exceptions. As in tiles, denormal operands and results are zeros.
const MODE: u32 = 0x1f80 | 0x8000 | 0x0040;

/// Two vectors of columns of a panel: their even k to the first and second sums, their odd k to the
/// third and fourth.
macro_rules! panel {
    ($at:literal, $next:literal, $s0:literal $s1:literal $s2:literal $s3:literal) => {
        concat!(
            "vmovups zmm16, [",
            $at,
            "]\n",
            "vmovups zmm17, [",
            $at,
            " + 64]\n",
            "prefetcht0 [",
            $next,
            "]\n",
            "prefetcht0 [",
            $next,
            " + 64]\n",
            "vpslld zmm18, zmm16, 16\n",
            "vpslld zmm19, zmm17, 16\n",
            "vpandd zmm16, zmm16, zmm20\n",
            "vpandd zmm17, zmm17, zmm20\n",
            "vfmadd231ps zmm",
            $s0,
            ", zmm21, zmm18\n",
            "vfmadd231ps zmm",
            $s1,
            ", zmm21, zmm19\n",
            "vfmadd231ps zmm",
            $s2,
            ", zmm22, zmm16\n",
            "vfmadd231ps zmm",
            $s3,
            ", zmm22, zmm17\n",
        )
    };
}

/// Adds the sums of a tile to those of a panel and starts the next tile from zero.
macro_rules! add {
    ($c:literal, $s0:literal $s1:literal $s2:literal $s3:literal) => {
        concat!(
            "vaddps zmm",
            $s0,
            ", zmm",
            $s0,
            ", zmm",
            $s2,
            "\n",
            "vaddps zmm",
            $s1,
            ", zmm",
            $s1,
            ", zmm",
            $s3,
            "\n",
            "vmovups zmm16, [",
            $c,
            "]\n",
            "vmovups zmm17, [",
            $c,
            " + 64]\n",
            "vaddps zmm16, zmm16, zmm",
            $s0,
            "\n",
            "vaddps zmm17, zmm17, zmm",
            $s1,
            "\n",
            "vmovups [",
            $c,
            "], zmm16\n",
            "vmovups [",
            $c,
            " + 64], zmm17\n",
            "vpxord zmm",
            $s0,
            ", zmm",
            $s0,
            ", zmm",
            $s0,
            "\n",
            "vpxord zmm",
            $s1,
            ", zmm",
            $s1,
            ", zmm",
            $s1,
            "\n",
            "vpxord zmm",
            $s2,
            ", zmm",
            $s2,
            ", zmm",
            $s2,
            "\n",
            "vpxord zmm",
            $s3,
            ", zmm",
            $s3,
            ", zmm",
            $s3,
            "\n",
        )
    };
}

/// One row and [`ROW_PANELS`] panels: a sweep.
///
/// # Safety
/// The CPU has avx512f; the arguments as [`TileArgs`] says.
pub(super) unsafe fn one_row(args: &TileArgs) {
    const { assert!(ROW_PANELS == 4, "the assembly is for four panels") };
    let mut mxcsr = Mxcsr { saved: 0, mode: MODE };
    // SAFETY: the caller's contract. MXCSR is at the end of the assembly as before.
    unsafe {
        if !args.accumulate {
            for panel in 0..ROW_PANELS {
                args.sums.byte_add(panel * args.sums_stride).write_bytes(0, NR);
            }
        }
        asm!(
            "stmxcsr [{mxcsr}]",
            "ldmxcsr [{mxcsr} + 4]",
            "vpternlogd zmm20, zmm20, zmm20, 255",
            "vpslld zmm20, zmm20, 16",
            ".irp sum, 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15",
            "vpxord zmm\\sum, zmm\\sum, zmm\\sum",
            ".endr",
            "2:",
            "mov {pair:e}, 16",
            ".p2align 5",
            "3:",
            "vpbroadcastd zmm22, dword ptr [{a}]",
            "vpslld zmm21, zmm22, 16",
            "vpandd zmm22, zmm22, zmm20",
            panel!("{b}", "{next}", 0 1 2 3),
            panel!("{b} + {panel}", "{next} + {panel}", 4 5 6 7),
            panel!("{b} + 2*{panel}", "{next} + 2*{panel}", 8 9 10 11),
            panel!("{b} + {panels}", "{next} + {panels}", 12 13 14 15),
            "add {a}, 4",
            "add {b}, 128",
            "add {next}, 128",
            "dec {pair:e}",
            "jnz 3b",
            add!("{c}", 0 1 2 3),
            add!("{c} + {sums}", 4 5 6 7),
            add!("{c} + 2*{sums}", 8 9 10 11),
            add!("{c} + {three_sums}", 12 13 14 15),
            "dec {steps}",
            "jnz 2b",
            "ldmxcsr [{mxcsr}]",
            mxcsr = in(reg) &raw mut mxcsr,
            a = inout(reg) args.a => _,
            b = inout(reg) args.b => _,
            panel = in(reg) args.panel_stride,
            panels = in(reg) 3 * args.panel_stride,
            c = in(reg) args.sums,
            sums = in(reg) args.sums_stride,
            three_sums = in(reg) 3 * args.sums_stride,
            next = inout(reg) args.prefetch => _,
            steps = inout(reg) args.steps => _,
            pair = out(reg) _,
            out("zmm0") _, out("zmm1") _, out("zmm2") _, out("zmm3") _, out("zmm4") _,
            out("zmm5") _, out("zmm6") _, out("zmm7") _, out("zmm8") _, out("zmm9") _,
            out("zmm10") _, out("zmm11") _, out("zmm12") _, out("zmm13") _, out("zmm14") _,
            out("zmm15") _, out("zmm16") _, out("zmm17") _, out("zmm18") _, out("zmm19") _,
            out("zmm20") _, out("zmm21") _, out("zmm22") _,
            options(nostack),
        );
    }
}
