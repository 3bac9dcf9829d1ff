//! What the readers of a `config.json` have in common: the model type, and which block is read.

use serde_json::Value;

/// DINOv2 and models based on it: I follows from `mlp_ratio`, and `use_swiglu_ffn` decides whether
/// there is a gate.
pub(super) const DINOV2: [&str; 8] = [
    "dinov2",
    "dinov2_with_registers",
    "eomt",
    "radio",
    "rf_detr_dinov2",
    "tipsv2",
    "tipsv2_vision_model",
    "videomt",
];

/// Which of a model's gated blocks is read.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Part {
    Dense,
    Expert,
}

/// The part of a config that describes the model.
pub(super) struct Config<'a> {
    pub(super) json: &'a Value,
    /// The model type without `_text`.
    pub(super) model: &'a str,
    pub(super) layer: Option<usize>,
    pub(super) part: Part,
}
