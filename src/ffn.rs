//! The feed-forward block.

use std::sync::Arc;

use candle_core::{DType, Tensor};
use candle_nn::{Module, VarBuilder};

use crate::config::FfnConfig;
use crate::engine::{self, Block, BlockSpec, over_rows};
use crate::error::{Error, Result};
use crate::load::{GateUp, Weights, load_each};
use crate::lora::{Adapters, FfnLora, Lora};

mod adapters;

/// The SwiGLU feed-forward block, `y = (silu(x·Wgᵀ) ⊙ (x·Wuᵀ))·Wdᵀ`, and its relatives
/// ([`FfnConfig`] has the general equation).
///
/// # Shapes
/// x (…,H) of any rank ≥ 1 and any layout -> y (…,H) in x's dtype. gate_proj (I,H), up_proj (I,H),
/// down_proj (H,I).
///
/// # dtypes
/// The block computes in the dtype of its weights. x in a narrower float dtype is widened, and y is
/// rounded to x's dtype. For x in a wider dtype (f32 on bf16 weights, as in candle's T5) each call
/// converts the weights, which is exact but slow: convert them once with [`SwiGluFfn::to_dtype`].
///
/// # Kernels
/// Weights through which no gradient is tracked are constants. On the CPU, constants in f32, bf16
/// or f16 are packed in the order in which the kernels read them. Each is packed before the next is
/// loaded, and the packed copy is the only one that is kept. One sweep over gate and up includes
/// the activation, a second sweep is down; gate and up are not written to memory. On CUDA and
/// Metal, constants keep the layout of the checkpoint, with gate and up in one (2I,H) matrix.
///
/// Variables in f32, bf16 or f16 on the CPU (those of a `VarMap`, say) are read where they are, by
/// the same microkernels. Everything else (variables on a GPU, f64) runs as candle's matmuls around
/// the fused gate of [`crate::glu_mul`]. [`SwiGluFfn::kernel`] names the implementation.
///
/// # Accuracy
/// Packed weights and variables on the CPU: products are summed in f32 in the order of k, with
/// partial sums of 128 products, for every number of rows and threads; h and y are rounded once
/// each. `amx`, `avx512bf16` and `neonbf16` add pairs of bf16 products without these partial sums
/// (`amx` has partial sums of 16 even and of 16 odd k) and flush denormals to 0. ARM's instruction
/// rounds such a sum to within one unit in the last place of f32, not half of one. The error bounds
/// are the same. Other weights: candle's matmuls, in f64 for f64, also round gate and up.
///
/// # Memory
/// A call with packed weights allocates y and borrows scratch memory of at most
/// `rows·(H + I + 256)·a + threads·(rows·NR·4 B + 256 KiB)` with rows ≤ 512 and NR ≤ 64: longer
/// inputs are processed in chunks. `a` is 2 B where the kernel multiplies bf16 without widening it,
/// else 4 B. With `amx`, NR is 256 (8 panels), and rows counts up to 15 more. The scratch memory is
/// kept for the next call. Low-rank adapters need more (docs/lora.md).
///
/// # Training
/// Every step is differentiable. Weights from a `VarMap` are used without a copy, so that the block
/// sees an optimizer's steps. Through packed weights x still gets its gradient.
///
/// The backward pass of a block with variables is one operation. A gradient that the graph does not
/// need (of a frozen weight, or of x) is not computed. In f32, bf16 and f16 on the CPU, gradients
/// are summed in f32 and rounded once, and have the same bits for any number of threads; h, dgate
/// and dup are rounded to the dtype. On a GPU and in f64 the products are candle's matmuls, which
/// also round dh.
///
/// The forward pass keeps x, gate and up in the graph: `2·M·I` elements beside x
/// ([`SwiGluFfn::with_recompute`] avoids them). On a GPU and in f64 the backward pass allocates up
/// to `5·M·I` elements at a time beside the gradients. With the CPU kernels I is rounded up to
/// whole panels, and each pass borrows scratch memory of at most
/// `(rows + 128)·(4H + 5I + 768)·a + threads·((rows + 32)·1792 B + 1 MiB)`, with rows ≤ 512 and `a`
/// as above. The backward pass of packed weights has the same bound. With more than 512 rows, the
/// backward pass of variables also allocates `4·(R + 512)·(C + 64)` B for each wanted gradient of a
/// weight (R,C): the f32 sums over all chunks. [`fn@crate::backward`] puts gradients into candle's
/// store without another copy.
///
/// ```
/// use candle_core::{DType, Device, Tensor};
/// use candle_nn::{Module, VarBuilder, VarMap};
/// use candle_swiglu::{FfnConfig, SwiGluFfn};
///
/// let vars = VarMap::new();
/// let vb = VarBuilder::from_varmap(&vars, DType::F32, &Device::Cpu);
/// let ffn = SwiGluFfn::new(&FfnConfig::new(8, 24), vb.pp("mlp"))?;
/// let x = Tensor::randn(0f32, 1.0, (2, 5, 8), &Device::Cpu)?;
/// let y = ffn.forward(&x)?;
/// assert_eq!(y.dims(), [2, 5, 8]);
/// let gradients = y.sqr()?.sum_all()?.backward()?;
/// assert!(vars.all_vars().iter().all(|var| gradients.get(var).is_some()));
/// # Ok::<(), candle_core::Error>(())
/// ```
#[doc(alias("Mlp", "FeedForward", "geglu"))]
#[derive(Clone, Debug)]
pub struct SwiGluFfn {
    cfg: FfnConfig,
    /// The implementation that runs the block, chosen when it is built.
    block: Arc<dyn Block>,
    adapters: Adapters<FfnLora, Arc<dyn Block>>,
    /// [`SwiGluFfn::with_recompute`]
    recompute: bool,
    span: tracing::Span,
}

