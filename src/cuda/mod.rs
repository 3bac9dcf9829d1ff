//! The block, one projection and the gate on CUDA. `README.md` beside this file says what each kernel takes.
//!
//! ```text
//! x (M,H)   gate_up_proj (2I,H), gate's rows first   down_proj (H,I)
//! few      h (M,I) = glu(x·Wgᵀ, x·Wuᵀ)    gate_up of decode.cu: the weights are read once, gate and up stay in registers
//!          y (M,H) = h·Wdᵀ                linear of decode.cu, which starts while gate_up still runs
//! more     p (M,2I) = x·Wguᵀ              cuBLAS, one product
//!          h = glu(p's halves)            gate.cu, by strides, no copy of a half
//!      or  h = glu(x·Wgᵀ, x·Wuᵀ)          prefill_sm90.cu, where `plan::prefill` says so
//!          y = h·Wdᵀ                      cuBLAS
//! ```
//!
//! 1. All work goes to the stream of x's candle device, in order; nothing waits for the device. h, p and y come from the stream's
//!    allocator, chunks of rows reuse them (`plan::chunk_rows`), and so a call can be captured in a CUDA graph (with event tracking off
//!    if the device has a stream of its own, as for any candle operation).
//! 2. Kernels with a wait of their own start early (`launch::launch`). What they read before that wait are weights alone, and those are
//!    complete: [`prepare`] synchronises the stream once, when a layer is built.
//! 3. Products are summed in f32, h and y rounded once. Where p exists gate and up are rounded too.
//! 4. A bias goes in where the sum still is f32; through cuBLAS as y's first value, with β = α, and then y may be rounded twice.
//! 5. `plan::decode_rows` says how many rows are few: 32; on Hopper in bf16 and f16 16.

mod gate;
mod gemm;
mod launch;
mod module;
mod plan;

use candle_core::backend::BackendStorage;
use candle_core::cuda_backend::cudarc::driver::{CudaSlice, CudaStream};
use candle_core::cuda_backend::{CudaDevice, CudaStorage, WrapErr};
use candle_core::{DType, Layout, Result, Shape, bail};
use half::{bf16, f16};

use crate::device::{DeviceBlock, DeviceLinear};
use crate::gate::params::GluParams;
pub(crate) use gate::{gate_backward, gate_forward};
use gemm::gemm;
use launch::{Element, Grid, NULL, Pointer, Weight, arguments, contiguous, is_capturing, launch, tensor_map, weight};
use module::{Kernel, Kernels, Name, ROWS, ROWS_OF_8_WARPS, ROWS_OF_16_WARPS, Tile};
use plan::chunk_rows;
pub use plan::{Prefill, force_prefill};

/// The block's and the projection's kernels run on this device in this dtype: compute capability 8.0 or newer. Elsewhere candle's
/// operations do.
pub(crate) fn supports(device: &CudaDevice, dtype: DType) -> bool {
    matches!(dtype, DType::F32 | DType::BF16 | DType::F16) && supports_glu(device, dtype)
}

/// The gate's kernels do, f64 included.
pub(crate) fn supports_glu(device: &CudaDevice, dtype: DType) -> bool {
    let floats = matches!(dtype, DType::F64 | DType::F32 | DType::BF16 | DType::F16);
    floats && module::major(device).is_some_and(|major| major >= 8)
}

/// The code that runs: `cuda-sm80`, `cuda-sm90` or, compiled by the driver from PTX for a newer device, `cuda`.
pub(crate) fn kernel_name(device: &CudaDevice) -> &'static str {
    match module::major(device) {
        Some(8) => "cuda-sm80",
        Some(9) => "cuda-sm90",
        _ => "cuda",
    }
}

/// Loads the kernels, and waits until the weights that were written on the device's stream are there: after it a layer may be called.
pub(crate) fn prepare(device: &CudaDevice) -> Result<()> {
    Kernels::of(device)?;
    device.cuda_stream().synchronize().w()
}

