//! The fused gate of a gated linear unit, `out = act(gate) ⊙ up`, as one differentiable operation.
//!
//! On the CPU, on CUDA and on Metal forward and backward are one pass each over operands of any
//! layout, in f32 inside (f64 for f64) with one rounding. Only the inputs are kept for the backward
//! pass. A device without such kernels computes the same formula by candle's differentiable
//! operations.

use candle_core::{CpuStorage, CustomOp2, CustomOp3, DType, Layout, Shape, Tensor};

use crate::backend::has_glu;
use crate::check::{check_float, check_same};
use crate::cpu;
use crate::error::{Error, Result};
use crate::gate::{Glu, GluActivation, pair_of};

/// `act(gate) ⊙ up` for a pair of equal shape: SwiGLU, GLU, ReGLU, GEGLU, the bilinear unit and the
/// other activations of [`GluActivation`].
///
/// # Shapes
/// gate (…), up (…) -> (…), of any rank, any layout (strided, transposed, broadcast, empty), dtype
/// f16, bf16, f32 or f64.
///
/// # Errors
/// Shapes, dtypes or devices that differ; a dtype that is not a float.
///
/// # Accuracy
/// On the CPU each element is computed in f32 (f64 for f64) from exactly widened inputs and rounded
/// once. In f32 the result is within 8·2⁻²⁴ relative of the exact value for SiLU; other activations
/// in [`GluActivation`]'s order: Swish (8 + |βg|)·2⁻²⁴, Sigmoid 8, ReLU and Identity 1, squared
/// ReLU 2, GELU 14, tanh GELU 8 + 4·|1.6g + 0.0714g³| units of 2⁻²⁴. NaN and ±∞ propagate as in the
/// exact product, and `silu(-∞)` is -0. Eager PyTorch and candle round `act(gate)` to the dtype
/// before the product instead.
///
/// # Gradient
/// `dgate = dy ⊙ up ⊙ act'(gate)`, `dup = dy ⊙ act(gate)`, recomputed from the inputs. A second
/// derivative on the CPU is an error, never silently zero.
///
/// ```
/// use candle_core::{Device, Tensor};
/// use candle_swiglu::{glu_mul, GluActivation};
/// let gate = Tensor::new(&[-1f32, 0.5, 2.0], &Device::Cpu)?;
/// let up = Tensor::new(&[3f32, 4.0, 5.0], &Device::Cpu)?;
/// assert_eq!(glu_mul(GluActivation::Relu, &gate, &up)?.to_vec1::<f32>()?, [0.0, 2.0, 10.0]);
/// # Ok::<(), candle_swiglu::Error>(())
/// ```
pub fn glu_mul(activation: GluActivation, gate: &Tensor, up: &Tensor) -> Result<Tensor> {
    Glu::new(activation).mul(gate, up)
}

/// `silu(gate) ⊙ up = gate·σ(gate) ⊙ up`: [`glu_mul`] with [`GluActivation::Silu`].
///
/// ```
/// use candle_core::{Device, Tensor};
/// let gate = Tensor::new(&[0f32, 100.0], &Device::Cpu)?;
/// let up = Tensor::new(&[7f32, 2.0], &Device::Cpu)?;
/// assert_eq!(candle_swiglu::silu_mul(&gate, &up)?.to_vec1::<f32>()?, [0.0, 200.0]);
/// # Ok::<(), candle_swiglu::Error>(())
/// ```
pub fn silu_mul(gate: &Tensor, up: &Tensor) -> Result<Tensor> {
    glu_mul(GluActivation::Silu, gate, up)
}

impl Glu {
    /// Applies the operation; shapes, errors, accuracy and gradient as [`glu_mul`], and the errors
    /// of [`Self::validate`].
    pub fn mul(&self, gate: &Tensor, up: &Tensor) -> Result<Tensor> {
        self.validate()?;
        check_pair(gate, up)?;
        if has_glu(gate.device(), gate.dtype()) {
            Ok(gate.apply_op2(up, *self)?)
        } else {
            Ok(self.compose(gate, up)?)
        }
    }

    /// dgate and dup under dy, where the device has the fused gate.
    pub(crate) fn gradients(
        &self,
        gate: &Tensor,
        up: &Tensor,
        dy: &Tensor,
    ) -> candle_core::Result<(Tensor, Tensor)> {
        let gradients = gate.apply_op3(up, dy, GluGradient(*self))?;
        Ok((gradients.get(0)?, gradients.get(1)?))
    }

    /// The same formula in candle's operations, computed in f32 for f16 and bf16; differentiable on
    /// every device.
    pub(crate) fn compose(&self, gate: &Tensor, up: &Tensor) -> candle_core::Result<Tensor> {
        let dtype = gate.dtype();
        let wide = if dtype == DType::F64 { dtype } else { DType::F32 };
        let (mut gate, mut up) = (gate.to_dtype(wide)?, up.to_dtype(wide)?);
        if !self.is_plain() {
            gate = bound_above(&(gate * f64::from(self.gate_multiplier))?, self.limit)?;
            up = bound_above(&up, self.limit)?;
            up = bound_above(&up.neg()?, self.limit)?.affine(-1.0, f64::from(self.up_offset))?;
        }
        (compose_activation(self.activation, &gate)? * up)?.to_dtype(dtype)
    }
}

/// min(x, limit), keeping NaN
fn bound_above(x: &Tensor, limit: Option<f32>) -> candle_core::Result<Tensor> {
    match limit {
        None => Ok(x.clone()),
        Some(limit) => {
            x.ge(f64::from(limit))?.where_cond(&x.ones_like()?.affine(f64::from(limit), 0.0)?, x)
        }
    }
}

