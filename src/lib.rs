//! The SwiGLU feed-forward block of LLaMA-like models for [candle](candle_core), as one
//! [`Module`](candle_nn::Module) with fused kernels on the CPU, on CUDA and on Metal.
//!
//! ```text
//! y = (silu(x·Wgᵀ) ⊙ (x·Wuᵀ))·Wdᵀ
//!
//! x (…,H)   gate_proj Wg, up_proj Wu (I,H)   down_proj Wd (H,I)   y (…,H)
//! ```
//!
//! The same block computes the other gated linear units (GLU, ReGLU, GEGLU, bilinear), with or
//! without biases. Every config field is either honoured or rejected with an error that names it.
//!
//! # A block from three tensors
//!
//! ```
//! use candle_core::{Device, Tensor};
//! use candle_nn::Module;
//! use candle_swiglu::SwiGluFfn;
//!
//! let row = |v: &[f32]| Tensor::new(v, &Device::Cpu)?.reshape((1, 2));
//! let down = Tensor::new(&[[1f32], [2.0]], &Device::Cpu)?;
//! let ffn = SwiGluFfn::from_tensors(row(&[100.0, 0.0])?, row(&[0.0, 1.0])?, down)?;
//!
//! let x = Tensor::new(&[[1f32, 3.0]], &Device::Cpu)?;
//! let y = ffn.forward(&x)?; // h = silu(100)·3 = 300
//! assert_eq!(y.to_vec2::<f32>()?, [[300.0, 600.0]]);
//! # Ok::<(), candle_core::Error>(())
//! ```
//!
//! # A layer of a checkpoint
//!
//! The names and the layout of the tensors are detected ([`Family`]). The config decides the sizes,
//! the activation and the biases.
//!
//! ```
//! use candle_core::{DType, Device, Tensor};
//! use candle_nn::Module;
//! use candle_swiglu::{Checkpoint, FfnConfig, swiglu_ffn};
//!
//! let checkpoint = Checkpoint::open("weights")?; // a directory with config.json and *.safetensors
//! let cfg = FfnConfig::from_json(checkpoint.config())?;
//! let vb = checkpoint.var_builder(DType::F32, &Device::Cpu);
//! let ffn = swiglu_ffn(&cfg, vb.pp("model.layers.0.mlp"))?;
//!
//! let x = Tensor::zeros((1, 7, cfg.hidden_size), DType::F32, &Device::Cpu)?;
//! assert_eq!(ffn.forward(&x)?.dims(), [1, 7, 128]);
//! # Ok::<(), candle_core::Error>(())
//! ```
//!
//! # Training
//!
//! Weights of a `VarMap` stay variables and receive gradients. [`SwiGluFfn::freeze`] then packs
//! them for the fast kernels.
//!
//! ```
//! use candle_core::{DType, Device, Tensor};
//! use candle_nn::{AdamW, Module, Optimizer, VarBuilder, VarMap};
//! use candle_swiglu::{FfnConfig, swiglu_ffn};
//!
//! let vars = VarMap::new();
//! let vb = VarBuilder::from_varmap(&vars, DType::F32, &Device::Cpu);
//! let ffn = swiglu_ffn(&FfnConfig::new(8, 24), vb)?;
//! let x = Tensor::randn(0f32, 1.0, (16, 8), &Device::Cpu)?;
//! let loss = |x: &Tensor| ffn.forward(x)?.sub(x)?.sqr()?.mean_all();
//! let before = loss(&x)?.to_scalar::<f32>()?;
//!
//! let mut optimizer = AdamW::new_lr(vars.all_vars(), 1e-2)?;
//! for _ in 0..20 {
//!     optimizer.backward_step(&loss(&x)?)?;
//! }
//! assert!(loss(&x)?.to_scalar::<f32>()? < before);
//! let ffn = ffn.freeze()?; // constants from here on
//! # Ok::<(), candle_core::Error>(())
//! ```
//!
//! # Overview
//!
//! | group | items |
//! |---|---|
//! | the block | [`SwiGluFfn`], [`swiglu_ffn`] |
//! | projections | [`Linear`], [`linear`], [`linear_no_bias`], [`linear_b`] |
//! | embeddings | [`Embedding`], [`embedding`] |
//! | the formula | [`FfnConfig`], [`Biases`], [`GluActivation`] |
//! | the gate alone | [`silu_mul`], [`glu_mul`], [`Glu`] |
//! | training | [`fn@backward`], [`SwiGluFfn::with_recompute`], [`SwiGluFfn::freeze`] |
//! | loading | [`Checkpoint`], [`read_json`], `hub` (feature `hub`) |
//! | low-rank adapters | [`LoraAdapter`], [`LoraConfig`], [`Modules`], [`Lora`], [`FfnLora`] |
//! | names and layouts | [`Family`], [`Names`], [`Weights`], [`GateUp`] |
//! | errors | [`Error`], [`Result`] |
//! | kernels | [`cpu_kernels`], [`SwiGluFfn::kernel`] |
//!
//! The module [`mod@reference`] holds the definition in f64 against which every kernel is tested.
//!
//! # Features
//!
//! | feature | effect |
//! |---|---|
//! | `cuda` | kernels for NVIDIA GPUs of compute capability 8.0 and newer; needs nvcc 12 or newer |
//! | `metal` | kernels for Apple GPUs |
//! | `hub` | `hub::download`: checkpoints from the Hugging Face hub |
//! | `accelerate`, `mkl`, `cudnn` | passed on to candle, without effect on these kernels |
//!
//! The environment variable `CANDLE_SWIGLU_KERNEL` forces one of [`cpu_kernels`], or `plain`:
//! candle's own operations on every device.

mod backend;
mod check;
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
mod forced;
mod gate;
mod glu_mul;
mod linear;
mod load;
mod lora;
#[cfg(any(feature = "metal", test))]
mod metal;
pub mod reference;
mod which;

pub use config::FfnConfig;
pub use cpu::cpu_kernels;
#[cfg(feature = "cuda")]
#[doc(hidden)]
pub use cuda::{Prefill as CudaPrefill, force_prefill as force_cuda_prefill};
pub use embedding::{Embedding, embedding};
pub use engine::backward;
pub use error::{Error, Result};
pub use ffn::{SwiGluFfn, swiglu_ffn};
pub use gate::{Glu, GluActivation};
pub use glu_mul::{glu_mul, silu_mul};
pub use linear::{Linear, linear, linear_b, linear_no_bias};
#[cfg(feature = "hub")]
pub use load::hub;
pub use load::{Biases, Checkpoint, Family, FusedOrder, GateUp, Names, Weights, read_json};
pub use lora::{FfnLora, Lora, LoraAdapter, LoraConfig, Modules};

/// The examples of README.md, compiled and run as documentation tests.
#[cfg(doctest)]
#[doc = include_str!("../README.md")]
struct Readme;

/// The examples of docs/models.md.
#[cfg(doctest)]
#[doc = include_str!("../docs/models.md")]
struct Models;

/// The examples of docs/lora.md.
#[cfg(doctest)]
#[doc = include_str!("../docs/lora.md")]
struct LoraGuide;
