//! The block.

use std::sync::Arc;

use candle_core::{DType, Tensor};
use candle_nn::{Module, VarBuilder};

use crate::config::FfnConfig;
use crate::engine::{self, Block, BlockSpec};
use crate::error::{Error, Result};
use crate::load::{GateUp, Weights, load_each};
use crate::over_rows::over_rows;

/// The SwiGLU feed-forward block, `y = (silu(x·Wgᵀ) ⊙ (x·Wuᵀ))·Wdᵀ`, and its relatives ([`FfnConfig`]).
///
/// # Shapes
/// x (…,H) of any rank ≥ 1 and any layout -> y (…,H) in x's dtype. gate_proj, up_proj (I,H), down_proj (H,I).
///
/// # dtypes
/// The block computes in the dtype of its weights. x in a narrower float dtype is widened, and y rounded back. For x in a wider
/// dtype (f32 on bf16 weights, as candle's T5 has it) the weights are converted in each call: exact, but slow; convert them once
/// with [`SwiGluFfn::to_dtype`].
///
/// # Kernels
/// On the CPU, weights in f32, bf16 or f16 through which no gradient is tracked are packed once, each before the next is read,
/// and the packed copy is the only one that is kept. gate, up and the activation are one sweep over them, down a second; gate
/// and up are never written. On CUDA and Metal they are kept as they come, gate and up in one matrix. Everything else (weights
/// from a `VarMap`, f64) runs as candle's matmuls around [`crate::glu_mul`]. [`SwiGluFfn::kernel`] says which.
///
/// # Accuracy
/// Products are summed in f32 in the order of k, whatever the number of rows and threads, in parts of 128; h and y are rounded
/// once each. (f64 in f64; candle's matmuls round gate and up too.) `avx512bf16` and `neonbf16` in bf16 add pairs of products
/// without parts and take denormals for 0; ARM's instructions round such a sum within one unit in the last place of f32, not
/// half of one. The bounds are the same.
///
/// # Memory
/// Beyond y, a call borrows scratch of at most `rows·(H + I + 256)·a + threads·(rows·NR·4 B + 256 KiB)`, rows ≤ 512: longer inputs
/// go through in chunks. `a` is 2 B where the kernel multiplies bf16 as it is, else 4 B; NR ≤ 64. It is kept for the next call.
///
/// # Training
/// Every step is differentiable. Weights from a `VarMap` are used where they lie, so an optimizer's steps are seen; packed
/// weights are constants, through which x still gets its gradient.
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
#[derive(Clone, Debug)]
pub struct SwiGluFfn {
    cfg: FfnConfig,
    /// The implementation that runs the block, chosen when it is built.
    block: Arc<dyn Block>,
    span: tracing::Span,
}

/// The block that `cfg` describes, from the weights under `vb`'s prefix: [`SwiGluFfn::new`] in the style of candle-nn.
///
/// # Errors
/// As [`SwiGluFfn::new`].
pub fn swiglu_ffn(cfg: &FfnConfig, vb: VarBuilder) -> Result<SwiGluFfn> {
    SwiGluFfn::new(cfg, vb)
}

