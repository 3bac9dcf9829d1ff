//! How checkpoint families name a block's projections and arrange their rows.

use std::borrow::Cow;

/// How a checkpoint family names the projections, and in which order a fused gate_up_proj holds
/// them.
///
/// | family | gate | up | down | detected |
/// |---|---|---|---|---|
/// | `Llama` (HF LLaMA, Mistral, Qwen2, Gemma, ...) | `gate_proj` | `up_proj` | `down_proj` | by names |
/// | `Meta` (Meta LLaMA, Mixtral experts, InternLM2) | `w1` | `w3` | `w2` | under `feed_forward` or `experts.N` |
/// | `Xformers` | `w1` | `w2` | `w3` | never: same names as `Meta` |
/// | `Qwen1` | `w2` | `w1` | `c_proj` | by names |
/// | `Phi3` (Phi-3, GLM-4 in HF) | `gate_up_proj`, first half | second half | `down_proj` | by names |
/// | `ChatGlm` | `dense_h_to_4h`, first half | second half | `dense_4h_to_h` | by names |
/// | `Dinov2` | `w12`, first half | second half | `w3` | by names |
/// | `Stella` | `up_gate_proj`, second half | first half | `down_proj` | by names |
/// | `FlashAttn` (`GatedMlp`) | `fc1`, second half | first half | `fc2` | never: plain MLPs use these names |
/// | `Interleaved` (quack, gpt-oss per expert) | `gate_up_proj`, even rows | odd rows | `down_proj` | never: same names as `Phi3` |
/// | `Nomic` | `fc12` | `fc11` | `fc2` | by names |
/// | `T5` (v1.1) | `wi_0` | `wi_1` | `wo` | by names |
/// | `ModernBert` | `Wi`, first half | second half | `Wo` | by names |
/// | `GraniteMoe` (shared MLP) | `input_linear`, first half | second half | `output_linear` | by names |
/// | `Dinov2Hf` (DINOv2 in HF) | `weights_in`, first half | second half | `weights_out` | by names |
/// | `OpenElm` | `proj_1`, first half | second half | `proj_2` | by names |
/// | `Gguf` | `ffn_gate` | `ffn_up` | `ffn_down` | by names |
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
#[allow(missing_docs)] // the table above
pub enum Family {
    Llama,
    Meta,
    Xformers,
    Qwen1,
    Phi3,
    ChatGlm,
    Dinov2,
    Stella,
    FlashAttn,
    Interleaved,
    Nomic,
    T5,
    Gguf,
    ModernBert,
    GraniteMoe,
    Dinov2Hf,
    OpenElm,
}

/// Which rows of a fused `gate_up_proj` (2I,H) belong to the gate.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum FusedOrder {
    /// Rows 0..I are the gate, rows I..2I are up.
    GateFirst,
    /// Rows 0..I are up, rows I..2I are the gate.
    UpFirst,
    /// Even rows are the gate, odd rows are up.
    Interleaved,
}

/// The names of a block's projections under its prefix, without `.weight` or `.bias`.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Names {
    /// gate_proj and up_proj are two tensors.
    #[non_exhaustive]
    Separate {
        /// gate_proj (I,H)
        gate: Cow<'static, str>,
        /// up_proj (I,H)
        up: Cow<'static, str>,
        /// down_proj (H,I)
        down: Cow<'static, str>,
    },
    /// gate_proj and up_proj are the rows of one tensor.
    #[non_exhaustive]
    Fused {
        /// gate_up_proj (2I,H)
        gate_up: Cow<'static, str>,
        /// down_proj (H,I)
        down: Cow<'static, str>,
        /// Which rows of gate_up_proj belong to the gate.
        order: FusedOrder,
    },
}

impl Names {
    /// Three tensors.
    pub fn separate(
        gate: impl Into<Cow<'static, str>>,
        up: impl Into<Cow<'static, str>>,
        down: impl Into<Cow<'static, str>>,
    ) -> Self {
        Self::Separate { gate: gate.into(), up: up.into(), down: down.into() }
    }

    /// gate_proj and up_proj in one tensor.
    pub fn fused(
        gate_up: impl Into<Cow<'static, str>>,
        down: impl Into<Cow<'static, str>>,
        order: FusedOrder,
    ) -> Self {
        Self::Fused { gate_up: gate_up.into(), down: down.into(), order }
    }

    /// `gate_proj` and so on.
    pub(crate) fn projections(&self) -> Vec<&str> {
        match self {
            Names::Separate { gate, up, down } => vec![gate, up, down],
            Names::Fused { gate_up, down, .. } => vec![gate_up, down],
        }
    }

    /// `gate_proj.weight` and so on.
    pub(crate) fn weights(&self) -> Vec<String> {
        self.projections().into_iter().map(|name| format!("{name}.weight")).collect()
    }
}

impl Family {
    pub(crate) const ALL: [Family; 17] = [
        Family::Llama,
        Family::Meta,
        Family::Xformers,
        Family::Qwen1,
        Family::Phi3,
        Family::ChatGlm,
        Family::Dinov2,
        Family::Stella,
        Family::FlashAttn,
        Family::Interleaved,
        Family::Nomic,
        Family::T5,
        Family::Gguf,
        Family::ModernBert,
        Family::GraniteMoe,
        Family::Dinov2Hf,
        Family::OpenElm,
    ];

    /// The names of this family.
    pub fn names(self) -> Names {
        use FusedOrder::*;
        let pair = |gate: &'static str, up: &'static str, down: &'static str| {
            Names::separate(gate, up, down)
        };
        let fused =
            |gate_up: &'static str, down: &'static str, order| Names::fused(gate_up, down, order);
        match self {
            Family::Llama => pair("gate_proj", "up_proj", "down_proj"),
            Family::Meta => pair("w1", "w3", "w2"),
            Family::Xformers => pair("w1", "w2", "w3"),
            Family::Qwen1 => pair("w2", "w1", "c_proj"),
            Family::Phi3 => fused("gate_up_proj", "down_proj", GateFirst),
            Family::ChatGlm => fused("dense_h_to_4h", "dense_4h_to_h", GateFirst),
            Family::Dinov2 => fused("w12", "w3", GateFirst),
            Family::Stella => fused("up_gate_proj", "down_proj", UpFirst),
            Family::FlashAttn => fused("fc1", "fc2", UpFirst),
            Family::Interleaved => fused("gate_up_proj", "down_proj", Interleaved),
            Family::Nomic => pair("fc12", "fc11", "fc2"),
            Family::T5 => pair("wi_0", "wi_1", "wo"),
            Family::Gguf => pair("ffn_gate", "ffn_up", "ffn_down"),
            Family::ModernBert => fused("Wi", "Wo", GateFirst),
            Family::GraniteMoe => fused("input_linear", "output_linear", GateFirst),
            Family::Dinov2Hf => fused("weights_in", "weights_out", GateFirst),
            Family::OpenElm => fused("proj_1", "proj_2", GateFirst),
        }
    }

    /// The names alone do not decide for this family: another layout, or a plain MLP, uses the same
    /// ones.
    pub(crate) fn must_be_named(self) -> bool {
        matches!(self, Family::Xformers | Family::FlashAttn | Family::Interleaved)
    }

    pub(crate) fn weight_names(self) -> Vec<String> {
        self.names().weights()
    }
}

/// Which name is which, in words.
impl std::fmt::Display for Names {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Names::Separate { gate, up, down } => write!(f, "{gate} gate, {up} up, {down} down"),
            Names::Fused { gate_up, down, order } => write!(f, "{gate_up} {order:?}, {down} down"),
        }
    }
}
