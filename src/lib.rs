#![doc = include_str!("../README.md")]

mod backend;
mod checkpoint;
mod config;
#[allow(unsafe_code)]
mod cpu;
#[cfg(feature = "cuda")]
#[allow(unsafe_code)]
mod cuda;
mod device;
mod embedding;
mod error;
mod family;
mod ffn;
mod forced;
mod gate;
#[cfg(feature = "hub")]
pub mod hub;
mod linear;
#[cfg(any(feature = "metal", test))]
mod metal;
mod missing;
mod packed;
pub mod reference;
mod unread;
mod weights;

use gate::{self as glu, activation};

pub use checkpoint::{Checkpoint, read_json};
pub use config::{Biases, FfnConfig};
pub use cpu::cpu_kernels;
#[cfg(feature = "cuda")]
#[doc(hidden)]
pub use cuda::{Prefill as CudaPrefill, force_prefill as force_cuda_prefill};
pub use embedding::{Embedding, embedding};
pub use error::{Error, Result};
pub use family::{Family, Names, PackedOrder};
pub use ffn::{SwiGluFfn, swiglu_ffn};
pub use gate::{Glu, GluActivation, glu_mul, silu_mul};
pub use linear::{Linear, linear, linear_b, linear_no_bias};
pub use weights::{GateUp, Weights};
