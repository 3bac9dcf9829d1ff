//! One decoder layer of Cohere (Command-R) around the block. As in PaLM, attention and the
//! feed-forward block read the same norm: n = norm(x), y = x + attention(n) + ffn(n).
//!
//! The references are transformers' y and dx in f32, and the same computed wholly in f64
//! (tests/golden/README.md). In f32, the error relative to f64 may be twice that of transformers,
//! plus u·|y|: the rounding of the result itself, which transformers' error may happen to lack. The
//! errors are compared in the root mean square and in the largest element. In f64, the tolerance is
//! that of f32 times 2⁻²⁹, the ratio of the unit roundoffs.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, missing_docs)]

mod common;

use std::collections::HashMap;

use anyhow::{Context, Result, ensure};
use candle_core::{D, DType, Device, Tensor, Var};
use candle_nn::rotary_emb::rope_i_slow;
use candle_nn::{LayerNorm, Module, VarBuilder};
use candle_swiglu::{FfnConfig, Linear, SwiGluFfn, linear_no_bias};
use common::{Golden, max_error, rms_error, unit_roundoff, values};

// ---------------------------------------------------------------- the layer

#[derive(serde::Deserialize)]
struct Config {
    hidden_size: usize,
    intermediate_size: usize,
    num_attention_heads: usize,
    num_key_value_heads: usize,
    layer_norm_eps: f64,
    rope_parameters: RopeParameters,
    #[serde(default)]
    use_qk_norm: bool,
    /// Cohere2: one entry for the only layer.
    #[serde(default)]
    layer_types: Vec<String>,
    sliding_window: Option<usize>,
}

#[derive(serde::Deserialize)]
struct RopeParameters {
    rope_theta: f64,
}

impl Config {
    fn head_dim(&self) -> usize {
        self.hidden_size / self.num_attention_heads
    }

    /// A layer of Cohere2 with full attention has no rope.
    fn is_full_of_cohere2(&self) -> bool {
        self.layer_types == ["full_attention"]
    }

    fn window(&self) -> Option<usize> {
        self.sliding_window.filter(|_| !self.is_full_of_cohere2())
    }
}

/// A norm without bias. q and k have a weight (heads, head_dim).
fn norm(dims: &[usize], eps: f64, vb: VarBuilder) -> Result<LayerNorm> {
    Ok(LayerNorm::new_no_bias(vb.get(dims, "weight")?, eps))
}

struct Attention {
    cfg: Config,
    q_proj: Linear,
    k_proj: Linear,
    v_proj: Linear,
    o_proj: Linear,
    qk_norms: Option<[LayerNorm; 2]>,
}

impl Attention {
    fn new(cfg: Config, vb: VarBuilder) -> Result<Self> {
        let (hidden, head_dim) = (cfg.hidden_size, cfg.head_dim());
        let (heads, kv_heads) = (cfg.num_attention_heads, cfg.num_key_value_heads);
        let linear = |out_dim, name: &str| linear_no_bias(hidden, out_dim, vb.pp(name));
        let qk_norm = |heads, name: &str| norm(&[heads, head_dim], cfg.layer_norm_eps, vb.pp(name));
        let qk_norms = match cfg.use_qk_norm {
            true => Some([qk_norm(heads, "q_norm")?, qk_norm(kv_heads, "k_norm")?]),
            false => None,
        };
        Ok(Self {
            q_proj: linear(hidden, "q_proj")?,
            k_proj: linear(kv_heads * head_dim, "k_proj")?,
            v_proj: linear(kv_heads * head_dim, "v_proj")?,
            o_proj: linear(hidden, "o_proj")?,
            qk_norms,
            cfg,
        })
    }

    /// y (B,P,heads·d) -> (B,heads,P,d)
    fn split(&self, y: &Tensor, norm: Option<&LayerNorm>) -> Result<Tensor> {
        let (batch, positions, _) = y.dims3()?;
        let y = y.reshape((batch, positions, (), self.cfg.head_dim()))?;
        let y = norm.map_or(Ok(y.clone()), |norm| norm.forward(&y))?;
        Ok(y.transpose(1, 2)?.contiguous()?)
    }

