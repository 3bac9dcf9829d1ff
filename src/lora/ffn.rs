//! The low-rank pairs of a feed-forward block.

use candle_core::{Device, Tensor};
use candle_nn::VarBuilder;

use super::adapter::LoraAdapter;
use super::adapters::Pairs;
use super::config::LoraConfig;
use super::names::find;
use super::pair::Lora;
use crate::config::FfnConfig;
use crate::error::{Error, Result};
use crate::load::{Family, FusedOrder, Names, fuse, split};

/// The low-rank pairs of a feed-forward block, each for one projection. A projection without a pair
/// is not changed.
///
/// ```
/// use candle_core::{DType, Device};
/// use candle_swiglu::{Checkpoint, FfnConfig, FfnLora, LoraAdapter, LoraConfig, swiglu_ffn};
/// use candle_nn::{Module, VarBuilder, VarMap};
/// let checkpoint = Checkpoint::open("weights")?;
/// let cfg = FfnConfig::from_json(checkpoint.config())?;
/// let mlp = "model.layers.0.mlp";
/// let mut ffn = swiglu_ffn(&cfg, checkpoint.var_builder(DType::F32, &Device::Cpu).pp(mlp))?;
///
/// let vars = VarMap::new();
/// let vb = VarBuilder::from_varmap(&vars, DType::F32, &Device::Cpu);
/// let config = LoraConfig::new(8, 16.0).with_target_modules(["gate_proj", "up_proj"]);
/// let lora = FfnLora::init(&cfg, &config, mlp, vb.pp(mlp))?;
/// ffn.add_adapter("stories", lora)?;
/// ffn.set_adapter("stories")?;
/// assert_eq!(vars.all_vars().len(), 4);
/// # Ok::<(), candle_swiglu::Error>(())
/// ```
#[derive(Clone, Debug, Default)]
pub struct FfnLora {
    /// A (r,H), B (I,r)
    pub gate_proj: Option<Lora>,
    /// A (r,H), B (I,r)
    pub up_proj: Option<Lora>,
    /// A (r,I), B (H,r)
    pub down_proj: Option<Lora>,
}

/// The tensors of a pair in the order of the projections.
const TENSORS: [[&str; 2]; 3] = [
    ["gate_proj.lora_A.weight", "gate_proj.lora_B.weight"],
    ["up_proj.lora_A.weight", "up_proj.lora_B.weight"],
    ["down_proj.lora_A.weight", "down_proj.lora_B.weight"],
];

impl FfnLora {
    /// The pairs that an adapter has for the block of this name (`model.layers.0.mlp`), under the
    /// names of any [`Family`]. They then count as used. Without a pair under the name, the result
    /// has none.
    ///
    /// Where gate and up are rows of one module (`gate_up_proj`), its A serves both, and B is
    /// split.
    ///
    /// # Errors
    /// Names that fit several families with different meanings ([`Error::AmbiguousPairs`]): use
    /// [`FfnLora::from_adapter_with_names`]. A fused B with an odd number of rows.
    pub fn from_adapter(adapter: &LoraAdapter, block: &str) -> Result<Self> {
        match find(adapter, block)? {
            Some(names) => Self::from_adapter_with_names(adapter, block, &names),
            None => Ok(Self::default()),
        }
    }

    /// [`FfnLora::from_adapter`] for projections of these names, for example
    /// `&Family::Xformers.names()`.
    ///
    /// # Errors
    /// A fused B with an odd number of rows.
    pub fn from_adapter_with_names(
        adapter: &LoraAdapter,
        block: &str,
        names: &Names,
    ) -> Result<Self> {
        let get = |name: &str| adapter.get(&format!("{block}.{name}")).cloned();
        match names {
            Names::Separate { gate, up, down } => {
                Ok(Self { gate_proj: get(gate), up_proj: get(up), down_proj: get(down) })
            }
            Names::Fused { gate_up, down, order } => {
                let down_proj = get(down);
                match get(gate_up) {
                    Some(pair) => {
                        Self::fused(&format!("{block}.{gate_up}"), &pair, *order, down_proj)
                    }
                    None => Ok(Self { down_proj, ..Self::default() }),
                }
            }
        }
    }

    /// The pairs of gate and up from that of a module with the rows of both.
    fn fused(
        module: &str,
        pair: &Lora,
        order: FusedOrder,
        down_proj: Option<Lora>,
    ) -> Result<Self> {
        let rows = pair.b().dim(0)?;
        if !rows.is_multiple_of(2) {
            return Err(Error::InvalidField {
                field: format!("{module}.lora_B.weight"),
                expected: "an even number of rows, of gate and of up",
                found: rows.to_string(),
            });
        }
        let (gate, up) = split(pair.b(), order)?;
        let half = |b: Tensor| Some(Lora { b, ..pair.clone() });
        Ok(Self { gate_proj: half(gate), up_proj: half(up), down_proj })
    }

