//! The linear layer `y = x·Wᵀ + b`.

use std::sync::Arc;

use candle_core::{DType, Device, Tensor};
use candle_nn::{Module, VarBuilder};

use crate::check::{check_float, check_same};
use crate::engine::{self, Projection, over_rows, rows, wider};
use crate::error::{Error, Result};
use crate::load::{check_linear, load_projection};
use crate::lora::{Adapters, Lora};

mod adapters;

/// A linear layer `y = x·Wᵀ + b` with W (out, in) and an optional b (out).
///
/// # Shapes
/// x (…, in) of any rank ≥ 1 and any layout -> y (…, out) in x's dtype. x in another float dtype
/// than the weights is handled as in [`crate::SwiGluFfn`].
///
/// # Weights
/// On the CPU a weight in f32, bf16 or f16 through which no gradient is tracked is packed for the
/// kernels of this crate. The packed copy is the only one that the layer keeps, and x still gets
/// its gradient. A variable in these dtypes on the CPU (a `VarMap`'s, say) is read where it is by
/// the same microkernels, forward and backward, and any other weight by candle's matmul. A gradient
/// that the graph does not need is not computed.
///
/// # Accuracy
/// Packed weights and variables on the CPU: products are summed as in [`crate::SwiGluFfn`],
/// independent of the number of rows and threads, and y is rounded once.
///
/// ```
/// use candle_core::{Device, Tensor};
/// use candle_nn::Module;
/// let weight = Tensor::new(&[[1f32, 2.0], [3.0, 4.0], [5.0, 6.0]], &Device::Cpu)?;
/// let layer = candle_swiglu::Linear::new(weight, None)?;
/// let y = layer.forward(&Tensor::new(&[10f32, 100.0], &Device::Cpu)?)?;
/// assert_eq!(y.to_vec1::<f32>()?, [210.0, 430.0, 650.0]);
/// # Ok::<(), candle_core::Error>(())
/// ```
#[derive(Clone, Debug)]
pub struct Linear {
    out_dim: usize,
    in_dim: usize,
    /// The implementation that runs the layer, chosen when it is built.
    layer: Arc<dyn Projection>,
    adapters: Adapters<Lora, Arc<dyn Projection>>,
    span: tracing::Span,
}

/// A [`Linear`] whose `weight` (out_dim, in_dim) and `bias` (out_dim) are under `vb`'s prefix.
///
/// # Errors
/// No such tensor, or another shape.
pub fn linear(in_dim: usize, out_dim: usize, vb: VarBuilder) -> Result<Linear> {
    linear_b(in_dim, out_dim, true, vb)
}

/// A [`Linear`] whose `weight` (out_dim, in_dim) is under `vb`'s prefix.
///
/// # Errors
/// No such tensor, another shape, or a bias that would be ignored.
pub fn linear_no_bias(in_dim: usize, out_dim: usize, vb: VarBuilder) -> Result<Linear> {
    linear_b(in_dim, out_dim, false, vb)
}

/// [`linear`] or [`linear_no_bias`].
///
/// # Errors
/// As those.
pub fn linear_b(in_dim: usize, out_dim: usize, bias: bool, vb: VarBuilder) -> Result<Linear> {
    let (weight, bias) = load_projection(&vb, out_dim, in_dim, Some(bias))?;
    check_linear(&vb, "linear layer")?;
    Linear::new(weight, bias)
}

impl Linear {
    /// Loads `weight` (out_dim, in_dim) and, if it is there, `bias` (out_dim) under `vb`'s prefix.
    /// A `VarMap` gets no bias.
    ///
    /// # Errors
    /// No such tensor, or another shape.
    pub fn load(in_dim: usize, out_dim: usize, vb: VarBuilder) -> Result<Self> {
        let (weight, bias) = load_projection(&vb, out_dim, in_dim, None)?;
        check_linear(&vb, "linear layer")?;
        Self::new(weight, bias)
    }

