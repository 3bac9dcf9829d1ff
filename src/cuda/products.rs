//! The products of the block and of a projection, by decode.cu, prefill_sm90.cu or cuBLAS.

use candle_core::{DType, Result};

use super::launch::{
    Element, Launch, LaunchContext, NULL, Pointer, arguments, gemm, is_capturing, tensor_map,
};
use super::plan::{self, Grid, Kernel, Prefill, TILES, Tile, chunk_rows};
use crate::gate::params::GluParams;

/// The most rows that count as few and are computed by the kernels of decode.cu.
fn decode_rows<T: Element>(call: &LaunchContext<'_>) -> Result<usize> {
    let hopper = call.functions.gpu.hopper && T::DTYPE != DType::F32;
    Ok(plan::decode_rows(plan::forced()?, hopper))
}

/// A size as the i32 that the kernels receive.
fn int(size: usize) -> Result<i32> {
    i32::try_from(size).map_err(|_| {
        candle_core::Error::Msg(format!("the CUDA kernels take sizes below 2^31, found {size}"))
    })
}

// ---------------------------------------------------------------- a projection

/// y = (x·Wᵀ + b)·factor
pub(super) struct Projection<'a> {
    /// (N, K)
    pub(super) sizes: (usize, usize),
    pub(super) weight: Pointer<'a>,
    pub(super) bias: Pointer<'a>,
    pub(super) factor: f32,
}

impl Projection<'_> {
    /// y (M,N) of x (M,K), for any number of rows.
    pub(super) fn run<T: Element>(
        &self,
        call: &LaunchContext<'_>,
        (x, y): (&Pointer<'_>, u64),
        m: usize,
    ) -> Result<()> {
        if m <= decode_rows::<T>(call)? {
            self.decode::<T>(call, (x, y), m, !is_capturing(call.stream))
        } else {
            self.product::<T>(call, (x.address, y), m)
        }
    }

    /// At most [`plan::decode_rows`] rows of x (M,K) into y (M,N).
    fn decode<T: Element>(
        &self,
        call: &LaunchContext<'_>,
        (x, y): (&Pointer<'_>, u64),
        m: usize,
        early: bool,
    ) -> Result<()> {
        let (n, k) = self.sizes;
        let aligned = k.is_multiple_of(8) && x.is_aligned() && self.weight.is_aligned();
        let (kernel, grid) = plan::decode(false, T::DTYPE, m, n, aligned, call.functions.gpu.sms);
        let launch = Launch { kernel, grid, rows: m, early };
        let (m, n, k) = (int(m)?, int(n)?, int(k)?);
        let list =
            arguments![x.address, self.weight.address, self.bias.address, y, m, n, k, self.factor];
        // SAFETY: the arguments of linear_*; x has M·K elements, the weight N·K, the bias N or
        // none, y M·N. `prepare` has waited for the weight.
        unsafe { call.launch::<T>(launch, list) }
    }

    /// Any number of rows, with cuBLAS.
    fn product<T: Element>(
        &self,
        call: &LaunchContext<'_>,
        (x, y): (u64, u64),
        m: usize,
    ) -> Result<()> {
        let (n, k) = self.sizes;
        let biased = self.bias.address != 0;
        if biased {
            let (rows, columns) = (m as i64, n as i64);
            let list = arguments![self.bias.address, y, rows, columns];
            // SAFETY: the arguments of bias_rows_*; the bias has N elements, y M·N.
            unsafe { call.launch::<T>(call.over::<T>(Kernel::BiasRows, m, n), list)? };
        }
        // SAFETY: x has M·K elements, the weight N·K, y M·N. y holds the bias if β is not 0.
        unsafe { gemm::<T>(call.device, (x, &self.weight, y), (m, n, k), self.factor, biased) }
    }
}

// ---------------------------------------------------------------- the block

/// The block's weights, x and y.
pub(super) struct Operands<'a> {
    /// (M, H, I)
    pub(super) sizes: (usize, usize, usize),
    pub(super) x: Pointer<'a>,
    pub(super) gate_up: Pointer<'a>,
    pub(super) gate_up_bias: Pointer<'a>,
    pub(super) down: Projection<'a>,
    pub(super) y: Pointer<'a>,
    pub(super) glu: GluParams,
}