fn compose_activation(activation: GluActivation, gate: &Tensor) -> candle_core::Result<Tensor> {
    match activation {
        GluActivation::Silu => times_sigmoid(gate, 1.0),
        GluActivation::Swish { beta } => times_sigmoid(gate, f64::from(beta)),
        GluActivation::Sigmoid => compose_sigmoid(gate),
        GluActivation::Relu => gate.relu(),
        GluActivation::Gelu => gate.gelu_erf(),
        GluActivation::GeluTanh => gate.gelu(),
        GluActivation::Identity => Ok(gate.clone()),
        GluActivation::Relu2 => gate.relu()?.sqr(),
    }
}

/// g·σ(βg), with the factor g bounded from below where σ has vanished, so that -∞ does not give
/// NaN.
fn times_sigmoid(gate: &Tensor, beta: f64) -> candle_core::Result<Tensor> {
    let bounded = bound_above(&gate.neg()?, Some(1e4))?.neg()?;
    bounded.mul(&compose_sigmoid(&(bounded.clone() * beta)?)?)
}

/// 1 / (1 + e^-max(z, -80)): e^80 is finite in f32, so neither the value nor the gradient
/// overflows.
fn compose_sigmoid(z: &Tensor) -> candle_core::Result<Tensor> {
    let minus_z = bound_above(&z.neg()?, Some(80.0))?;
    (minus_z.exp()? + 1.0)?.recip()
}

/// Equal shapes, dtypes and devices, and a dtype the kernels know.
fn check_pair(gate: &Tensor, up: &Tensor) -> Result<()> {
    for (name, tensor) in [("gate", gate), ("up", up)] {
        check_float(name, tensor)?;
    }
    if gate.shape() != up.shape() {
        let (expected, found) = (gate.dims().to_vec(), up.dims().to_vec());
        return Err(Error::Shape { name: "up".into(), expected, found, location: None });
    }
    check_same("up", up, "gate", gate)
}

/// The forward operation as candle sees it.
impl CustomOp2 for Glu {
    fn name(&self) -> &'static str {
        "glu_mul"
    }

    fn cpu_fwd(
        &self,
        s1: &CpuStorage,
        l1: &Layout,
        s2: &CpuStorage,
        l2: &Layout,
    ) -> candle_core::Result<(CpuStorage, Shape)> {
        Ok((cpu::gate_forward(cpu::selected()?, self, (s1, l1), (s2, l2))?, l1.shape().clone()))
    }

    #[cfg(feature = "metal")]
    fn metal_fwd(
        &self,
        s1: &candle_core::MetalStorage,
        l1: &Layout,
        s2: &candle_core::MetalStorage,
        l2: &Layout,
    ) -> candle_core::Result<(candle_core::MetalStorage, Shape)> {
        crate::metal::gate_forward(self, [(s1, l1), (s2, l2)])
    }

    #[cfg(feature = "cuda")]
    fn cuda_fwd(
        &self,
        s1: &candle_core::CudaStorage,
        l1: &Layout,
        s2: &candle_core::CudaStorage,
        l2: &Layout,
    ) -> candle_core::Result<(candle_core::CudaStorage, Shape)> {
        Ok((crate::cuda::gate_forward(self, [(s1, l1), (s2, l2)])?, l1.shape().clone()))
    }

    fn bwd(
        &self,
        gate: &Tensor,
        up: &Tensor,
        _out: &Tensor,
        dy: &Tensor,
    ) -> candle_core::Result<(Option<Tensor>, Option<Tensor>)> {
        let (dgate, dup) = self.gradients(gate, up, dy)?;
        Ok((Some(dgate), Some(dup)))
    }
}

/// gate, up, dy (…) -> (2, …): dgate, then dup. Its own `bwd` is candle's default: an error, not a
/// silent zero.
struct GluGradient(Glu);

impl CustomOp3 for GluGradient {
    fn name(&self) -> &'static str {
        "glu_mul gradient"
    }

    fn cpu_fwd(
        &self,
        s1: &CpuStorage,
        l1: &Layout,
        s2: &CpuStorage,
        l2: &Layout,
        s3: &CpuStorage,
        l3: &Layout,
    ) -> candle_core::Result<(CpuStorage, Shape)> {
        let storage =
            cpu::gate_backward(cpu::selected()?, &self.0, [(s1, l1), (s2, l2), (s3, l3)])?;
        Ok((storage, pair_of(l1)))
    }

    #[cfg(feature = "cuda")]
    fn cuda_fwd(
        &self,
        s1: &candle_core::CudaStorage,
        l1: &Layout,
        s2: &candle_core::CudaStorage,
        l2: &Layout,
        s3: &candle_core::CudaStorage,
        l3: &Layout,
    ) -> candle_core::Result<(candle_core::CudaStorage, Shape)> {
        let storage = crate::cuda::gate_backward(&self.0, [(s1, l1), (s2, l2), (s3, l3)])?;
        Ok((storage, pair_of(l1)))
    }

    #[cfg(feature = "metal")]
    fn metal_fwd(
        &self,
        s1: &candle_core::MetalStorage,
        l1: &Layout,
        s2: &candle_core::MetalStorage,
        l2: &Layout,
        s3: &candle_core::MetalStorage,
        l3: &Layout,
    ) -> candle_core::Result<(candle_core::MetalStorage, Shape)> {
        crate::metal::gate_backward(&self.0, [(s1, l1), (s2, l2), (s3, l3)])
    }
}