/// The block that `cfg` describes, from the weights under `vb`'s prefix: [`SwiGluFfn::new`] in the
/// style of candle-nn.
///
/// # Errors
/// As [`SwiGluFfn::new`].
pub fn swiglu_ffn(cfg: &FfnConfig, vb: VarBuilder) -> Result<SwiGluFfn> {
    SwiGluFfn::new(cfg, vb)
}

impl SwiGluFfn {
    /// Loads the weights under `vb`'s prefix (`model.layers.0.mlp`, `layers.0.feed_forward`, ...).
    /// Their names and layout are detected, see [`crate::Family`]. In an empty `VarMap` they are
    /// created under the names of `Family::Llama`.
    ///
    /// # Errors
    /// A field of the config that is out of range; a missing tensor, a wrong shape, a dtype that is
    /// not a float or not that of the other weights; names that fit several families; a bias that
    /// the config does not have.
    ///
    /// A tensor of the block that would not be read (a norm between the projections, an adapter, a
    /// scale) is an error too. The tensors of a block are those under its projections' names and
    /// all others under the prefix. If attention is under the same prefix, it is the prefix of a
    /// whole layer, and only tensors known to be part of a block count. A [`crate::Checkpoint`]
    /// knows all its tensors and which of them the caller has read. In other sources of a
    /// `VarBuilder`, names known from published checkpoints are looked up.
    pub fn new(cfg: &FfnConfig, vb: VarBuilder) -> Result<Self> {
        cfg.validate()?;
        let block = engine::load_block(&spec(cfg), |take| load_each(&cfg.wanted(), &vb, take))?;
        Ok(Self::with_block(cfg, block))
    }