/// x (M,H) of any layout -> y (M,H)
pub(crate) fn block(block: &DeviceBlock, x: &CudaStorage, layout: &Layout) -> Result<(CudaStorage, Shape)> {
    match x.dtype() {
        DType::BF16 => block_of::<bf16>(block, x, layout),
        DType::F16 => block_of::<f16>(block, x, layout),
        DType::F32 => block_of::<f32>(block, x, layout),
        other => bail!("the CUDA block takes bf16, f16 and f32, found {other:?}"),
    }
}

/// x (M,K) of any layout, weight (N,K), bias (N) -> y (M,N) = x·Wᵀ + b
pub(crate) fn linear(linear: &DeviceLinear, x: &CudaStorage, layout: &Layout) -> Result<(CudaStorage, Shape)> {
    match x.dtype() {
        DType::BF16 => linear_of::<bf16>(linear, x, layout),
        DType::F16 => linear_of::<f16>(linear, x, layout),
        DType::F32 => linear_of::<f32>(linear, x, layout),
        other => bail!("the CUDA projection takes bf16, f16 and f32, found {other:?}"),
    }
}

// ---------------------------------------------------------------- 1. a call

/// Where and on what a call runs.
struct Call<'a> {
    device: &'a CudaDevice,
    stream: &'a CudaStream,
    kernels: &'a Kernels,
}

/// x, read where it lies if it is contiguous and starts on 16 bytes, else copied.
struct Rows<'a> {
    x: &'a CudaStorage,
    offset: usize,
    copy: Option<CudaStorage>,
}

impl<'a> Rows<'a> {
    fn new<T: Element>(x: &'a CudaStorage, layout: &Layout, stream: &CudaStream) -> Result<Self> {
        if let Some((offset, _)) = layout.contiguous_offsets()
            && Pointer::read::<T>(x, offset, stream)?.is_aligned()
        {
            return Ok(Self { x, offset, copy: None });
        }
        Ok(Self { x, offset: 0, copy: Some(contiguous::<T>(x, layout)?) })
    }

    fn pointer<'b, T: Element>(&'b self, stream: &'b CudaStream) -> Result<Pointer<'b>> {
        Pointer::read::<T>(self.copy.as_ref().unwrap_or(self.x), self.offset, stream)
    }
}

fn block_of<T: Element>(block: &DeviceBlock, x: &CudaStorage, layout: &Layout) -> Result<(CudaStorage, Shape)> {
    let device = x.device();
    let (stream, kernels) = (device.cuda_stream(), Kernels::of(device)?);
    let call = Call { device, stream: &stream, kernels: &kernels };
    let (m, h) = layout.shape().dims2()?;
    let i = block.gate_up.dim(0)? / 2;
    let (gate_up, down) = (weight(&block.gate_up)?, weight(&block.down)?);
    let gate_up_bias = block.gate_up_bias.as_ref().map(weight).transpose()?;
    let down_bias = block.down_bias.as_ref().map(weight).transpose()?;
    let rows = Rows::new::<T>(x, layout, &stream)?;
    let mut y = call.alloc::<T>(m, h)?;
    {
        let operands = Operands {
            sizes: (m, h, i),
            x: rows.pointer::<T>(&stream)?,
            gate_up: gate_up.pointer::<T>(&stream)?,
            gate_up_bias: Weight::optional::<T>(&gate_up_bias, &stream)?,
            down: Projection {
                sizes: (h, i),
                weight: down.pointer::<T>(&stream)?,
                bias: Weight::optional::<T>(&down_bias, &stream)?,
                factor: block.down_multiplier,
            },
            y: Pointer::write(&mut y, &stream),
            glu: GluParams::from(&block.glu),
        };
        if m <= call.decode_rows::<T>()? { operands.decode::<T>(&call)? } else { operands.prefill::<T>(&call)? }
    }
    Ok((CudaStorage::wrap_cuda_slice(y, device.clone()), Shape::from((m, h))))
}

