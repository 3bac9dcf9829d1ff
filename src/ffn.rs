//! The block.

use candle_core::{D, DType, Device, Tensor};
use candle_nn::{Module, VarBuilder};

use crate::activation::Glu;
use crate::config::FfnConfig;
use crate::cpu::{self, Part};
use crate::error::{Error, Result};
use crate::family::PackedOrder;
use crate::glu::{check_float, check_like, check_same};
use crate::linear::{Linear, over_rows};
use crate::packed::{Packed, Packer, Sizes, can_pack, has_kernels};
use crate::weights::{GateUp, Piece, Weights, packed_bias};

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
#[doc(alias("Mlp", "FeedForward", "geglu"))]
#[derive(Clone, Debug)]
pub struct SwiGluFfn {
    cfg: FfnConfig,
    dtype: DType,
    device: Device,
    form: Form,
    kernel: String,
    span: tracing::Span,
}

/// The block that `cfg` describes, from the weights under `vb`'s prefix: [`SwiGluFfn::new`] in the style of candle-nn.
///
/// # Errors
/// As [`SwiGluFfn::new`].
pub fn swiglu_ffn(cfg: &FfnConfig, vb: VarBuilder) -> Result<SwiGluFfn> {
    SwiGluFfn::new(cfg, vb)
}

/// Who computes it.
#[derive(Clone, Debug)]
#[allow(clippy::large_enum_variant, reason = "one per layer; with Metal a device is many handles")]
enum Form {
    /// Our kernels.
    Packed(Packed),
    /// candle's matmuls around the fused gate.
    Plain { gate_up: Box<Projections>, glu: Glu, down: Linear, down_multiplier: f32 },
}

/// gate and up, by two products or by one
#[derive(Clone, Debug)]
enum Projections {
    Separate { gate: Linear, up: Linear },
    Packed { gate_up: Linear, order: PackedOrder },
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
        let mut builder = None;
        Weights::load_each(cfg, &vb, |piece| {
            // The tensors decide about the dtype: those of a `VarMap` may have another one than the builder.
            builder.get_or_insert_with(|| Builder::new(cfg, piece.weight())).take(piece)
        })?;
        builder.ok_or_else(|| message("a block needs gate, up and down weights, found none"))?.finish()
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
        check_weights(cfg, &weights)?;
        let mut builder = Builder::new(cfg, &weights.down_proj);
        let pieces = weights.into_pieces();
        builder.may_pack &= pieces.iter().flat_map(Piece::tensors).all(can_pack);
        pieces.into_iter().try_for_each(|piece| builder.take(piece))?;
        builder.finish()
    }

    /// The name of the kernel that will run: on the CPU the instruction set that is used for the dtype of the weights (one of
    /// [`crate::cpu_kernels`]; the environment variable `CANDLE_SWIGLU_KERNEL` forces one, and `avx512bf16` and `neonbf16` use
    /// `avx512` and `neon` for all dtypes but bf16), with `plain-` before it where only the gate is ours; on a GPU that has
    /// kernels of ours their name (`metal`, say), else `plain`.
    pub fn kernel(&self) -> &str {
        &self.kernel
    }

    /// Reads the packed weights once with all threads, for benchmarks: what a decode step is measured against. Each thread reads
    /// in order (1 stream), or 4 streams side by side; processors differ in which is faster. The sum of the weights' 32-bit words, 0
    /// where nothing is packed.
    #[doc(hidden)]
    pub fn read_weights(&self, streams: usize) -> u32 {
        match &self.form {
            Form::Packed(packed) => packed.read(streams),
            Form::Plain { .. } => 0,
        }
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
        self.dtype
    }

    /// The weights, as [`SwiGluFfn::from_weights`] takes them. A packed block unpacks them into new tensors, bit for bit as they
    /// were loaded, gate and up apart; any other block gives the tensors that it uses (those of a `VarMap`, say).
    ///
    /// # Errors
    /// None but candle's.
    pub fn weights(&self) -> Result<Weights> {
        let (gate_up, down) = match &self.form {
            Form::Packed(packed) => return self.unpacked(packed),
            Form::Plain { gate_up, down, .. } => (gate_up, down),
        };
        let gate_up = match &**gate_up {
            Projections::Separate { gate, up } => GateUp::separate(gate.weight()?, up.weight()?, gate.bias()?, up.bias()?),
            Projections::Packed { gate_up, order } => GateUp::packed(gate_up.weight()?, gate_up.bias()?, *order),
        };
        Ok(Weights::new(gate_up, down.weight()?, down.bias()?))
    }

    fn unpacked(&self, packed: &Packed) -> Result<Weights> {
        let biases = self.cfg.biases;
        // gate and up share one buffer of biases: where only one of them has a bias, the other's zeros are not given back.
        let bias = |part, exists: bool| if exists { packed.bias(part) } else { Ok(None) };
        let gate_up = GateUp::separate(
            packed.weight(Part::Gate)?,
            packed.weight(Part::Up)?,
            bias(Part::Gate, biases.gate)?,
            bias(Part::Up, biases.up)?,
        );
        Ok(Weights::new(gate_up, packed.weight(Part::Down)?, bias(Part::Down, biases.down)?))
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
        match &self.form {
            Form::Packed(_) => Ok(self.clone()),
            Form::Plain { .. } => Self::from_weights(&self.cfg, self.weights()?.map(|tensor| Ok(tensor.detach()))?),
        }
    }

    /// The block with its weights in another float dtype.
    ///
    /// # Errors
    /// A dtype that is not a float.
    pub fn to_dtype(&self, dtype: DType) -> Result<Self> {
        if dtype == self.dtype {
            return Ok(self.clone());
        }
        Self::from_weights(&self.cfg, self.weights()?.map(|tensor| tensor.to_dtype(dtype))?)
    }

    /// x (M,H) -> y (M,H)
    fn forward_rows(&self, x: &Tensor) -> candle_core::Result<Tensor> {
        let (gate_up, glu, down, down_multiplier) = match &self.form {
            Form::Packed(packed) => return packed.forward(x),
            Form::Plain { gate_up, glu, down, down_multiplier } => (gate_up, glu, down, *down_multiplier),
        };
        let (gate, up) = gate_up.forward(x)?; // (M,I) each
        let h = glu.mul(&gate, &up)?;
        drop((gate, up));
        let y = down.project(&h)?;
        if down_multiplier == 1.0 { Ok(y) } else { y * f64::from(down_multiplier) }
    }
}

