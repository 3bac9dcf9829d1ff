//! Selects the kernels that compute a block, by its sizes. No function here calls CUDA.

use std::cell::Cell;
use std::sync::OnceLock;

use candle_core::{DType, Result};

/// The most memory per call for h and for the product of gate and up together. More rows are
/// computed in chunks of at least 128.
const SCRATCH_BYTES: usize = 768 << 20;

/// The properties of a GPU on which the choices depend.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) struct Gpu {
    /// Streaming multiprocessors.
    pub(super) sms: usize,
    /// Memory bandwidth in bytes per clock and multiprocessor: an H100's is 12.8, an H200's 18.4.
    pub(super) bytes_per_clock: f64,
    /// Compute capability 9.0: the kernels of prefill_sm90.cu run.
    pub(super) hopper: bool,
}

// ---------------------------------------------------------------- kernels

/// A kernel of src/cuda. README.md beside this file says what each computes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Kernel {
    /// decode.cu: gate, up and the activation (`gated`), or one projection.
    Decode {
        gated: bool,
        cores: Cores,
        rows: DecodeRows,
    },
    /// prefill_sm90.cu, with the index of its tile in [`TILES`].
    Fused(usize),
    /// gate.cu
    GateForward,
    GateBackward,
    BiasRows,
}

/// The arithmetic units of a kernel of decode.cu.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Cores {
    /// `fma`: f32, and the shapes of bf16 and f16 that the tensor-core kernels do not support.
    Cuda,
    /// `mma`, in blocks of 8 warps.
    Tensor8,
    /// `mma`, in blocks of 16 warps.
    Tensor16,
}

/// The most rows that a kernel of decode.cu computes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum DecodeRows {
    Eight,
    Sixteen,
    ThirtyTwo,
}

const CORES: [Cores; 3] = [Cores::Cuda, Cores::Tensor8, Cores::Tensor16];
const DECODE_ROWS: [DecodeRows; 3] =
    [DecodeRows::Eight, DecodeRows::Sixteen, DecodeRows::ThirtyTwo];
const DECODE_KERNELS: usize = 2 * CORES.len() * DECODE_ROWS.len();

impl Kernel {
    /// Every kernel, in the order of [`Self::index`].
    pub(super) fn all() -> impl Iterator<Item = Self> {
        let decode = [true, false].into_iter().flat_map(|gated| {
            let variants =
                CORES.into_iter().flat_map(|cores| DECODE_ROWS.map(|rows| (cores, rows)));
            variants.map(move |(cores, rows)| Self::Decode { gated, cores, rows })
        });
        let fused = (0..TILES.len()).map(Self::Fused);
        decode.chain(fused).chain([Self::GateForward, Self::GateBackward, Self::BiasRows])
    }

    /// The position of this kernel in [`Self::all`].
    pub(super) fn index(self) -> usize {
        match self {
            Self::Decode { gated, cores, rows } => {
                let variants = CORES.len() * DECODE_ROWS.len();
                usize::from(!gated) * variants + cores as usize * DECODE_ROWS.len() + rows as usize
            }
            Self::Fused(tile) => DECODE_KERNELS + tile,
            Self::GateForward => DECODE_KERNELS + TILES.len(),
            Self::GateBackward => DECODE_KERNELS + TILES.len() + 1,
            Self::BiasRows => DECODE_KERNELS + TILES.len() + 2,
        }
    }

    /// Whether the kernel exists for this dtype.
    pub(super) fn has(self, dtype: DType) -> bool {
        let half = matches!(dtype, DType::BF16 | DType::F16);
        match self {
            Self::Decode { cores: Cores::Cuda, rows, .. } => {
                dtype == DType::F32 || (half && rows == DecodeRows::ThirtyTwo)
            }
            Self::Decode { .. } | Self::Fused(_) => half,
            Self::GateForward | Self::GateBackward => {
                half || matches!(dtype, DType::F32 | DType::F64)
            }
            Self::BiasRows => half || dtype == DType::F32,
        }
    }