fn linear_of<T: Element>(linear: &DeviceLinear, x: &CudaStorage, layout: &Layout) -> Result<(CudaStorage, Shape)> {
    let device = x.device();
    let (stream, kernels) = (device.cuda_stream(), Kernels::of(device)?);
    let call = Call { device, stream: &stream, kernels: &kernels };
    let (m, _) = layout.shape().dims2()?;
    let (n, k) = linear.weight.dims2()?;
    let (matrix, bias) = (weight(&linear.weight)?, linear.bias.as_ref().map(weight).transpose()?);
    let rows = Rows::new::<T>(x, layout, &stream)?;
    let mut y = call.alloc::<T>(m, n)?;
    {
        let projection = Projection {
            sizes: (n, k),
            weight: matrix.pointer::<T>(&stream)?,
            bias: Weight::optional::<T>(&bias, &stream)?,
            factor: 1.0,
        };
        let (x, y) = (rows.pointer::<T>(&stream)?, Pointer::write(&mut y, &stream));
        if m <= call.decode_rows::<T>()? {
            projection.decode::<T>(&call, (&x, y.address), m, !is_capturing(&stream))?;
        } else {
            projection.product::<T>(&call, (x.address, y.address), m)?;
        }
    }
    Ok((CudaStorage::wrap_cuda_slice(y, device.clone()), Shape::from((m, n))))
}

impl Call<'_> {
    /// (rows, columns), to be written in full by the launches that follow.
    fn alloc<T: Element>(&self, rows: usize, columns: usize) -> Result<CudaSlice<T>> {
        let Some(elements) = rows.checked_mul(columns) else { bail!("a matrix of {rows} by {columns} is too large") };
        // SAFETY: every path writes each element before anything reads it, on the stream that allocates.
        unsafe { self.device.alloc::<T>(elements) }
    }

    /// How many rows are few: the kernels of decode.cu take them.
    fn decode_rows<T: Element>(&self) -> Result<usize> {
        let hopper = self.kernels.hopper && T::NAME != "f32";
        Ok(plan::decode_rows(plan::forced()?, hopper))
    }

    /// A kernel of decode.cu, and its grid for `features` outputs: of the CUDA cores' where the tensor cores' conditions fail.
    fn decode_kernel<T: Element>(&self, op: &'static str, m: usize, aligned: bool, features: usize) -> Result<(&Kernel, Grid)> {
        let (of_mma, of_fma) = if op == "linear" { (16, 4) } else { (8, 8) };
        let size = if m <= 8 { 0 } else { 1 + usize::from(m > 16) };
        let name = |family, variant| Name { op, family, dtype: T::NAME, variant };
        if T::NAME == "f32" || !aligned {
            let variant = if T::NAME == "f32" { ROWS[size] } else { "" };
            return Ok((self.kernels.get(name("_fma", variant))?, Grid::new(features.div_ceil(of_fma), 128)));
        }
        let grid = plan::decode_grid(features.div_ceil(of_mma), self.kernels.sms);
        let variants = if grid.warps == 16 { ROWS_OF_16_WARPS } else { ROWS_OF_8_WARPS };
        Ok((self.kernels.get(name("_mma", variants[size]))?, Grid::new(grid.blocks, 32 * grid.warps as u32)))
    }

    /// The grid of a kernel of gate.cu over (rows, columns).
    fn elementwise_grid<T: Element>(&self, rows: usize, columns: usize) -> Grid {
        let threads = rows.saturating_mul(columns.div_ceil(16 / size_of::<T>()));
        Grid::new(threads.div_ceil(256).clamp(1, 16 * self.kernels.sms), 256)
    }
}