impl SwiGluFfn {
    /// Loads the weights under `vb`'s prefix (`model.layers.0.mlp`, `layers.0.feed_forward`, ...); their names and layout are
    /// detected, see [`crate::Family`]. From an empty `VarMap` they are created under the names of `Family::Llama`.
    ///
    /// # Errors
    /// A number of the config that makes no formula; a missing tensor, another shape, a dtype that is not a float or not that of the
    /// other weights; names that fit several families; a bias that the config does not ask for.
    ///
    /// A tensor of the block that it would not read (a norm between the projections, an adapter, a scale) is an error too. To a block
    /// belongs what is under its projections' names and what else is under the prefix, unless attention is there as well: then the
    /// prefix is that of a whole layer. A [`crate::Checkpoint`] knows all its tensors, and which of them were read before by the
    /// caller; in other sources of a `VarBuilder` names that are known from published checkpoints are looked up.
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
            return Err(Error::Rank { name: "gate_proj", expected: "rank 2 (I, H)", found: gate.dims().to_vec() });
        };
        let gate_up = GateUp::separate(gate, up, None, None);
        let weights = Weights::new(gate_up, down, None);
        Self::from_weights(&FfnConfig::new(hidden_size, intermediate_size), weights)
    }

    /// From tensors in any of the layouts of [`GateUp`], with the formula of `cfg`. Where they are not packed the tensors keep
    /// their storage; a view whose rows are not contiguous (every second row, say) is copied once, unless a gradient is tracked
    /// through it.
    ///
    /// # Errors
    /// As [`SwiGluFfn::from_tensors`], and biases where the config has none or none where it has them.
    pub fn from_weights(cfg: &FfnConfig, weights: Weights) -> Result<Self> {
        cfg.validate()?;
        weights.check(&cfg.wanted())?;
        Ok(Self::with_block(cfg, engine::build_block(&spec(cfg), weights)?))
    }

    fn with_block(cfg: &FfnConfig, block: Arc<dyn Block>) -> Self {
        Self { cfg: cfg.clone(), block, span: tracing::span!(tracing::Level::TRACE, "swiglu-ffn") }
    }

    /// The name of the kernel that will run: on the CPU the instruction set that is used for the dtype of the weights (one of
    /// [`crate::cpu_kernels`]; the environment variable `CANDLE_SWIGLU_KERNEL` forces one, and `avx512bf16` and `neonbf16` use
    /// `avx512` and `neon` for all dtypes but bf16), with `plain-` before it where only the gate is ours; on a GPU that has
    /// kernels of ours their name (`metal`, say), else `plain`.
    pub fn kernel(&self) -> &str {
        self.block.kernel()
    }

    /// The memory that holds packed weights, for benchmarks: a decode step reads all of it. Empty
    /// where nothing is packed on the CPU.
    #[doc(hidden)]
    pub fn packed_bytes(&self) -> Vec<&[u8]> {
        self.block.packed_bytes()
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

    /// The weights, as [`SwiGluFfn::from_weights`] takes them. A packed block unpacks them into new tensors, bit for bit as they
    /// were loaded, gate and up apart; any other block gives the tensors that it uses (those of a `VarMap`, say).
    ///
    /// # Errors
    /// None but candle's.
    pub fn weights(&self) -> Result<Weights> {
        Ok(self.block.weights()?)
    }

    /// The block with its weights as constants: one that was trained in a `VarMap` gets this device's kernels, and its weights no
    /// gradient any more. Later steps of an optimizer do not change it. A packed block is cloned, which copies nothing.
    ///
    /// ```
    /// use candle_core::{DType, Device};
    /// use candle_nn::{VarBuilder, VarMap};
    /// use candle_swiglu::{FfnConfig, swiglu_ffn};
    /// let vars = VarMap::new();
    /// let trained = swiglu_ffn(&FfnConfig::new(8, 24), VarBuilder::from_varmap(&vars, DType::F32, &Device::Cpu))?;
    /// assert!(trained.kernel().starts_with("plain"));
    /// assert!(!trained.freeze()?.kernel().starts_with("plain"));
    /// # Ok::<(), candle_swiglu::Error>(())
    /// ```
    ///
    /// # Errors
    /// None but candle's.
    pub fn freeze(&self) -> Result<Self> {
        if self.block.is_packed() {
            return Ok(self.clone());
        }
        Self::from_weights(&self.cfg, self.weights()?.map(|tensor| Ok(tensor.detach()))?)
    }

    /// The block with its weights in another float dtype.
    ///
    /// # Errors
    /// A dtype that is not a float.
    pub fn to_dtype(&self, dtype: DType) -> Result<Self> {
        if dtype == self.dtype() {
            return Ok(self.clone());
        }
        Self::from_weights(&self.cfg, self.weights()?.map(|tensor| tensor.to_dtype(dtype))?)
    }
}

impl Module for SwiGluFfn {
    fn forward(&self, x: &Tensor) -> candle_core::Result<Tensor> {
        let _enter = self.span.enter();
        let sizes = (self.cfg.hidden_size, self.cfg.hidden_size);
        let wide = |dtype| Ok(self.to_dtype(dtype)?);
        let weights = (self.dtype(), self.block.device());
        over_rows(self, x, sizes, weights, wide, |layer, rows| layer.block.forward(rows))
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