impl Operands<'_> {
    pub(super) fn run<T: Element>(&self, call: &LaunchContext<'_>) -> Result<()> {
        if self.sizes.0 <= decode_rows::<T>(call)? {
            self.decode::<T>(call)
        } else {
            self.prefill::<T>(call)
        }
    }

    /// The half of gate_up_proj that belongs to up.
    fn up<T: Element>(&self) -> u64 {
        let (_, h, i) = self.sizes;
        self.gate_up.address + (i * h * size_of::<T>()) as u64
    }

    /// The halves of the bias that belong to gate and to up.
    fn biases<T: Element>(&self) -> (u64, u64) {
        let bias = self.gate_up_bias.address;
        (bias, if bias == 0 { 0 } else { bias + (self.sizes.2 * size_of::<T>()) as u64 })
    }

    /// Few rows: two launches. h and y are allocated before the first launch, so that the second
    /// follows the first directly in a CUDA graph too. In a graph, the first kernel follows an
    /// allocation node, so programmatic launch cannot overlap it.
    fn decode<T: Element>(&self, call: &LaunchContext<'_>) -> Result<()> {
        let (m, h, i) = self.sizes;
        let mut product = call.alloc::<T>(m, i)?;
        let hidden = Pointer::write(&mut product, call.stream);
        let aligned = h.is_multiple_of(8) && self.x.is_aligned() && self.gate_up.is_aligned();
        let (kernel, grid) = plan::decode(true, T::DTYPE, m, i, aligned, call.functions.gpu.sms);
        let launch = Launch { kernel, grid, rows: m, early: !is_capturing(call.stream) };
        let (up, (gate_bias, up_bias)) = (self.up::<T>(), self.biases::<T>());
        let (rows, columns, k) = (int(m)?, int(i)?, int(h)?);
        let list = arguments![
            self.x.address,
            self.gate_up.address,
            up,
            gate_bias,
            up_bias,
            hidden.address,
            rows,
            columns,
            k,
            self.glu
        ];
        // SAFETY: the arguments of gate_up_*; x has M·H elements, each half of the weights I·H, of
        // the biases I or none, h M·I. `prepare` has waited for the weights.
        unsafe { call.launch::<T>(launch, list)? };
        self.down.decode::<T>(call, (&hidden, self.y.address), m, true)
    }

    /// Many rows, in chunks.
    fn prefill<T: Element>(&self, call: &LaunchContext<'_>) -> Result<()> {
        let (m, h, i) = self.sizes;
        let rows = chunk_rows(m, i, size_of::<T>()).min(m);
        let fused = self.takes_fused::<T>(call)?;
        let mut scratch = call.alloc::<T>(rows, i)?;
        let hidden = Pointer::write(&mut scratch, call.stream);
        let mut halves = if fused { None } else { Some(call.alloc::<T>(rows, 2 * i)?) };
        let halves = halves.as_mut().map_or(NULL, |slice| Pointer::write(slice, call.stream));
        for start in (0..m).step_by(rows) {
            let rows = rows.min(m - start);
            let first = (start * h * size_of::<T>()) as u64;
            let (x, y) = (self.x.address + first, self.y.address + first);
            if fused {
                self.fused::<T>(call, (x, hidden.address), rows)?;
            } else {
                self.merged::<T>(call, (x, halves.address, hidden.address), rows)?;
            }
            self.down.product::<T>(call, (hidden.address, y), rows)?;
        }
        Ok(())
    }

    /// Whether a kernel of prefill_sm90.cu can compute gate and up, and is forced or expected to be
    /// faster.
    fn takes_fused<T: Element>(&self, call: &LaunchContext<'_>) -> Result<bool> {
        let (m, h, i) = self.sizes;
        let possible = call.functions.gpu.hopper
            && Kernel::Fused(0).has(T::DTYPE)
            && h.is_multiple_of(8)
            && i.is_multiple_of(8)
            && self.x.is_aligned()
            && self.gate_up.is_aligned();
        let way = plan::forced()?.unwrap_or_else(|| plan::prefill((m, i), &call.functions.gpu));
        Ok(possible && way == Prefill::Fused)
    }

    /// p (rows,2I) = x·Wguᵀ, then h (rows,I) from its halves.
    fn merged<T: Element>(
        &self,
        call: &LaunchContext<'_>,
        (x, halves, hidden): (u64, u64, u64),
        rows: usize,
    ) -> Result<()> {
        let (_, h, i) = self.sizes;
        // SAFETY: x has rows·H elements, the weights 2I·H, p rows·2I.
        unsafe {
            gemm::<T>(call.device, (x, &self.gate_up, halves), (rows, 2 * i, h), 1.0, false)?
        };
        let up = halves + (i * size_of::<T>()) as u64;
        let (gate_bias, up_bias) = self.biases::<T>();
        let (m, columns, stride) = (rows as i64, i as i64, 2 * i as i64);
        let list = arguments![
            halves, up, gate_bias, up_bias, hidden, m, columns, stride, stride, columns, self.glu
        ];
        // SAFETY: the arguments of gate_forward_*; p has rows·2I elements, of which gate and up are
        // the halves of each row, the biases have I or none, h has rows·I.
        unsafe { call.launch::<T>(call.over::<T>(Kernel::GateForward, rows, i), list) }
    }

    /// h (rows,I) = glu(x·Wgᵀ + b, x·Wuᵀ + b)
    fn fused<T: Element>(
        &self,
        call: &LaunchContext<'_>,
        (x, hidden): (u64, u64),
        rows: usize,
    ) -> Result<()> {
        let (_, h, i) = self.sizes;
        let plan = plan::fused_grid(rows, i, call.functions.gpu.sms);
        let Tile { width, .. } = TILES[plan.tile];
        let grid = Grid { blocks: plan.blocks, threads: plan::FUSED_THREADS };
        let launch = Launch {
            kernel: Kernel::Fused(plan.tile),
            grid,
            rows,
            early: !is_capturing(call.stream),
        };
        let x = tensor_map::<T>(x, (rows, h), (128, 64))?;
        let gate = tensor_map::<T>(self.gate_up.address, (i, h), (width as u32, 64))?;
        let up = tensor_map::<T>(self.up::<T>(), (i, h), (width as u32, 64))?;
        let hidden = tensor_map::<T>(
            hidden,
            (rows, i),
            (64, if width.is_multiple_of(64) { 64 } else { 16 }),
        )?;
        let (gate_bias, up_bias) = self.biases::<T>();
        let (m, columns, k) = (int(rows)?, int(i)?, int(h)?);
        let list = arguments![x, gate, up, hidden, gate_bias, up_bias, m, columns, k, self.glu];
        // SAFETY: the arguments of gate_up_sm90_*; the maps are those of x (rows,H), the halves of
        // the weights (I,H) and h (rows,I). The biases have I elements or none. `prepare` has
        // waited for the weights.
        unsafe { call.launch::<T>(launch, list) }
    }
}