/// A size as the kernels take it.
fn int(size: usize) -> Result<i32> {
    i32::try_from(size).map_err(|_| candle_core::Error::Msg(format!("the CUDA kernels take sizes below 2^31, found {size}")))
}

// ---------------------------------------------------------------- 2. a projection

/// y = (x·Wᵀ + b)·factor
struct Projection<'a> {
    /// (N, K)
    sizes: (usize, usize),
    weight: Pointer<'a>,
    bias: Pointer<'a>,
    factor: f32,
}

impl Projection<'_> {
    /// At most [`plan::decode_rows`] rows of x (M,K) into y (M,N).
    fn decode<T: Element>(&self, call: &Call<'_>, (x, y): (&Pointer<'_>, u64), m: usize, early: bool) -> Result<()> {
        let (n, k) = self.sizes;
        let aligned = k.is_multiple_of(8) && x.is_aligned() && self.weight.is_aligned();
        let (kernel, grid) = call.decode_kernel::<T>("linear", m, aligned, n)?;
        let (m, n, k) = (int(m)?, int(n)?, int(k)?);
        let list = arguments![x.address, self.weight.address, self.bias.address, y, m, n, k, self.factor];
        // SAFETY: the arguments of linear_*; x has M·K elements, the weight N·K, the bias N or none, y M·N; `prepare` has waited for the
        // weight.
        unsafe { launch(call.stream, kernel, grid, early, list) }
    }

    /// Any rows, through cuBLAS.
    fn product<T: Element>(&self, call: &Call<'_>, (x, y): (u64, u64), m: usize) -> Result<()> {
        let (n, k) = self.sizes;
        let biased = self.bias.address != 0;
        if biased {
            let name = Name { op: "bias_rows", family: "", dtype: T::NAME, variant: "" };
            let (rows, columns) = (m as i64, n as i64);
            let list = arguments![self.bias.address, y, rows, columns];
            // SAFETY: the arguments of bias_rows_*; the bias has N elements, y M·N.
            unsafe { launch(call.stream, call.kernels.get(name)?, call.elementwise_grid::<T>(m, n), false, list)? };
        }
        // SAFETY: x has M·K elements, the weight N·K, y M·N, which hold the bias if β is not 0.
        unsafe { gemm::<T>(call.device, (x, &self.weight, y), (m, n, k), self.factor, biased) }
    }
}

// ---------------------------------------------------------------- 3. the block

struct Operands<'a> {
    /// (M, H, I)
    sizes: (usize, usize, usize),
    x: Pointer<'a>,
    gate_up: Pointer<'a>,
    gate_up_bias: Pointer<'a>,
    down: Projection<'a>,
    y: Pointer<'a>,
    glu: GluParams,
}