    /// The name in the device code: `gate_up_mma_bf16_n1_w8`.
    pub(super) fn name(self, dtype: DType) -> String {
        let t = dtype.as_str();
        match self {
            Self::Decode { gated, cores, rows } => {
                let op = if gated { "gate_up" } else { "linear" };
                let n = 1 << rows as usize;
                match cores {
                    Cores::Tensor8 => format!("{op}_mma_{t}_n{n}_w8"),
                    Cores::Tensor16 => format!("{op}_mma_{t}_n{n}_w16"),
                    Cores::Cuda if dtype == DType::F32 => format!("{op}_fma_{t}_n{n}"),
                    Cores::Cuda => format!("{op}_fma_{t}"),
                }
            }
            Self::Fused(tile) => {
                let Tile { cluster, width, .. } = TILES[tile];
                format!("gate_up_sm90_{t}_c{cluster}_w{width}")
            }
            Self::GateForward => format!("gate_forward_{t}"),
            Self::GateBackward => format!("gate_backward_{t}"),
            Self::BiasRows => format!("bias_rows_{t}"),
        }
    }

    /// Bytes of dynamic shared memory of a block.
    pub(super) fn shared(self) -> u32 {
        match self {
            Self::Fused(tile) => TILES[tile].shared,
            _ => 0,
        }
    }
}

/// A grid of one dimension.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Grid {
    pub(super) blocks: usize,
    pub(super) threads: u32,
}

impl Grid {
    fn new(blocks: usize, threads: u32) -> Self {
        Self { blocks, threads }
    }
}

/// Threads of a block of gate.cu.
const GATE_THREADS: usize = 256;
/// Blocks of gate.cu per multiprocessor, at most. Eight are resident; a second round evens out the
/// times at which they end.
const GATE_BLOCKS_PER_SM: usize = 16;

/// The grid of a kernel of gate.cu over (rows, columns).
pub(super) fn gate_grid(rows: usize, columns: usize, dtype: DType, sms: usize) -> Grid {
    let per_thread = 16 / dtype.size_in_bytes();
    let blocks = rows.saturating_mul(columns.div_ceil(per_thread)).div_ceil(GATE_THREADS);
    Grid::new(blocks.clamp(1, GATE_BLOCKS_PER_SM * sms), GATE_THREADS as u32)
}

/// Threads of a block of prefill_sm90.cu: a producer and two consumers of 128.
pub(super) const FUSED_THREADS: u32 = 384;

/// Output features of a block of decode.cu: of one tile on tensor cores, of the whole block on CUDA
/// cores.
const fn decode_features(gated: bool, tensor_cores: bool) -> usize {
    match (gated, tensor_cores) {
        (true, _) => 8,
        (false, true) => 16,
        (false, false) => 4,
    }
}

/// The kernel of decode.cu for `m` rows and `features` outputs, and its grid. `aligned`: the shape
/// and the addresses meet the conditions of the tensor-core kernels (README.md).
pub(super) fn decode(
    gated: bool,
    dtype: DType,
    m: usize,
    features: usize,
    aligned: bool,
    sms: usize,
) -> (Kernel, Grid) {
    let rows = match m {
        0..=8 => DecodeRows::Eight,
        9..=16 => DecodeRows::Sixteen,
        _ => DecodeRows::ThirtyTwo,
    };
    let of_block = |tensor_cores| features.div_ceil(decode_features(gated, tensor_cores));
    if dtype == DType::F32 {
        return (
            Kernel::Decode { gated, cores: Cores::Cuda, rows },
            Grid::new(of_block(false), 128),
        );
    }
    if !aligned {
        let kernel = Kernel::Decode { gated, cores: Cores::Cuda, rows: DecodeRows::ThirtyTwo };
        return (kernel, Grid::new(of_block(false), 128));
    }
    let DecodeGrid { blocks, warps } = decode_grid(of_block(true), sms);
    let cores = if warps == 16 { Cores::Tensor16 } else { Cores::Tensor8 };
    (Kernel::Decode { gated, cores, rows }, Grid::new(blocks, 32 * warps as u32))
}