    /// New pairs for the projections of the block that `config` targets, with tensors under `vb`'s
    /// prefix; all of them if it has no `target_modules`. In a `VarMap` they become variables, see
    /// [`Lora::init`].
    ///
    /// `block` is the name of the block in the model, to which the patterns of `config` apply. The
    /// names of the projections are those of `cfg`, otherwise `gate_proj`, `up_proj`, `down_proj`.
    ///
    /// # Errors
    /// As [`Lora::init`] and [`LoraConfig::targets`].
    pub fn init(cfg: &FfnConfig, config: &LoraConfig, block: &str, vb: VarBuilder) -> Result<Self> {
        cfg.validate()?;
        let pair = |name: &str, in_dim, out_dim| {
            let module = format!("{block}.{name}");
            match config.target_modules.is_none() || config.targets(&module)? {
                true => Lora::init(in_dim, out_dim, config, &module, vb.pp(name)).map(Some),
                false => Ok(None),
            }
        };
        let (h, i) = (cfg.hidden_size, cfg.intermediate_size);
        match &names_of(cfg) {
            Names::Separate { gate, up, down } => Ok(Self {
                gate_proj: pair(gate, h, i)?,
                up_proj: pair(up, h, i)?,
                down_proj: pair(down, i, h)?,
            }),
            Names::Fused { gate_up, down, order } => {
                let (gate_up_pair, down_proj) = (pair(gate_up, h, 2 * i)?, pair(down, i, h)?);
                match gate_up_pair {
                    Some(pair) => Self::fused(gate_up, &pair, *order, down_proj),
                    None => Ok(Self { down_proj, ..Self::default() }),
                }
            }
        }
    }

    /// The pairs with the names of their modules, for [`LoraAdapter::from_pairs`]. `cfg` and
    /// `block` are as in [`FfnLora::init`].
    ///
    /// # Errors
    /// Gate and up are rows of one module, and do not have one A and one scale.
    pub fn modules(&self, cfg: &FfnConfig, block: &str) -> Result<Vec<(String, Lora)>> {
        let names = names_of(cfg);
        let named =
            |name: &str, pair: &Option<Lora>| Some((format!("{block}.{name}"), pair.clone()?));
        let all = match &names {
            Names::Separate { gate, up, down } => vec![
                named(gate, &self.gate_proj),
                named(up, &self.up_proj),
                named(down, &self.down_proj),
            ],
            Names::Fused { gate_up, down, order } => {
                vec![named(gate_up, &self.gate_up(gate_up, *order)?), named(down, &self.down_proj)]
            }
        };
        Ok(all.into_iter().flatten().collect())
    }

    /// The pair of a module with the rows of gate and up.
    fn gate_up(&self, module: &str, order: FusedOrder) -> Result<Option<Lora>> {
        match (&self.gate_proj, &self.up_proj) {
            (None, None) => Ok(None),
            (Some(gate), Some(up)) if gate.a.id() == up.a.id() && gate.scale == up.scale => {
                Ok(Some(Lora { b: fuse(&gate.b, &up.b, order)?, ..gate.clone() }))
            }
            _ => Err(Error::InvalidField {
                field: format!("{module}.lora_A.weight"),
                expected: "the same A and scale for gate and up",
                found: "others".to_string(),
            }),
        }
    }

    /// gate, up, down
    pub(crate) fn pairs(&self) -> [Option<&Lora>; 3] {
        [&self.gate_proj, &self.up_proj, &self.down_proj].map(Option::as_ref)
    }

    /// No projection has a pair.
    pub(crate) fn is_empty(&self) -> bool {
        self.pairs().iter().all(Option::is_none)
    }

    /// # Errors
    /// A pair has not the sizes of its projection in the block, or is on another device.
    pub(crate) fn check(&self, cfg: &FfnConfig, device: &Device) -> Result<()> {
        let (h, i) = (cfg.hidden_size, cfg.intermediate_size);
        let sizes = [(h, i), (h, i), (i, h)];
        for ((pair, sizes), names) in self.pairs().into_iter().zip(sizes).zip(TENSORS) {
            pair.map_or(Ok(()), |pair| pair.check_fits(names, sizes, device))?;
        }
        Ok(())
    }
}

impl Pairs for FfnLora {
    fn map(&self, f: impl Fn(&Lora) -> Result<Lora>) -> Result<Self> {
        let [gate_proj, up_proj, down_proj] = self.pairs().map(|pair| pair.map(&f).transpose());
        Ok(Self { gate_proj: gate_proj?, up_proj: up_proj?, down_proj: down_proj? })
    }
}

/// The names that the config gives, or those of LLaMA.
fn names_of(cfg: &FfnConfig) -> Names {
    match (&cfg.names, cfg.family) {
        (Some(names), _) => names.clone(),
        (None, family) => family.unwrap_or(Family::Llama).names(),
    }
}
