//! Which kernels compute a block, by its sizes. No call to CUDA is made here.

use std::cell::Cell;
use std::sync::OnceLock;

use candle_core::Result;

use super::module::{TILES, Tile};

/// At most this much memory for h and the product of gate and up together, per call: more rows go through in chunks (of 128 at least).
const SCRATCH_BYTES: usize = 768 << 20;

/// How gate, up and the activation are computed above the rows of the decode kernels.
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

/// The kernels of decode.cu take up to this many rows: 32; 16 in bf16 and f16 on Hopper, where cuBLAS and the kernels of
/// prefill_sm90.cu are faster from there on; 8 where a way of prefill is forced.
pub(super) fn decode_rows(forced: Option<Prefill>, hopper: bool) -> usize {
    match (forced, hopper) {
        (Some(_), _) => 8,
        (None, true) => 16,
        (None, false) => 32,
    }
}

/// A launch of a tensor-core kernel of decode.cu.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct DecodeGrid {
    pub(super) blocks: usize,
    /// Of a block: 8, two blocks to a multiprocessor; 16, so that one block uses all of it, where that is enough for all tiles.
    pub(super) warps: usize,
}

/// The persistent blocks for so many tiles. They do not depend on the number of rows, and so neither do a row's bits.
pub(super) fn decode_grid(tiles: usize, sms: usize) -> DecodeGrid {
    let warps = if tiles <= sms { 16 } else { 8 };
    DecodeGrid { blocks: tiles.min(16 / warps * sms), warps }
}

/// A launch of a kernel of prefill_sm90.cu.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct FusedGrid {
    pub(super) tile: Tile,
    pub(super) blocks: usize,
    /// Tiles that the busiest block computes, one after the other.
    waves: usize,
}

impl FusedGrid {
    fn of(tile: Tile, m: usize, i: usize, sms: usize) -> Self {
        let tiles = m.div_ceil(128 * tile.cluster) * i.div_ceil(tile.width);
        let clusters = tiles.min(sms / tile.cluster).max(1);
        Self { tile, blocks: tile.cluster * clusters, waves: tiles.div_ceil(clusters) }
    }

    /// What the busiest multiprocessor computes, in features of one row of tiles. Above 128 rows, where arithmetic decides, blocks that
    /// share no weights read more and take 5 % longer.
    fn load(&self, m: usize) -> f64 {
        let alone = if self.tile.cluster == 1 && m > 128 { 1.05 } else { 1.0 };
        (self.waves * self.tile.width) as f64 * alone
    }

    /// Its time in the same unit: a tile takes 4 features more than it has, to begin and to end.
    fn time(&self, m: usize) -> f64 {
        self.load(m) + (4 * self.waves) as f64
    }
}

/// The tile that divides (M,I) best among `sms` multiprocessors.
pub(super) fn fused_grid(m: usize, i: usize, sms: usize) -> FusedGrid {
    let all = TILES.into_iter().filter(|tile| tile.cluster <= sms.min(m.div_ceil(128)));
    let all = all.map(|tile| FusedGrid::of(tile, m, i, sms));
    all.min_by(|a, b| a.time(m).total_cmp(&b.time(m))).unwrap_or_else(|| FusedGrid::of(TILES[0], m, i, sms))
}

/// A multiprocessor whose due of the memory's speed is more than this many bytes a clock gets more by cuBLAS than by our kernels of
/// 17 to 64 rows: an H200's is 18.4, an H100's 12.8.
const FAST_MEMORY: f64 = 14.0;

/// The fused kernel or cuBLAS for (M,I) on `sms` multiprocessors, each of which the memory could bring `bytes_per_clock`: by what an
/// H100 and an H200 do.
///
/// The fused kernel's `load` (above) would be I / sms for each row of tiles if they divided evenly. Above 128 rows it needs 0.94 of what
/// cuBLAS and the pass over its halves take where the tiles divide evenly, as long as arithmetic decides, from about 300 rows on; below
/// that reading the weights takes as long as 2.5 times 128 rows. Up to 128 rows it reads them 1.15 times as fast, but no faster than at
/// 13 bytes a clock: where memory is faster, cuBLAS is up to 64 rows.
pub(super) fn prefill((m, i): (usize, usize), sms: usize, bytes_per_clock: f64) -> Prefill {
    if m <= 64 && bytes_per_clock > FAST_MEMORY {
        return Prefill::Cublas;
    }
    let due = i as f64 / sms as f64;
    let bound = if m <= 128 { 1.15 } else { (1.06 * m as f64 / 128.0).max(2.5) };
    if fused_grid(m, i, sms).load(m) <= bound * due { Prefill::Fused } else { Prefill::Cublas }
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
                let Tile { cluster, width, .. } = grid.tile;
                assert!(grid.blocks >= cluster && grid.blocks.is_multiple_of(cluster));
                assert!(grid.blocks <= sms.max(cluster));
                let tiles = m.div_ceil(128 * cluster) * i.div_ceil(width);
                assert!(grid.waves * grid.blocks / cluster >= tiles);
            }
        }
        // 16 clusters of rows by 112 columns of tiles on 66 clusters: 27.2, so 28 in turn.
        assert_eq!(fused_grid(4096, 14336, 132), FusedGrid { tile: TILES[7], blocks: 132, waves: 28 });
    }

    /// Widths that leave few multiprocessors idle, where 128 leaves many.
    #[test]
    fn tiles_divide_the_features() {
        let found = |m, i| {
            let grid = fused_grid(m, i, 132);
            (grid.tile.cluster, grid.tile.width, grid.waves)
        };
        assert_eq!(found(64, 14336), (1, 112, 1)); // 128 tiles
        assert_eq!(found(64, 8192), (1, 64, 1)); // 128 tiles
        assert_eq!(found(64, 28672), (1, 112, 2)); // 256 tiles
        assert_eq!(found(512, 14336), (2, 112, 4)); // 256 clusters on 66
        assert_eq!(found(512, 8192), (2, 128, 2));
    }

    #[test]
    fn decode_blocks_fill_the_device() {
        for (tiles, blocks, warps) in [(1, 1, 16), (128, 128, 16), (132, 132, 16), (133, 133, 8), (256, 256, 8), (3584, 264, 8)]
        {
            assert_eq!(decode_grid(tiles, 132), DecodeGrid { blocks, warps }, "{tiles} tiles");
        }
    }

    #[test]
    fn blocks_that_fill_the_device_are_fused() {
        for m in [17, 64, 128, 160, 512, 2048, 4096] {
            for i in [8192, 14336, 28672] {
                assert_eq!(prefill((m, i), 132, 12.8), Prefill::Fused, "M = {m}, I = {i}");
                let on_h200 = if m <= 64 { Prefill::Cublas } else { Prefill::Fused };
                assert_eq!(prefill((m, i), 132, 18.4), on_h200, "M = {m}, I = {i}");
            }
        }
        assert_eq!(prefill((129, 128), 132, 12.8), Prefill::Cublas, "two tiles on 132 multiprocessors");
        assert_eq!(prefill((64, 1376), 132, 12.8), Prefill::Cublas, "22 tiles");
        assert_eq!(prefill((300, 14336), 132, 12.8), Prefill::Cublas, "three rows of tiles for the work of 2.3");
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