/// A tile of a kernel of prefill_sm90.cu. The `cluster` blocks share the weights, and each computes
/// 128 rows by `width` features.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Tile {
    pub(super) cluster: usize,
    pub(super) width: usize,
    /// Bytes of dynamic shared memory. A block can have 232448.
    shared: u32,
}

const fn tile(cluster: usize, width: usize, shared: u32) -> Tile {
    Tile { cluster, width, shared }
}

/// All tiles for which there are kernels.
pub(super) const TILES: [Tile; 8] = [
    tile(1, 64, 214_272),
    tile(1, 80, 206_080),
    tile(1, 96, 230_656),
    tile(1, 112, 210_176),
    tile(1, 128, 230_656),
    tile(2, 96, 230_656),
    tile(2, 112, 210_176),
    tile(2, 128, 230_656),
];

// ---------------------------------------------------------------- the prefill method

/// How gate, up and the activation are computed for more rows than the decode kernels support.
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

/// Forces one prefill method in the calling thread. With None the environment and the sizes decide
/// again. For tests and benchmarks.
pub fn force_prefill(way: Option<Prefill>) {
    FORCED.set(way);
}

/// The method that [`force_prefill`] forces, or else the environment variable
/// `CANDLE_SWIGLU_CUDA_PREFILL`, which is read once.
pub(super) fn forced() -> Result<Option<Prefill>> {
    static ASKED: OnceLock<std::result::Result<Option<Prefill>, String>> = OnceLock::new();
    if let Some(way) = FORCED.get() {
        return Ok(Some(way));
    }
    let asked =
        ASKED.get_or_init(|| parse(std::env::var("CANDLE_SWIGLU_CUDA_PREFILL").ok().as_deref()));
    asked.clone().map_err(candle_core::Error::Msg)
}

fn parse(value: Option<&str>) -> std::result::Result<Option<Prefill>, String> {
    match value {
        None => Ok(None),
        Some("cublas") => Ok(Some(Prefill::Cublas)),
        Some("fused") => Ok(Some(Prefill::Fused)),
        Some(other) => {
            Err(format!("CANDLE_SWIGLU_CUDA_PREFILL: expected fused or cublas, found {other}"))
        }
    }
}

/// The most rows for which the kernels of decode.cu are used: 32, or 16 in bf16 and f16 on Hopper,
/// where cuBLAS and the kernels of prefill_sm90.cu are faster above that. It is 8 where a prefill
/// method is forced.
pub(super) fn decode_rows(forced: Option<Prefill>, hopper: bool) -> usize {
    match (forced, hopper) {
        (Some(_), _) => 8,
        (None, true) => 16,
        (None, false) => 32,
    }
}

/// A launch of a tensor-core kernel of decode.cu.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct DecodeGrid {
    blocks: usize,
    /// Warps of a block: 8, with two blocks per multiprocessor. Where one block per multiprocessor
    /// covers all tiles it has 16, so that it uses the whole multiprocessor.
    warps: usize,
}

/// The persistent blocks for `tiles` tiles. The grid does not depend on the number of rows, so the
/// bits of a row's result do not either.
fn decode_grid(tiles: usize, sms: usize) -> DecodeGrid {
    let warps = if tiles <= sms { 16 } else { 8 };
    DecodeGrid { blocks: tiles.min(16 / warps * sms), warps }
}

/// Rows of a tile of prefill_sm90.cu, per block of a cluster.
const TILE_ROWS: usize = 128;
/// Blocks that do not share weights read more from L2. Above one tile of rows, where they are
/// compute-bound, they take 5 % longer.
const UNSHARED_WEIGHTS: f64 = 1.05;
/// Starting and ending a tile takes as long as computing 4 of its features.
const TILE_OVERHEAD_FEATURES: usize = 4;

/// A launch of a kernel of prefill_sm90.cu.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct FusedGrid {
    /// Index in [`TILES`].
    pub(super) tile: usize,
    pub(super) blocks: usize,
    /// Tiles that the busiest block computes, one after the other.
    waves: usize,
}