    /// From weight (out, in) and bias (out), and with their gradients if they have any.
    ///
    /// # Errors
    /// Wrong rank, a size of zero, shapes that do not fit, a dtype that is not a float, mixed
    /// dtypes or devices.
    pub fn new(weight: Tensor, bias: Option<Tensor>) -> Result<Self> {
        let (out_dim, in_dim) = check_tensors(&weight, bias.as_ref())?;
        let layer = engine::projection(weight, bias)?;
        Ok(Self::with_layer((out_dim, in_dim), layer))
    }

    fn with_layer((out_dim, in_dim): (usize, usize), layer: Arc<dyn Projection>) -> Self {
        let span = tracing::span!(tracing::Level::TRACE, "linear");
        Self { out_dim, in_dim, layer, adapters: Adapters::new(), span }
    }

    /// W (out, in); unpacked into a new tensor if it is packed.
    ///
    /// # Errors
    /// None but candle's.
    pub fn weight(&self) -> Result<Tensor> {
        Ok(self.layer.weight()?)
    }

    /// b (out)
    ///
    /// # Errors
    /// None but candle's.
    pub fn bias(&self) -> Result<Option<Tensor>> {
        Ok(self.layer.bias()?)
    }

    /// The layer with its weights as constants: one that was trained in a `VarMap` gets this
    /// device's kernels, and its weights no gradient any more. A packed layer is cloned, which
    /// copies nothing.
    ///
    /// # Errors
    /// None but candle's.
    pub fn freeze(&self) -> Result<Self> {
        let frozen = match self.layer.is_packed() {
            true => self.clone(),
            false => {
                let bias = self.bias()?.as_ref().map(engine::constant).transpose()?;
                Self::new(engine::constant(&self.weight()?)?, bias)?
            }
        };
        frozen.with_adapters_of(self, Lora::frozen, |merged| Ok(merged.clone()))
    }

    /// The layer with its weights in another float dtype.
    ///
    /// # Errors
    /// A dtype that is not a float.
    pub fn to_dtype(&self, dtype: DType) -> Result<Self> {
        if dtype == self.dtype() {
            return Ok(self.clone());
        }
        let convert = |layer: &Arc<dyn Projection>| {
            let bias = layer.bias()?.map(|bias| bias.to_dtype(dtype)).transpose()?;
            engine::projection(layer.weight()?.to_dtype(dtype)?, bias)
        };
        let converted = Self::with_layer((self.out_dim, self.in_dim), convert(&self.layer)?);
        converted.with_adapters_of(self, |lora| Ok(lora.clone()), convert)
    }

    /// Rows of W: ids (…) in u8, u32 or i64 -> (…, in). With the weight that a model ties to its
    /// embedding, this is the embedding, and the model keeps one copy of it ([`crate::Embedding`]).
    ///
    /// ```
    /// use candle_core::{Device, Tensor};
    /// let weight = Tensor::new(&[[1f32, 2.0], [3.0, 4.0], [5.0, 6.0]], &Device::Cpu)?;
    /// let lm_head = candle_swiglu::Linear::new(weight, None)?;
    /// let x = lm_head.embed(&Tensor::new(&[2u32, 0], &Device::Cpu)?)?;
    /// assert_eq!(x.to_vec2::<f32>()?, [[5.0, 6.0], [1.0, 2.0]]);
    /// # Ok::<(), candle_core::Error>(())
    /// ```
    ///
    /// # Errors
    /// An id that is not a row of W; ids of another dtype.
    pub fn embed(&self, ids: &Tensor) -> Result<Tensor> {
        let mut dims = ids.dims().to_vec();
        dims.push(self.in_dim);
        let flat = check_ids(&ids.flatten_all()?, self.out_dim)?;
        Ok(self.layer.embed(&flat)?.reshape(dims)?)
    }

    /// The name of the kernel that runs the layer: as [`crate::SwiGluFfn::kernel`], but always
    /// `plain` for candle's matmul.
    pub fn kernel(&self) -> &str {
        self.running().kernel()
    }