    /// SwiGLU without biases from gate_proj (I,H), up_proj (I,H), down_proj (H,I).
    ///
    /// ```
    /// use candle_core::{Device, Tensor};
    /// use candle_nn::Module;
    /// let row = |v: &[f32]| Tensor::new(v, &Device::Cpu)?.reshape((1, 2));
    /// let down = Tensor::new(&[[1f32], [2.0]], &Device::Cpu)?;
    /// let ffn = candle_swiglu::SwiGluFfn::from_tensors(row(&[100.0, 0.0])?, row(&[0.0, 1.0])?, down)?;
    /// let y = ffn.forward(&Tensor::new(&[1f32, 3.0], &Device::Cpu)?)?; // h = silu(100)·3 = 300
    /// assert_eq!(y.to_vec1::<f32>()?, [300.0, 600.0]);
    /// # Ok::<(), candle_core::Error>(())
    /// ```
    ///
    /// # Errors
    /// Wrong ranks, shapes that do not fit, a dtype that is not a float, mixed dtypes or devices.
    pub fn from_tensors(gate: Tensor, up: Tensor, down: Tensor) -> Result<Self> {
        let Ok((intermediate_size, hidden_size)) = gate.dims2() else {
            return Err(Error::Rank {
                name: "gate_proj",
                expected: "rank 2 (I, H)",
                found: gate.dims().to_vec(),
            });
        };
        let gate_up = GateUp::separate(gate, up, None, None);
        let weights = Weights::new(gate_up, down, None);
        Self::from_weights(&FfnConfig::new(hidden_size, intermediate_size), weights)
    }

    /// From tensors in any of the layouts of [`GateUp`], with the formula of `cfg`. If a gradient
    /// is tracked through any of them, none is packed. Tensors that are not packed keep their
    /// storage; a view whose rows are not contiguous (every second row, say) is copied once, unless
    /// a gradient is tracked through it.
    ///
    /// # Errors
    /// Those of [`SwiGluFfn::from_tensors`]; a bias that the config does not have; a bias that the
    /// config has and `weights` has not.
    pub fn from_weights(cfg: &FfnConfig, weights: Weights) -> Result<Self> {
        cfg.validate()?;
        weights.check(&cfg.wanted())?;
        Ok(Self::with_block(cfg, engine::build_block(&spec(cfg), weights)?))
    }

    fn with_block(cfg: &FfnConfig, block: Arc<dyn Block>) -> Self {
        let span = tracing::span!(tracing::Level::TRACE, "swiglu-ffn");
        Self { cfg: cfg.clone(), block, adapters: Adapters::new(), recompute: false, span }
    }

    /// The name of the kernel that runs the block, chosen when it was built.
    ///
    /// - Packed on the CPU: the instruction set for the dtype of the weights, one of
    ///   [`crate::cpu_kernels`]. The environment variable `CANDLE_SWIGLU_KERNEL` forces one.
    ///   `amx` and `avx512bf16` use `avx512` for all dtypes but bf16, `neonbf16` uses `neon`.
    /// - On a GPU for which this crate has kernels: their name (`metal`, `cuda-sm90`).
    /// - For variables on the CPU: `trained-` and the instruction set (`trained-avx2`).
    /// - Otherwise `plain` for candle's matmuls; on the CPU with the instruction set of the gate
    ///   (`plain-avx2`).
    pub fn kernel(&self) -> &str {
        self.running().kernel()
    }

    /// The memory that holds packed weights, for benchmarks: a decode step reads all of it. Empty
    /// where nothing is packed on the CPU.
    #[doc(hidden)]
    pub fn packed_bytes(&self) -> Vec<&[u8]> {
        self.running().packed_bytes()
    }

    /// H
    pub fn hidden_size(&self) -> usize {
        self.cfg.hidden_size
    }

    /// I
    pub fn intermediate_size(&self) -> usize {
        self.cfg.intermediate_size
    }

    /// The sizes and the formula that the block was built with.
    pub fn config(&self) -> &FfnConfig {
        &self.cfg
    }

    /// The dtype of the weights.
    pub fn dtype(&self) -> DType {
        self.block.dtype()
    }

    /// The weights, as arguments of [`SwiGluFfn::from_weights`]. A packed block unpacks them into
    /// new tensors, bit for bit as they were loaded, with gate and up separate. Any other block
    /// returns the tensors that it uses (those of a `VarMap`, say).
    ///
    /// # Errors
    /// None but candle's.
    pub fn weights(&self) -> Result<Weights> {
        Ok(self.block.weights()?)
    }

