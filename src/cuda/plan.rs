//! Which kernels compute a block, by its sizes. No call to CUDA is made here.

use std::cell::Cell;
use std::sync::OnceLock;

use candle_core::Result;

/// Decode kernels take up to this many rows.
pub(super) const DECODE_ROWS: usize = 32;

/// At most this much memory for h and the product of gate and up together, per call: more rows go through in chunks (of 128 at least).
const SCRATCH_BYTES: usize = 768 << 20;

/// How gate, up and the activation are computed above `DECODE_ROWS` rows.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Prefill {
    /// One product (M,2I) by cuBLAS, then one pass over its halves.
    Cublas,
    /// The kernels of prefill_sm90.cu, where the device, the dtype and the sizes allow it.
    Fused,
}

thread_local! {
    static FORCED: Cell<Option<Prefill>> = const { Cell::new(None) };
}

/// Forces one way of prefill in the calling thread, or lets the environment and the sizes decide again. For tests and benchmarks.
pub fn force_prefill(way: Option<Prefill>) {
    FORCED.set(way);
}

/// What [`force_prefill`] or else the environment variable `CANDLE_SWIGLU_CUDA_PREFILL`, read once, forces.
pub(super) fn forced() -> Result<Option<Prefill>> {
    static ASKED: OnceLock<std::result::Result<Option<Prefill>, String>> = OnceLock::new();
    if let Some(way) = FORCED.get() {
        return Ok(Some(way));
    }
    let asked = ASKED.get_or_init(|| parse(std::env::var("CANDLE_SWIGLU_CUDA_PREFILL").ok().as_deref()));
    asked.clone().map_err(candle_core::Error::Msg)
}

fn parse(value: Option<&str>) -> std::result::Result<Option<Prefill>, String> {
    match value {
        None => Ok(None),
        Some("cublas") => Ok(Some(Prefill::Cublas)),
        Some("fused") => Ok(Some(Prefill::Fused)),
        Some(other) => Err(format!("CANDLE_SWIGLU_CUDA_PREFILL: expected fused or cublas, found {other}")),
    }
}

/// Blocks of the fused kernel: clusters of `cluster` blocks, each with tiles of 128 rows by 128 columns of h, as many as the device holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct FusedGrid {
    pub(super) cluster: usize,
    pub(super) blocks: usize,
    /// Tiles that the busiest block computes, one after the other.
    waves: usize,
}

pub(super) fn fused_grid(m: usize, i: usize, sms: usize) -> FusedGrid {
    let cluster = if m <= 128 { 1 } else { 2 };
    let tiles = m.div_ceil(128 * cluster) * i.div_ceil(128);
    let clusters = tiles.min(sms / cluster).max(1);
    FusedGrid { cluster, blocks: cluster * clusters, waves: tiles.div_ceil(clusters) }
}

/// The fused kernel or cuBLAS for (M,H,I) on `sms` multiprocessors: reasoned, not measured.
///
/// Fused saves the pass over the halves, which reads 2·M·I and writes M·I elements of 2 B: 6·M·I B at 4.0 TB/s beside 4·M·H·I operations
/// at 790 TFLOP/s is 296 / H of the product's time. It loses what its last wave leaves idle, `waves·sms·128·128 / (M·I)`, of which
/// cuBLAS, with tiles of several shapes to choose from, is assumed to lose 3 % or less; and its main loop is assumed to run at 0.95 of
/// cuBLAS's. Up to 128 rows the weights' bytes decide and too few blocks may read them, so there the product is cuBLAS's.
pub(super) fn prefill((m, h, i): (usize, usize, usize), sms: usize) -> Prefill {
    if m <= 128 {
        return Prefill::Cublas;
    }
    let loop_rate = 0.95;
    let waste = (fused_grid(m, i, sms).waves * sms * 128 * 128) as f64 / (m as f64 * i as f64);
    let (fused, cublas) = (waste / loop_rate, waste.min(1.03) + 296.0 / h as f64);
    if fused < cublas { Prefill::Fused } else { Prefill::Cublas }
}

/// Rows of a chunk: as many as [`SCRATCH_BYTES`] allow, in whole tiles and in chunks of nearly equal size.
pub(super) fn chunk_rows(m: usize, i: usize, element: usize) -> usize {
    let row = i.saturating_mul(3 * element).max(1);
    let most = (SCRATCH_BYTES / row / 128 * 128).max(128);
    let chunks = m.div_ceil(most).max(1);
    m.div_ceil(chunks).next_multiple_of(128).min(most)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn chunks_cover_all_rows_within_the_bound() {
        for (m, i, element) in
            [(33, 14336, 2), (4096, 14336, 2), (40_000, 14336, 2), (100_000, 28672, 4), (1000, 1 << 28, 2), (5, 1, 4)]
        {
            let rows = chunk_rows(m, i, element);
            assert!(rows > 0 && rows.is_multiple_of(128));
            assert!(rows == 128 || rows * 3 * i * element <= SCRATCH_BYTES, "{m} {i}: {rows}");
            let sizes: Vec<usize> = (0..m).step_by(rows).map(|start| rows.min(m - start)).collect();
            assert_eq!(sizes.iter().sum::<usize>(), m);
        }
        assert_eq!(chunk_rows(4096, 14336, 2), 4096); // 4096 · 3 · 14336 · 2 B = 336 MiB
    }

    #[test]
    fn fused_blocks_fit_the_device() {
        for (m, i) in [(1, 8), (128, 128), (129, 128), (256, 14336), (4096, 28672)] {
            for sms in [1, 2, 108, 132] {
                let grid = fused_grid(m, i, sms);
                assert!(grid.blocks >= grid.cluster && grid.blocks.is_multiple_of(grid.cluster));
                assert!(grid.blocks <= sms.max(grid.cluster));
                let tiles = m.div_ceil(128 * grid.cluster) * i.div_ceil(128);
                assert!(grid.waves * grid.blocks / grid.cluster >= tiles);
            }
        }
        // 16 clusters of rows by 112 columns of tiles on 66 clusters: 27.2, so 28 in turn.
        assert_eq!(fused_grid(4096, 14336, 132), FusedGrid { cluster: 2, blocks: 132, waves: 28 });
    }

    #[test]
    fn narrow_blocks_are_fused_and_wide_ones_are_not() {
        assert_eq!(prefill((4096, 2048, 8192), 132), Prefill::Fused);
        assert_eq!(prefill((4096, 8192, 28672), 132), Prefill::Cublas);
        assert_eq!(prefill((128, 2048, 8192), 132), Prefill::Cublas);
        assert_eq!(prefill((129, 2048, 128), 132), Prefill::Cublas, "two tiles on 132 multiprocessors");
    }

    #[test]
    fn a_way_can_be_forced() -> Result<()> {
        for way in [Some(Prefill::Fused), Some(Prefill::Cublas)] {
            force_prefill(way);
            assert_eq!(forced()?, way);
        }
        force_prefill(None);
        assert_eq!((parse(None), parse(Some("fused"))), (Ok(None), Ok(Some(Prefill::Fused))));
        assert!(parse(Some("fast")).is_err_and(|error| error.contains("expected fused or cublas, found fast")));
        Ok(())
    }
}
