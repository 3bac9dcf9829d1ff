//! Linear layers and MLPs with the low-rank pairs (LoRA) of an adapter.

use candle_core::{Error, Result};
use candle_nn::VarBuilder;
use candle_swiglu::{FfnConfig, FfnLora, Linear, LoraAdapter, SwiGluFfn, linear_b};

/// The name of the adapter in each layer.
const NAME: &str = "adapter";

/// Where the layers of a model get their pairs from: the adapter, if there is one.
#[derive(Clone, Copy, Debug)]
pub struct Pairs<'a> {
    adapter: Option<&'a LoraAdapter>,
    /// What stands before a layer's name in the adapter, but not in the checkpoint.
    prefix: &'a str,
}

impl<'a> Pairs<'a> {
    pub const NONE: Pairs<'static> = Pairs { adapter: None, prefix: "" };

    /// The pairs of an adapter for a checkpoint whose names begin with `model`. PEFT names the
    /// modules of a model with its head, where this is not empty.
    pub fn new(adapter: Option<&'a LoraAdapter>, model: &str) -> Self {
        Self { adapter, prefix: if model.is_empty() { "model." } else { "" } }
    }

    /// The linear layer under `vb`'s prefix, with its pair.
    pub fn linear(
        &self,
        (in_dim, out_dim): (usize, usize),
        bias: bool,
        vb: VarBuilder,
    ) -> Result<Linear> {
        let layer = linear_b(in_dim, out_dim, bias, vb.clone())?;
        self.adapted(layer, &format!("{}{}", self.prefix, vb.prefix()))
    }

    /// The layer with the pair of the module of this name.
    pub fn adapted(&self, mut layer: Linear, module: &str) -> Result<Linear> {
        let Some(pair) = self.adapter.and_then(|adapter| adapter.get(module)) else {
            return Ok(layer);
        };
        layer.add_adapter(NAME, pair.clone()).map_err(within(module))?;
        layer.set_adapter(NAME)?;
        Ok(layer)
    }

    /// The MLP under `vb`'s prefix, with its pairs.
    pub fn swiglu(&self, cfg: &FfnConfig, vb: VarBuilder) -> Result<SwiGluFfn> {
        let mut mlp = SwiGluFfn::new(cfg, vb.clone())?;
        if let Some(adapter) = self.adapter {
            let module = format!("{}{}", self.prefix, vb.prefix());
            mlp.add_adapter(NAME, FfnLora::from_adapter(adapter, &module)?)
                .map_err(within(&module))?;
            mlp.set_adapter(NAME)?;
        }
        Ok(mlp)
    }

    /// # Errors
    /// The adapter has pairs for modules that the model does not have.
    pub fn check_used(&self) -> Result<()> {
        Ok(self.adapter.map_or(Ok(()), LoraAdapter::check_used)?)
    }
}

/// An error with the name of the module before it.
fn within(module: &str) -> impl Fn(candle_swiglu::Error) -> Error {
    move |error| Error::from(error).context(format!("adapter: {module}"))
}