    /// y = x·Wᵀ + b in f32: the result of [`Module::forward`] before it is rounded to the dtype of
    /// W. For the logits of a head.
    ///
    /// # Shapes
    /// x (…, in) -> y (…, out), f32.
    ///
    /// # Accuracy
    /// On the CPU the f32 sums are not rounded. On a GPU they are rounded to the dtype of W first.
    ///
    /// # Errors
    /// As [`Module::forward`]; weights in f64.
    ///
    /// ```
    /// use candle_core::{DType, Device, Tensor};
    /// let weight = Tensor::new(&[[1f32, 1.0]], &Device::Cpu)?.to_dtype(DType::BF16)?;
    /// let head = candle_swiglu::Linear::new(weight, None)?;
    /// let x = Tensor::new(&[[256f32, 1.0]], &Device::Cpu)?.to_dtype(DType::BF16)?;
    /// assert_eq!(head.forward_f32(&x)?.to_vec2::<f32>()?, [[257.0]]); // bf16 has no 257
    /// # Ok::<(), candle_core::Error>(())
    /// ```
    pub fn forward_f32(&self, x: &Tensor) -> candle_core::Result<Tensor> {
        if self.dtype() == DType::F64 {
            let (name, location) = ("weight of an f32 output".to_string(), None);
            return Err(Error::DTypeUnsupported { name, found: "f64".into(), location }.into());
        }
        check_float("x", x)?;
        let wide = wider(x.dtype(), self.dtype());
        if wide != self.dtype() {
            return self.forward(&x.to_dtype(wide)?)?.to_dtype(DType::F32);
        }
        let _enter = self.span.enter();
        let x = x.to_dtype(wide)?;
        let sizes = (self.in_dim, self.out_dim);
        let y = rows(&x, sizes, self.dtype(), self.layer.device(), |rows| {
            self.running().forward_f32(rows)
        })?;
        y.to_dtype(DType::F32) // an empty x gives an empty y in x's dtype
    }

    fn dtype(&self) -> DType {
        self.layer.dtype()
    }
}

impl Module for Linear {
    fn forward(&self, x: &Tensor) -> candle_core::Result<Tensor> {
        let _enter = self.span.enter();
        let sizes = (self.in_dim, self.out_dim);
        let wide = |dtype| Ok(self.to_dtype(dtype)?);
        let weights = (self.dtype(), self.layer.device());
        over_rows(self, x, sizes, weights, wide, |linear, rows| linear.running().forward(rows))
    }
}

/// ids (n), on a GPU unchanged; on the CPU as u32, after a check that each is one of `rows` rows.
fn check_ids(ids: &Tensor, rows: usize) -> Result<Tensor> {
    if !matches!(ids.dtype(), DType::U8 | DType::U32 | DType::I64) {
        return Err(Error::IdsDType { found: ids.dtype() });
    }
    if !ids.device().is_cpu() {
        return Ok(ids.clone());
    }
    let wide = ids.to_dtype(DType::I64)?.to_vec1::<i64>()?;
    let narrow = |row: i64| match u32::try_from(row) {
        Ok(id) if (id as usize) < rows => Ok(id),
        _ => Err(Error::RowOutOfRange { row, rows }),
    };
    let ids = wide.into_iter().map(narrow).collect::<Result<Vec<u32>>>()?;
    Ok(Tensor::new(ids, &Device::Cpu)?)
}

/// (out, in), if the shapes, dtypes and devices of the tensors agree.
fn check_tensors(weight: &Tensor, bias: Option<&Tensor>) -> Result<(usize, usize)> {
    let Ok((out_dim, in_dim)) = weight.dims2() else {
        return Err(Error::Rank {
            name: "weight",
            expected: "rank 2 (out, in)",
            found: weight.dims().to_vec(),
        });
    };
    for (name, size) in [("out_dim", out_dim), ("in_dim", in_dim)] {
        if size == 0 {
            return Err(Error::ZeroSize { name });
        }
    }
    check_float("weight", weight)?;
    if let Some(bias) = bias {
        if bias.dims() != [out_dim] {
            let found = bias.dims().to_vec();
            return Err(Error::Shape {
                name: "bias".into(),
                expected: vec![out_dim],
                found,
                location: None,
            });
        }
        check_same("bias", bias, "weight", weight)?;
    }
    Ok((out_dim, in_dim))
}
