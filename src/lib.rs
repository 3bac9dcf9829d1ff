#![doc = include_str!("../README.md")]

mod activation;
mod backend;
mod config;
#[allow(unsafe_code)]
mod cpu;
#[cfg(feature = "cuda")]
#[allow(unsafe_code)]
mod cuda;
mod device;
mod embedding;
mod engine;
mod error;
mod ffn;
mod glu;
mod linear;
mod load;
#[cfg(any(feature = "metal", test))]
mod metal;
mod over_rows;
pub mod reference;
mod which;

pub use activation::{Glu, GluActivation};
pub use config::FfnConfig;
pub use cpu::cpu_kernels;
#[cfg(feature = "cuda")]
#[doc(hidden)]
pub use cuda::{Prefill as CudaPrefill, force_prefill as force_cuda_prefill};
pub use embedding::{Embedding, embedding};
pub use error::{Error, Result};
pub use ffn::{SwiGluFfn, swiglu_ffn};
pub use glu::{glu_mul, silu_mul};
pub use linear::{Linear, linear, linear_b, linear_no_bias};
#[cfg(feature = "hub")]
pub use load::hub;
pub use load::{Biases, Checkpoint, Family, FusedOrder, GateUp, Names, Weights, read_json};