impl Operands<'_> {
    /// up's half of gate_up_proj.
    fn up<T: Element>(&self) -> u64 {
        let (_, h, i) = self.sizes;
        self.gate_up.address + (i * h * size_of::<T>()) as u64
    }

    /// gate's and up's half of the bias.
    fn biases<T: Element>(&self) -> (u64, u64) {
        let bias = self.gate_up_bias.address;
        (bias, if bias == 0 { 0 } else { bias + (self.sizes.2 * size_of::<T>()) as u64 })
    }

    /// Few rows: two launches. h and y are allocated before the first, so that in a CUDA graph too the second follows the first directly.
    /// There the first follows an allocation, which nothing starts early after.
    fn decode<T: Element>(&self, call: &Call<'_>) -> Result<()> {
        let (m, h, i) = self.sizes;
        let mut product = call.alloc::<T>(m, i)?;
        let hidden = Pointer::write(&mut product, call.stream);
        let aligned = h.is_multiple_of(8) && self.x.is_aligned() && self.gate_up.is_aligned();
        let (kernel, grid) = call.decode_kernel::<T>("gate_up", m, aligned, i)?;
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
        let early = !is_capturing(call.stream);
        // SAFETY: the arguments of gate_up_*; x has M·H elements, each half of the weights I·H, of the biases I or none, h M·I;
        // `prepare` has waited for the weights.
        unsafe { launch(call.stream, kernel, grid, early, list)? };
        self.down.decode::<T>(call, (&hidden, self.y.address), m, true)
    }

    /// Many rows, in chunks.
    fn prefill<T: Element>(&self, call: &Call<'_>) -> Result<()> {
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

    /// A kernel of prefill_sm90.cu can compute gate and up, and is asked to or expected to be faster.
    fn takes_fused<T: Element>(&self, call: &Call<'_>) -> Result<bool> {
        let (m, h, i) = self.sizes;
        let possible = call.kernels.hopper
            && matches!(T::NAME, "bf16" | "f16")
            && h.is_multiple_of(8)
            && i.is_multiple_of(8)
            && self.x.is_aligned()
            && self.gate_up.is_aligned();
        let way = plan::forced()?.unwrap_or_else(|| plan::prefill((m, i), call.kernels.sms, call.kernels.bytes_per_clock));
        Ok(possible && way == Prefill::Fused)
    }

    /// p (rows,2I) = x·Wguᵀ, then h (rows,I) from its halves.
    fn merged<T: Element>(&self, call: &Call<'_>, (x, halves, hidden): (u64, u64, u64), rows: usize) -> Result<()> {
        let (_, h, i) = self.sizes;
        // SAFETY: x has rows·H elements, the weights 2I·H, p rows·2I.
        unsafe { gemm::<T>(call.device, (x, &self.gate_up, halves), (rows, 2 * i, h), 1.0, false)? };
        let up = halves + (i * size_of::<T>()) as u64;
        let (gate_bias, up_bias) = self.biases::<T>();
        let (m, columns, stride) = (rows as i64, i as i64, 2 * i as i64);
        let list = arguments![halves, up, gate_bias, up_bias, hidden, m, columns, stride, stride, columns, self.glu];
        let name = Name { op: "gate_forward", family: "", dtype: T::NAME, variant: "" };
        // SAFETY: the arguments of gate_forward_*; p has rows·2I elements, of which gate and up are the halves of each row, the biases have I or
        // none, h has rows·I.
        unsafe { launch(call.stream, call.kernels.get(name)?, call.elementwise_grid::<T>(rows, i), false, list) }
    }

    /// h (rows,I) = glu(x·Wgᵀ + b, x·Wuᵀ + b)
    fn fused<T: Element>(&self, call: &Call<'_>, (x, hidden): (u64, u64), rows: usize) -> Result<()> {
        let (_, h, i) = self.sizes;
        let plan = plan::fused_grid(rows, i, call.kernels.sms);
        let Tile { variant, width, .. } = plan.tile;
        let name = Name { op: "gate_up", family: "_sm90", dtype: T::NAME, variant };
        let x = tensor_map::<T>(x, (rows, h), (128, 64))?;
        let gate = tensor_map::<T>(self.gate_up.address, (i, h), (width as u32, 64))?;
        let up = tensor_map::<T>(self.up::<T>(), (i, h), (width as u32, 64))?;
        let hidden = tensor_map::<T>(hidden, (rows, i), (64, if width.is_multiple_of(64) { 64 } else { 16 }))?;
        let (gate_bias, up_bias) = self.biases::<T>();
        let (m, columns, k) = (int(rows)?, int(i)?, int(h)?);
        let list = arguments![x, gate, up, hidden, gate_bias, up_bias, m, columns, k, self.glu];
        // SAFETY: the arguments of gate_up_sm90_*; the maps are those of x (rows,H), the halves of the weights (I,H) and h (rows,I); the
        // biases have I elements or none; `prepare` has waited for the weights.
        unsafe { launch(call.stream, call.kernels.get(name)?, Grid::new(plan.blocks, 384), !is_capturing(call.stream), list) }
    }
}