impl Module for SwiGluFfn {
    fn forward(&self, x: &Tensor) -> candle_core::Result<Tensor> {
        let _enter = self.span.enter();
        let sizes = (self.cfg.hidden_size, self.cfg.hidden_size);
        let wide = |dtype| Ok(self.to_dtype(dtype)?);
        over_rows(self, x, sizes, (self.dtype, &self.device), wide, Self::forward_rows)
    }
}

/// A block while its weights arrive.
struct Builder<'a> {
    cfg: &'a FfnConfig,
    dtype: DType,
    device: Device,
    /// Whether this device and dtype have kernels for packed weights.
    may_pack: bool,
    /// Collects weights that can be packed. Created with the first one, after its shape has been checked.
    packer: Option<Packer>,
    packed: Vec<Part>,
    /// Weights that stay unpacked.
    pieces: Vec<Piece>,
}

impl<'a> Builder<'a> {
    /// A block in the dtype and on the device of this weight, its first.
    fn new(cfg: &'a FfnConfig, first: &Tensor) -> Self {
        let (dtype, device) = (first.dtype(), first.device().clone());
        Self { cfg, dtype, may_pack: has_kernels(&device, dtype), device, packer: None, packed: vec![], pieces: vec![] }
    }

    fn take(&mut self, piece: Piece) -> Result<()> {
        for (name, tensor) in piece.named() {
            check_like(name, tensor, "the block's first weight", self.dtype, &self.device)?;
        }
        let can_pack = self.may_pack && piece.tensors().all(can_pack);
        if can_pack && self.packer.is_none() {
            self.packer = Packer::new(self.sizes(), self.dtype, &self.device)?;
        }
        let Some(packer) = self.packer.as_mut().filter(|_| can_pack) else {
            self.pieces.push(piece);
            return Ok(());
        };
        match &piece {
            Piece::Gate(weight, bias) => packer.set(Part::Gate, weight, bias.as_ref())?,
            Piece::Up(weight, bias) => packer.set(Part::Up, weight, bias.as_ref())?,
            Piece::Down(weight, bias) => packer.set(Part::Down, weight, bias.as_ref())?,
            Piece::GateUp(weight, bias, order) => packer.set_gate_up(weight, bias.as_ref(), *order)?,
        }
        self.packed.extend(match piece {
            Piece::Gate(..) => &[Part::Gate][..],
            Piece::Up(..) => &[Part::Up],
            Piece::Down(..) => &[Part::Down],
            Piece::GateUp(..) => &[Part::Gate, Part::Up],
        });
        Ok(())
    }

    fn sizes(&self) -> Sizes {
        let (hidden_size, intermediate_size) = (self.cfg.hidden_size, self.cfg.intermediate_size);
        Sizes::Block { hidden_size, intermediate_size, glu: self.cfg.glu(), down_multiplier: self.cfg.down_multiplier }
    }

