//! Low-rank adapters (LoRA) in PEFT's file format.
//!
//! An adapter of a projection W (out,in) changes `y = x·Wᵀ` to `y = x·Wᵀ + s·(x·Aᵀ)·Bᵀ` with
//! A (r,in) and B (out,r). [`LoraConfig`] says which modules have one, with which rank and scale s,
//! [`Lora`] is the pair of one module, [`FfnLora`] has those of a feed-forward block,
//! [`LoraAdapter`] is a directory with all pairs of a model.
//!
//! The rules, the names and the arithmetic of merging are those of PEFT 0.21.2.

mod adapter;
mod adapters;
mod config;
mod ffn;
mod files;
mod json;
mod names;
mod pair;
mod pattern;

pub use adapter::LoraAdapter;
pub(crate) use adapters::Adapters;
pub use config::{LoraConfig, Modules};
pub use ffn::FfnLora;
pub use pair::Lora;
