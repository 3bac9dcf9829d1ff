//! The feed-forward blocks of the table in Shazeer's article, at equal parameters.

use std::sync::Arc;

use candle_core::{DType, Device, Result};
use candle_nn::{VarBuilder, VarMap};
use candle_swiglu::{FfnConfig, GluActivation, SwiGluFfn};

use crate::ffn::{Ffn, Passes};
use crate::model::{BuildMlp, Llama, LlamaConfig, Mlp};
use crate::settings::Settings;

/// A feed-forward block: an activation, with a gate or without.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Variant {
    Relu,
    Gelu,
    Swish,
    Glu,
    Bilinear,
    ReGlu,
    GeGlu,
    SwiGlu,
}

impl Variant {
    pub(crate) const ALL: [Self; 8] = [
        Self::Relu,
        Self::Gelu,
        Self::Swish,
        Self::Glu,
        Self::Bilinear,
        Self::ReGlu,
        Self::GeGlu,
        Self::SwiGlu,
    ];

    /// The name in files and pictures.
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Relu => "ReLU",
            Self::Gelu => "GELU",
            Self::Swish => "Swish",
            Self::Glu => "GLU",
            Self::Bilinear => "Bilinear",
            Self::ReGlu => "ReGLU",
            Self::GeGlu => "GEGLU",
            Self::SwiGlu => "SwiGLU",
        }
    }

    pub(crate) fn activation(self) -> GluActivation {
        match self {
            Self::Relu | Self::ReGlu => GluActivation::Relu,
            Self::Gelu | Self::GeGlu => GluActivation::Gelu,
            Self::Swish | Self::SwiGlu => GluActivation::Silu,
            Self::Glu => GluActivation::Sigmoid,
            Self::Bilinear => GluActivation::Identity,
        }
    }

    pub(crate) fn is_gated(self) -> bool {
        !matches!(self, Self::Relu | Self::Gelu | Self::Swish)
    }

    /// Whether the activation is exactly zero on one side.
    pub(crate) fn is_rectified(self) -> bool {
        matches!(self, Self::Relu | Self::ReGlu)
    }

    /// The number of units of h. A block without a gate has two matrices instead of three, so it is
    /// 3/2 as wide: 2·H·(3/2·I) = 3·H·I.
    pub(crate) fn units(self, intermediate_size: usize) -> usize {
        if self.is_gated() { intermediate_size } else { intermediate_size / 2 * 3 }
    }

    /// The model with this block in every layer. In an empty `VarMap` the variables are created.
    pub(crate) fn load(
        self,
        settings: &Settings,
        vocab_size: usize,
        vars: &VarMap,
    ) -> Result<Llama> {
        load(settings, vocab_size, vars, &|_, vb| {
            Ok(match self.is_gated() {
                true => self.fused(settings, vb)?,
                false => self.separate(settings, vb)?,
            })
        })
    }

    /// A gated block as one fused layer.
    pub(crate) fn fused(self, settings: &Settings, vb: VarBuilder) -> Result<Arc<dyn Mlp>> {
        let ffn = FfnConfig::new(settings.hidden_size, settings.intermediate_size)
            .with_activation(self.activation());
        Ok(Arc::new(SwiGluFfn::new(&ffn, vb)?))
    }

    /// Any block as separate operations.
    pub(crate) fn separate(self, settings: &Settings, vb: VarBuilder) -> Result<Arc<dyn Mlp>> {
        Ok(Arc::new(Ffn::load(self, settings, vb, None)?))
    }

    /// The same model on the same variables. Layer i puts what its block computes into `passes[i]`.
    pub(crate) fn load_probed(
        self,
        settings: &Settings,
        vocab_size: usize,
        vars: &VarMap,
        passes: &[Passes],
    ) -> Result<Llama> {
        load(settings, vocab_size, vars, &|layer, vb| {
            let passes = passes.get(layer).cloned();
            Ok(Arc::new(Ffn::load(self, settings, vb, passes)?))
        })
    }
}

fn load(settings: &Settings, vocab_size: usize, vars: &VarMap, mlp: BuildMlp) -> Result<Llama> {
    let cfg = LlamaConfig::from_json(&settings.config(vocab_size))?;
    Llama::load_with(VarBuilder::from_varmap(vars, DType::F32, &Device::Cpu), &cfg, mlp)
}