impl FusedGrid {
    fn of(tile: usize, m: usize, i: usize, sms: usize) -> Self {
        let Tile { cluster, width, .. } = TILES[tile];
        let tiles = m.div_ceil(TILE_ROWS * cluster) * i.div_ceil(width);
        let clusters = tiles.min(sms / cluster).max(1);
        Self { tile, blocks: cluster * clusters, waves: tiles.div_ceil(clusters) }
    }

    /// The work of the busiest multiprocessor, in features of one tile row.
    fn load(&self, m: usize) -> f64 {
        let Tile { cluster, width, .. } = TILES[self.tile];
        let unshared = if cluster == 1 && m > TILE_ROWS { UNSHARED_WEIGHTS } else { 1.0 };
        (self.waves * width) as f64 * unshared
    }

    /// The time of that work in the same unit.
    fn time(&self, m: usize) -> f64 {
        self.load(m) + (TILE_OVERHEAD_FEATURES * self.waves) as f64
    }
}

/// The tile that divides (M,I) best among `sms` multiprocessors.
pub(super) fn fused_grid(m: usize, i: usize, sms: usize) -> FusedGrid {
    let all =
        (0..TILES.len()).filter(|&tile| TILES[tile].cluster <= sms.min(m.div_ceil(TILE_ROWS)));
    let all = all.map(|tile| FusedGrid::of(tile, m, i, sms));
    all.min_by(|a, b| a.time(m).total_cmp(&b.time(m)))
        .unwrap_or_else(|| FusedGrid::of(0, m, i, sms))
}

/// Threshold of [`Gpu::bytes_per_clock`]. Above it (H200: 18.4; H100: 12.8) cuBLAS is faster than
/// the fused kernel up to [`FAST_MEMORY_ROWS`], because the fused kernel reads at most 13 bytes per
/// clock and multiprocessor.
const FAST_MEMORY: f64 = 14.0;
const FAST_MEMORY_ROWS: usize = 64;
/// Up to one tile of rows both methods are bandwidth-bound, and the fused kernel reads the weights
/// 1.15 times as fast as cuBLAS.
const READS_FASTER: f64 = 1.15;
/// Where both are compute-bound and the tiles divide evenly, the fused kernel takes 0.94 of the
/// time of cuBLAS and the gate's pass over gate and up.
const COMPUTES_FASTER: f64 = 1.06;
/// cuBLAS reads the weights in the time of computing 2.5 tiles of rows, so it is bandwidth-bound up
/// to about 300 rows.
const READING_IN_TILES: f64 = 2.5;

/// Selects the fused kernel or cuBLAS for (M,I), by measurements on an H100 and an H200.
///
/// If tiles divided evenly, the load of the fused kernel would be I / sms per tile row. The fused
/// kernel is chosen if its load exceeds that by less than the factor by which it would then be
/// faster than cuBLAS.
pub(super) fn prefill((m, i): (usize, usize), gpu: &Gpu) -> Prefill {
    if m <= FAST_MEMORY_ROWS && gpu.bytes_per_clock > FAST_MEMORY {
        return Prefill::Cublas;
    }
    let even = i as f64 / gpu.sms as f64;
    let tiles = m as f64 / TILE_ROWS as f64;
    let bound =
        if m <= TILE_ROWS { READS_FASTER } else { (COMPUTES_FASTER * tiles).max(READING_IN_TILES) };
    if fused_grid(m, i, gpu.sms).load(m) <= bound * even { Prefill::Fused } else { Prefill::Cublas }
}

/// Rows of a chunk: whole tiles, as many as [`SCRATCH_BYTES`] allows, in chunks of nearly equal
/// size.
pub(super) fn chunk_rows(m: usize, i: usize, element: usize) -> usize {
    let row = i.saturating_mul(3 * element).max(1);
    let most = (SCRATCH_BYTES / row / 128 * 128).max(128);
    let chunks = m.div_ceil(most).max(1);
    m.div_ceil(chunks).next_multiple_of(128).min(most)
}

#[cfg(test)]
#[path = "plan_tests.rs"]
mod tests;