    fn finish(mut self) -> Result<SwiGluFfn> {
        let cfg = self.cfg;
        let packer = self.packer.take();
        let form = match packer {
            Some(packer) if self.pieces.is_empty() => Form::Packed(packer.finish()?),
            packer => {
                // Some tracked and some not: those that were packed are constants of the plain form.
                let unpacked = packer.map_or(Ok(vec![]), |packer| packer.unpack(&self.packed))?;
                // gate and up share one buffer of biases: where only one of them has a bias, the other's zeros are left out.
                self.pieces.extend(unpacked.into_iter().map(|(part, weight, bias)| match part {
                    Part::Gate => Piece::Gate(weight, bias.filter(|_| cfg.biases.gate)),
                    Part::Up => Piece::Up(weight, bias.filter(|_| cfg.biases.up)),
                    Part::Down | Part::Whole => Piece::Down(weight, bias),
                }));
                let (gate_up, down) = plain(self.pieces)?;
                Form::Plain { gate_up: Box::new(gate_up), glu: cfg.glu(), down, down_multiplier: cfg.down_multiplier }
            }
        };
        let kernel = match (&form, self.device.is_cpu()) {
            (Form::Packed(packed), _) => packed.kernel()?.to_string(),
            (_, true) => format!("plain-{}", cpu::selected()?.name_of(DType::F32)),
            (_, false) => "plain".to_string(),
        };
        let (dtype, device) = (self.dtype, self.device);
        let span = tracing::span!(tracing::Level::TRACE, "swiglu-ffn");
        Ok(SwiGluFfn { cfg: cfg.clone(), dtype, device, form, kernel, span })
    }
}

/// The projections of the plain form.
fn plain(pieces: Vec<Piece>) -> Result<(Projections, Linear)> {
    let (mut gate, mut up, mut gate_up, mut down) = (None, None, None, None);
    for piece in pieces {
        match piece {
            Piece::Gate(weight, bias) => gate = Some(Linear::plain(weight, bias)?),
            Piece::Up(weight, bias) => up = Some(Linear::plain(weight, bias)?),
            Piece::GateUp(weight, bias, order) => gate_up = Some((Linear::plain(weight, bias)?, order)),
            Piece::Down(weight, bias) => down = Some(Linear::plain(weight, bias)?),
        }
    }
    let projections = match (gate, up, gate_up) {
        (Some(gate), Some(up), None) => Some(Projections::Separate { gate, up }),
        (None, None, Some((gate_up, order))) => Some(Projections::Packed { gate_up, order }),
        _ => None,
    };
    let all = projections.zip(down);
    all.ok_or_else(|| message("a block needs gate, up and down weights, found others"))
}

impl Projections {
    /// x (M,H) -> gate (M,I), up (M,I); views of one product when packed
    fn forward(&self, x: &Tensor) -> candle_core::Result<(Tensor, Tensor)> {
        let (gate_up, order) = match self {
            Self::Separate { gate, up } => return Ok((gate.project(x)?, up.project(x)?)),
            Self::Packed { gate_up, order } => (gate_up.project(x)?, order), // (M,2I)
        };
        let i = gate_up.dim(D::Minus1)? / 2;
        let half = |start| gate_up.narrow(D::Minus1, start, i);
        match order {
            PackedOrder::GateFirst => Ok((half(0)?, half(i)?)),
            PackedOrder::UpFirst => Ok((half(i)?, half(0)?)),
            PackedOrder::Interleaved => {
                let pairs = gate_up.reshape(((), i, 2))?;
                Ok((pairs.narrow(2, 0, 1)?.squeeze(2)?, pairs.narrow(2, 1, 1)?.squeeze(2)?))
            }
        }
    }
}

fn message(text: &str) -> Error {
    Error::Candle(candle_core::Error::Msg(text.into()))
}

fn check_weights(cfg: &FfnConfig, weights: &Weights) -> Result<()> {
    for (name, tensor, expected) in weights.expected(cfg) {
        if tensor.rank() != expected.len() {
            let expected = if expected.len() == 2 { "rank 2 (out, in)" } else { "rank 1 (out)" };
            return Err(Error::Rank { name, expected, found: tensor.dims().to_vec() });
        }
        if tensor.dims() != expected {
            return Err(Error::Shape { name: name.to_string(), expected, found: tensor.dims().to_vec(), location: None });
        }
        check_float(name, tensor)?;
        check_same(name, tensor, "down_proj", &weights.down_proj)?;
    }
    check_biases(cfg, weights)
}

fn check_biases(cfg: &FfnConfig, weights: &Weights) -> Result<()> {
    let biases = cfg.biases;
    let gate_up = match &weights.gate_up {
        GateUp::Separate { gate_bias, up_bias, .. } => {
            vec![("gate_proj", gate_bias, biases.gate), ("up_proj", up_bias, biases.up)]
        }
        GateUp::Packed { bias, .. } => vec![("gate_up_proj", bias, packed_bias(biases)?)],
    };
    for (name, bias, expected) in gate_up.into_iter().chain([("down_proj", &weights.down_bias, biases.down)]) {
        match bias {
            Some(_) if !expected => return Err(Error::UnexpectedBias { name: format!("{name}.bias") }),
            None if expected => {
                let tried = vec![format!("{name}.bias")];
                return Err(Error::MissingTensor {
                    prefix: String::new(),
                    tried,
                    present: Box::default(),
                    suggestions: Box::default(),
                    location: None,
                });
            }
            _ => {}
        }
    }
    Ok(())
}