    /// x (B,heads,P,d), pairs of neighbours rotated by their positions
    fn rope(&self, x: &Tensor) -> Result<Tensor> {
        if self.cfg.is_full_of_cohere2() {
            return Ok(x.clone());
        }
        let (positions, d) = (x.dim(2)?, self.cfg.head_dim());
        let theta = self.cfg.rope_parameters.rope_theta;
        let angle =
            |i: usize| (i / (d / 2)) as f64 * theta.powf(-2.0 * (i % (d / 2)) as f64 / d as f64);
        let table = |f: fn(f64) -> f64| {
            let values: Vec<f64> = (0..positions * d / 2).map(|i| f(angle(i))).collect();
            Tensor::from_vec(values, (positions, d / 2), x.device())?.to_dtype(x.dtype())
        };
        Ok(rope_i_slow(x, &table(f64::cos)?, &table(f64::sin)?)?)
    }

    /// (P,P): 0 where the row's position sees the column's, else -∞
    fn mask(&self, positions: usize, dtype: DType) -> Result<Tensor> {
        let window = self.cfg.window().unwrap_or(positions);
        let values: Vec<f64> = (0..positions * positions)
            .map(|i| (i / positions, i % positions))
            .map(
                |(row, column)| {
                    if column <= row && row < column + window { 0.0 } else { f64::NEG_INFINITY }
                },
            )
            .collect();
        Ok(Tensor::from_vec(values, (positions, positions), &Device::Cpu)?.to_dtype(dtype)?)
    }

    /// Each head of x (B,kv_heads,P,d) for the group of query heads that read it: (B,heads,P,d)
    fn repeat(&self, x: &Tensor) -> Result<Tensor> {
        let (batch, kv_heads, positions, d) = x.dims4()?;
        let heads = self.cfg.num_attention_heads;
        let group = (batch, kv_heads, heads / kv_heads, positions, d);
        Ok(x.unsqueeze(2)?.broadcast_as(group)?.reshape((batch, heads, positions, d))?)
    }

    /// n (B,P,H) -> (B,P,H)
    fn forward(&self, n: &Tensor) -> Result<Tensor> {
        let norms = self.qk_norms.as_ref();
        let q = self.split(&self.q_proj.forward(n)?, norms.map(|[q, _]| q))?;
        let k = self.split(&self.k_proj.forward(n)?, norms.map(|[_, k]| k))?;
        let v = self.split(&self.v_proj.forward(n)?, None)?;
        let (q, k) = (self.rope(&q)?, self.repeat(&self.rope(&k)?)?);
        let scores = (q.matmul(&k.t()?)? / (self.cfg.head_dim() as f64).sqrt())?; // (B,heads,P,P)
        let scores = scores.broadcast_add(&self.mask(n.dim(1)?, n.dtype())?)?;
        let weights = candle_nn::ops::softmax(&scores, D::Minus1)?;
        let heads = weights.matmul(&self.repeat(&v)?)?; // (B,heads,P,d)
        Ok(self.o_proj.forward(&heads.transpose(1, 2)?.flatten_from(2)?)?)
    }
}

/// How norm, attention and the feed-forward block are connected.
#[derive(Clone, Copy, Debug)]
enum Order {
    Parallel,
    /// The order of LLaMA, with the only norm of the layer.
    Serial,
    FfnOfX,
}

struct Layer {
    norm: LayerNorm,
    attention: Attention,
    ffn: SwiGluFfn,
}

impl Layer {
    /// From the names of transformers under vb's prefix.
    fn new(json: &serde_json::Value, vb: VarBuilder) -> Result<Self> {
        let cfg: Config = serde_json::from_value(json.clone())?;
        let ffn = FfnConfig::from_json(json)?;
        assert_eq!(ffn, FfnConfig::new(cfg.hidden_size, cfg.intermediate_size));
        Ok(Self {
            norm: norm(&[cfg.hidden_size], cfg.layer_norm_eps, vb.pp("input_layernorm"))?,
            attention: Attention::new(cfg, vb.pp("self_attn"))?,
            ffn: SwiGluFfn::new(&ffn, vb.pp("mlp"))?,
        })
    }

    /// x (B,P,H) -> y (B,P,H)
    fn forward(&self, x: &Tensor, order: Order) -> Result<Tensor> {
        let n = self.norm.forward(x)?;
        let sum = (x + self.attention.forward(&n)?)?;
        let ffn = match order {
            Order::Parallel => self.ffn.forward(&n)?,
            Order::Serial => self.ffn.forward(&self.norm.forward(&sum)?)?,
            Order::FfnOfX => self.ffn.forward(x)?,
        };
        Ok((sum + ffn)?)
    }
}

// ---------------------------------------------------------------- comparison with transformers

