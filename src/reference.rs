//! The definition: the block in three loops and f64 sums. Everything else in this crate is tested
//! against it, and f64 tensors are computed by its scalar functions.

use crate::gate::activation::{Glu, GluActivation};

/// σ(z) = 1 / (1 + e⁻ᶻ) without overflow, and its derivative σ(z)·σ(-z).
fn sigmoid(z: f64) -> (f64, f64) {
    let t = (-z.abs()).exp();
    let q = 1.0 / (1.0 + t);
    (if z < 0.0 { t * q } else { q }, t * q * q)
}

/// Φ(x) = ½ erfc(-x / √2).
fn normal_cdf(x: f64) -> f64 {
    0.5 * libm::erfc(-x * std::f64::consts::FRAC_1_SQRT_2)
}

fn normal_pdf(x: f64) -> f64 {
    const INV_SQRT_2PI: f64 = 0.398_942_280_401_432_7;
    INV_SQRT_2PI * (-0.5 * x * x).exp()
}

/// 0·∞ never arises from a tail that is exactly zero: beyond ±`bound` the finite bound stands in
/// for x.
fn bounded(x: f64, bound: f64) -> f64 {
    if x > bound {
        bound
    } else if x < -bound {
        -bound
    } else {
        x
    }
}

/// g·s for a factor s in [0, 1] that has vanished where g is very negative: -0 there, also for g =
/// -∞.
fn times_tail(g: f64, s: f64) -> f64 {
    if s == 0.0 { -0.0 } else { g * s }
}

/// act(g) and act'(g) in f64; act(-∞) is -0 where act has a tail there, and NaN gives NaN.
pub fn activation(activation: GluActivation, g: f64) -> (f64, f64) {
    match activation {
        GluActivation::Silu => swish(g, 1.0),
        GluActivation::Swish { beta } => swish(g, f64::from(beta)),
        GluActivation::Sigmoid => sigmoid(g),
        GluActivation::Relu if g <= 0.0 => (0.0, 0.0),
        GluActivation::Relu => (g, 1.0),
        GluActivation::Gelu => gelu(g),
        GluActivation::GeluTanh => gelu_tanh(g),
        GluActivation::Identity => (g, 1.0),
        GluActivation::Relu2 if g <= 0.0 => (0.0, 0.0),
        GluActivation::Relu2 => (g * g, 2.0 * g),
    }
}

/// g·σ(βg), whose derivative is σ + βg·σ'.
fn swish(g: f64, beta: f64) -> (f64, f64) {
    let z = bounded(beta * g, 800.0);
    let (s, ds) = sigmoid(z);
    (times_tail(g, s), s + z * ds)
}

fn gelu(g: f64) -> (f64, f64) {
    let x = bounded(g, 40.0);
    let cdf = normal_cdf(x);
    (times_tail(g, cdf), cdf + x * normal_pdf(x))
}

/// g·σ(v), v = √(8/π)·(g + 0.044715·g³): the same function as ½g(1 + tanh(v/2)), without its
/// cancellation.
fn gelu_tanh(g: f64) -> (f64, f64) {
    const K: f64 = 1.595_769_121_605_730_7;
    let x = bounded(g, 40.0);
    let (s, ds) = sigmoid(K * (x + 0.044715 * x * x * x));
    let dv = K * (1.0 + 3.0 * 0.044715 * x * x);
    (times_tail(g, s), s + x * ds * dv)
}

/// One element of [`Glu`]: `act(clamp(mg)) · (clamp(u) + c)`.
pub fn glu(glu: &Glu, gate: f64, up: f64) -> f64 {
    let (g, u, _) = glu_inputs(glu, gate, up);
    activation(glu.activation, g).0 * u
}

/// The gradients of one element: (dgate, dup).
pub fn glu_grad(glu: &Glu, gate: f64, up: f64, dy: f64) -> (f64, f64) {
    let (g, u, (in_gate, in_up)) = glu_inputs(glu, gate, up);
    let (a, da) = activation(glu.activation, g);
    let dgate = if in_gate { dy * u * da * f64::from(glu.gate_multiplier) } else { 0.0 };
    (dgate, if in_up { dy * a } else { 0.0 })
}

/// The activation's and the product's second argument, and whether each side lies within the limit.
fn glu_inputs(glu: &Glu, gate: f64, up: f64) -> (f64, f64, (bool, bool)) {
    let limit = glu.limit.map_or(f64::INFINITY, f64::from);
    let scaled = gate * f64::from(glu.gate_multiplier);
    let beyond = |x: f64| glu.limit.is_some() && x >= limit;
    let (beyond_gate, beyond_up) = (beyond(scaled), beyond(up.abs()));
    let g = if beyond_gate { limit } else { scaled };
    let u = bounded(up, limit) + f64::from(glu.up_offset);
    (g, u, (!beyond_gate, !beyond_up))
}

/// `y = (act(x·Wgᵀ) ⊙ (x·Wuᵀ))·Wdᵀ` with row-major x (M,H), gate_proj and up_proj (I,H), down_proj
/// (H,I) -> y (M,H).
///
/// # Panics
/// When a slice is not a whole number of rows: this is the tests' definition, not an entry point.
pub fn ffn(
    glu_op: &Glu,
    x: &[f64],
    gate_proj: &[f64],
    up_proj: &[f64],
    down_proj: &[f64],
    hidden_size: usize,
) -> Vec<f64> {
    let dot = |a: &[f64], b: &[f64]| -> f64 { a.iter().zip(b).map(|(a, b)| a * b).sum() };
    let mut y = Vec::with_capacity(x.len());
    for x_row in x.chunks_exact(hidden_size) {
        let units = gate_proj.chunks_exact(hidden_size).zip(up_proj.chunks_exact(hidden_size));
        let h: Vec<f64> =
            units.map(|(wg, wu)| glu(glu_op, dot(x_row, wg), dot(x_row, wu))).collect();
        y.extend(down_proj.chunks_exact(h.len()).map(|wd| dot(&h, wd)));
    }
    y
}
