//! The low-rank pair of one projection.

use candle_core::{Device, Tensor};
use candle_nn::{Init, VarBuilder};

use super::config::LoraConfig;
use crate::check::{check_float, check_same};
use crate::error::{Error, Result};
use crate::load::get;

/// The adapter of a projection W (out,in): `y = x·Wᵀ + s·(x·Aᵀ)·Bᵀ` with A (r,in) and B (out,r).
///
/// ```
/// use candle_core::{Device, Tensor};
/// use candle_swiglu::Lora;
/// let a = Tensor::new(&[[1f32, 2.0, 3.0]], &Device::Cpu)?; // (1,3)
/// let b = Tensor::new(&[[10f32], [100.0]], &Device::Cpu)?; // (2,1)
/// let lora = Lora::new(a, b, 0.5, 0.0)?;
/// assert_eq!(lora.delta()?.to_vec2::<f32>()?, [[5.0, 10.0, 15.0], [50.0, 100.0, 150.0]]);
/// # Ok::<(), candle_core::Error>(())
/// ```
#[derive(Clone, Debug)]
pub struct Lora {
    /// A (r,in)
    pub(crate) a: Tensor,
    /// B (out,r)
    pub(crate) b: Tensor,
    /// s
    pub(crate) scale: f64,
    /// The probability of dropping an element of x before A in training.
    pub(crate) dropout: f32,
}

impl Lora {
    /// The pair A (r,in) and B (out,r) with the scale s and the dropout of training. Neither is
    /// copied, so variables stay variables.
    ///
    /// # Errors
    /// Another rank than 2; different r; a size of zero; a dtype that is not a float; different
    /// dtypes or devices; a scale that is not finite; a dropout outside 0 to 1.
    pub fn new(a: Tensor, b: Tensor, scale: f64, dropout: f32) -> Result<Self> {
        for (name, tensor) in [("lora_A", &a), ("lora_B", &b)] {
            if tensor.rank() != 2 {
                let (expected, found) = ("rank 2", tensor.dims().to_vec());
                return Err(Error::Rank { name, expected, found });
            }
            if tensor.elem_count() == 0 {
                return Err(Error::ZeroSize { name });
            }
            check_float(name, tensor)?;
        }
        let (r, out_dim) = (a.dim(0)?, b.dim(0)?);
        if b.dim(1)? != r {
            let (expected, found) = (vec![out_dim, r], b.dims().to_vec());
            let name = "lora_B".to_string();
            return Err(Error::Shape { name, expected, found, location: None });
        }
        check_same("lora_B", &b, "lora_A", &a)?;
        let invalid = |field: &str, expected, found: String| {
            Err(Error::InvalidField { field: field.to_string(), expected, found })
        };
        if !scale.is_finite() {
            return invalid("scale", "a finite number", scale.to_string());
        }
        if !(0.0..=1.0).contains(&dropout) {
            return invalid("lora_dropout", "a number from 0 to 1", dropout.to_string());
        }
        Ok(Self { a, b, scale, dropout })
    }

    /// The pair for the module of this name, with `lora_A.weight` and `lora_B.weight` under `vb`'s
    /// prefix. In a `VarMap` they become variables with PEFT's initialisation: A uniform in
    /// ±1/√in_dim, B zero, so that an untrained adapter changes nothing.
    ///
    /// # Errors
    /// As [`Lora::new`] and [`LoraConfig::rank`]; a tensor that is missing or has another shape.
    pub fn init(
        in_dim: usize,
        out_dim: usize,
        config: &LoraConfig,
        module: &str,
        vb: VarBuilder,
    ) -> Result<Self> {
        config.validate()?;
        let sizes = [("in_dim", in_dim), ("out_dim", out_dim)];
        if let Some((name, _)) = sizes.into_iter().find(|(_, size)| *size == 0) {
            return Err(Error::ZeroSize { name });
        }
        let r = config.rank(module)?;
        // Kaiming's uniform bound for a slope of √5: √(6 / ((1 + 5)·in)).
        let bound = 1.0 / (in_dim as f64).sqrt();
        let uniform = Init::Uniform { lo: -bound, up: bound };
        let a = get(&vb, &[r, in_dim], "lora_A.weight", uniform)?;
        let b = get(&vb, &[out_dim, r], "lora_B.weight", Init::Const(0.0))?;
        Self::new(a, b, config.scaling(module)?, config.lora_dropout as f32)
    }

    /// A (r,in)
    pub fn a(&self) -> &Tensor {
        &self.a
    }

    /// B (out,r)
    pub fn b(&self) -> &Tensor {
        &self.b
    }

    /// The scale s.
    pub fn scale(&self) -> f64 {
        self.scale
    }

    /// The probability of dropping an element of x before A in training.
    pub fn dropout(&self) -> f32 {
        self.dropout
    }

    /// The same pair that drops nothing.
    pub(crate) fn without_dropout(&self) -> Self {
        Self { dropout: 0.0, ..self.clone() }
    }

    /// The present values of the pair, as constants in memory of their own.
    pub(crate) fn frozen(&self) -> Result<Self> {
        Ok(Self { a: self.a.detach().copy()?, b: self.b.detach().copy()?, ..self.clone() })
    }

    /// (out, r, in)
    pub(crate) fn sizes(&self) -> Result<(usize, usize, usize)> {
        let (r, in_dim) = self.a.dims2()?;
        Ok((self.b.dim(0)?, r, in_dim))
    }

    /// # Errors
    /// Other sizes than those of a projection in_dim -> out_dim, or another device. `names` are
    /// those of A and B in messages.
    pub(crate) fn check_fits(
        &self,
        names: [&'static str; 2],
        (in_dim, out_dim): (usize, usize),
        device: &Device,
    ) -> Result<()> {
        let (_, r, _) = self.sizes()?;
        let expected = [vec![r, in_dim], vec![out_dim, r]];
        for ((name, tensor), expected) in names.into_iter().zip([&self.a, &self.b]).zip(expected) {
            if tensor.dims() != expected {
                let (name, found) = (name.to_string(), tensor.dims().to_vec());
                return Err(Error::Shape { name, expected, found, location: None });
            }
            let (expected, found) = (device.location(), tensor.device().location());
            if expected != found {
                let other = "the weights";
                return Err(Error::DeviceMismatch { name, other, expected, found });
            }
        }
        Ok(())
    }
}