#[derive(Clone, Copy)]
struct Run {
    dtype: DType,
    /// Whether a gradient is tracked through the weights. Constants are packed, except in f64.
    tracked: bool,
}

const RUNS: [Run; 3] = [
    Run { dtype: DType::F32, tracked: false },
    Run { dtype: DType::F32, tracked: true },
    Run { dtype: DType::F64, tracked: false },
];

fn layer(golden: &Golden, run: Run) -> Result<Layer> {
    let mut file = HashMap::new();
    for (name, tensor) in golden.tensors.iter().filter(|(name, _)| name.ends_with(".weight")) {
        let mut tensor = tensor.to_dtype(run.dtype)?;
        if run.tracked {
            tensor = Var::from_tensor(&tensor)?.into_inner();
        }
        file.insert(format!("model.layers.0.{name}"), tensor);
    }
    let vb = VarBuilder::from_tensors(file, run.dtype, &Device::Cpu);
    Layer::new(&golden.config()?, vb.pp("model.layers.0"))
}

/// y and dx (B,P,H), dx being the gradient of <y, dy>.
fn y_and_dx(layer: &Layer, order: Order, golden: &Golden, dtype: DType) -> Result<[Tensor; 2]> {
    let x = Var::from_tensor(&golden.tensor("x")?.to_dtype(dtype)?)?;
    let y = layer.forward(&x, order)?;
    let dy = golden.tensor("dy")?.to_dtype(dtype)?;
    let gradients = (&y * dy)?.sum_all()?.backward()?;
    let dx = gradients.get(&x).context("no gradient of x")?.clone();
    Ok([y, dx])
}

/// A distance of two vectors.
type Measure = fn(&[f64], &[f64]) -> f64;
const MEASURES: [(&str, Measure); 2] = [("rms", rms_error), ("max", max_error)];

/// An error of y or dx, and the tolerance that the head of this file derives.
struct Comparison {
    what: String,
    error: f64,
    tolerance: f64,
}

/// Compares y and dx with transformers, in the root mean square and in the largest element.
fn compare(golden: &Golden, order: Order, run: Run) -> Result<Vec<Comparison>> {
    let layer = layer(golden, run)?;
    let what = format!("{} {order:?} {:?} {}", golden.name, run.dtype, layer.ffn.kernel());
    let found = y_and_dx(&layer, order, golden, run.dtype)?;
    let (u, u_f32) = (unit_roundoff(run.dtype), unit_roundoff(DType::F32));
    let mut all = vec![];
    for (name, found) in ["y", "dx"].into_iter().zip(&found) {
        let exact = golden.tensor(&format!("{name}_f64"))?;
        ensure!(found.dtype() == run.dtype && found.dims() == exact.dims(), "{what}: {found:?}");
        let (found, exact) = (values(found)?, values(exact)?);
        let theirs = values(golden.tensor(name)?)?;
        for (measure_name, measure) in MEASURES {
            let size = measure(&exact, &vec![0.0; exact.len()]);
            let tolerance = 2.0 * measure(&theirs, &exact) + u_f32 * size;
            all.push(Comparison {
                what: format!("{what} {name} {measure_name}"),
                error: measure(&found, &exact),
                tolerance: tolerance * (u / u_f32),
            });
        }
    }
    Ok(all)
}

#[test]
fn a_layer_of_cohere_and_its_gradient() -> Result<()> {
    for golden in Golden::folder("parallel", 4)? {
        for run in RUNS {
            for Comparison { what, error, tolerance } in compare(&golden, Order::Parallel, run)? {
                eprintln!("{what}: {:.3} of the tolerance", error / tolerance);
                ensure!(error <= tolerance, "{what}: error {error:e}, tolerance {tolerance:e}");
            }
        }
    }
    Ok(())
}

/// Another order changes y and dx by about their own size, which is some 10⁶ tolerances in f32.
#[test]
fn another_order_is_far_outside_the_tolerance() -> Result<()> {
    for golden in Golden::folder("parallel", 4)? {
        for run in RUNS {
            for order in [Order::Serial, Order::FfnOfX] {
                for Comparison { what, error, tolerance } in compare(&golden, order, run)? {
                    eprintln!("{what}: {:.1e} tolerances", error / tolerance);
                    ensure!(
                        error >= 1e5 * tolerance,
                        "{what}: error {error:e}, tolerance {tolerance:e}"
                    );
                }
            }
        }
    }
    Ok(())
}