    /// The block with its weights as constants: one that was trained in a `VarMap` gets this
    /// device's kernels, and its weights no gradient any more. Later steps of an optimizer do not
    /// change it. A packed block is cloned, which copies nothing.
    ///
    /// ```
    /// use candle_core::{DType, Device};
    /// use candle_nn::{VarBuilder, VarMap};
    /// use candle_swiglu::{FfnConfig, swiglu_ffn};
    /// let vars = VarMap::new();
    /// let trained = swiglu_ffn(&FfnConfig::new(8, 24), VarBuilder::from_varmap(&vars, DType::F32, &Device::Cpu))?;
    /// assert!(trained.kernel().starts_with("trained"));
    /// assert!(!trained.freeze()?.kernel().starts_with("trained"));
    /// # Ok::<(), candle_swiglu::Error>(())
    /// ```
    ///
    /// # Errors
    /// None but candle's.
    pub fn freeze(&self) -> Result<Self> {
        let frozen = match self.block.is_packed() {
            true => self.clone(),
            false => Self::from_weights(&self.cfg, self.weights()?.map(engine::constant)?)?,
        };
        frozen.with_adapters_of(self, Lora::frozen, |merged| Ok(merged.clone()))
    }

    /// Sets whether the backward pass computes gate and up again. Without it, the default, the
    /// forward pass keeps them: `2·M·I` elements of the dtype of the weights, until the graph is
    /// dropped. With it the graph keeps x alone, and the backward pass takes about a third longer.
    /// In f32 and f64 on the CPU the gradients have the same bits either way.
    ///
    /// This concerns variables, and low-rank adapters on packed weights on the CPU. Packed weights
    /// without an adapter always compute gate and up again. Without the fused gate
    /// (`CANDLE_SWIGLU_KERNEL=plain`, or a GPU that does not have it), and with an adapter
    /// elsewhere, candle differentiates its own operations, and keeps gate, up and h.
    ///
    /// ```
    /// use candle_core::{DType, Device, Tensor};
    /// use candle_nn::{Module, VarBuilder, VarMap};
    /// use candle_swiglu::{FfnConfig, swiglu_ffn};
    /// let vars = VarMap::new();
    /// let vb = VarBuilder::from_varmap(&vars, DType::F32, &Device::Cpu);
    /// let ffn = swiglu_ffn(&FfnConfig::new(8, 24), vb)?.with_recompute(true);
    /// let y = ffn.forward(&Tensor::ones((4, 8), DType::F32, &Device::Cpu)?)?;
    /// assert!(y.sum_all()?.backward()?.get(&vars.all_vars()[0]).is_some());
    /// # Ok::<(), candle_core::Error>(())
    /// ```
    pub fn with_recompute(self, recompute: bool) -> Self {
        let change = |block: Arc<dyn Block>| block.with_recompute(recompute).unwrap_or(block);
        let (block, adapters) = (change(self.block), self.adapters.map_running(change));
        Self { block, adapters, recompute, ..self }
    }

    /// The block with its weights in another float dtype.
    ///
    /// # Errors
    /// A dtype that is not a float.
    pub fn to_dtype(&self, dtype: DType) -> Result<Self> {
        if dtype == self.dtype() {
            return Ok(self.clone());
        }
        let convert = |block: &Arc<dyn Block>| {
            let weights = block.weights()?.map(|tensor| tensor.to_dtype(dtype))?;
            engine::build_block(&spec(&self.cfg), weights)
        };
        let converted =
            Self::with_block(&self.cfg, convert(&self.block)?).with_recompute(self.recompute);
        converted.with_adapters_of(self, |lora| Ok(lora.clone()), convert)
    }
}

impl Module for SwiGluFfn {
    fn forward(&self, x: &Tensor) -> candle_core::Result<Tensor> {
        let _enter = self.span.enter();
        let sizes = (self.cfg.hidden_size, self.cfg.hidden_size);
        let wide = |dtype| Ok(self.to_dtype(dtype)?);
        let weights = (self.dtype(), self.block.device());
        over_rows(self, x, sizes, weights, wide, |layer, rows| layer.running().forward(rows))
    }
}

fn spec(cfg: &FfnConfig) -> BlockSpec {
    BlockSpec {
        hidden_size: cfg.hidden_size,
        intermediate_size: cfg.intermediate_size,
        glu: cfg.glu(),
        down_multiplier: cfg.down_multiplier,
    }
}
