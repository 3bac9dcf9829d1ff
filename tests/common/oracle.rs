//! The block and its gradients in f64, by loops. Each number has a bound of the error that
//! arithmetic with unit roundoff u may cause, for any order of the sums:
//!
//! 1. a sum of n products: γ·Σ|a||b| with γ = n·u / (1 - n·u), plus the propagated errors of a and
//!    b;
//! 2. act(g): 1.13·|δg|, with the steepest slope of the family, plus the documented units of u;
//! 3. act'(g): the same with the largest curvature, and the whole jump if a kink is within δg.

use std::collections::{BTreeMap, HashMap};

use anyhow::Result;
use candle_core::{DType, Tensor};
use candle_swiglu::{FfnConfig, Glu, GluActivation, Lora, reference};

use super::{unit_roundoff, values};

// ---------------------------------------------------------------- a number and its error bound

#[derive(Clone, Copy, Debug)]
pub(crate) struct Near {
    pub(crate) value: f64,
    pub(crate) error: f64,
}

impl Near {
    pub(crate) fn exact(value: f64) -> Self {
        Self { value, error: 0.0 }
    }

    fn largest(self) -> f64 {
        self.value.abs() + self.error
    }

    fn times(self, other: Self, u: f64) -> Self {
        let carried = self.value.abs() * other.error + self.error * other.largest();
        Self {
            value: self.value * other.value,
            error: carried + u * self.largest() * other.largest(),
        }
    }

    fn plus(self, other: Self, u: f64) -> Self {
        let value = self.value + other.value;
        let carried = self.error + other.error;
        Self { value, error: carried + u * (value.abs() + carried) }
    }

    /// After one more rounding with unit roundoff u. Below the normal numbers its error is `tiny`.
    fn rounded(self, u: f64, tiny: f64) -> Self {
        Self { error: self.error + (u * self.largest()).max(tiny), ..self }
    }

    fn within(self, kink: f64) -> bool {
        (self.value - kink).abs() <= self.error
    }
}

/// The documented relative error of act(g)·up in units of u. Swish has one more |βg|, because β is
/// rounded to f32. The error stops growing where the exponential is 0 (e⁻⁷⁵⁰ in f64).
pub(crate) fn glu_units(activation: GluActivation, g: f64) -> f64 {
    match activation {
        GluActivation::Silu | GluActivation::Sigmoid => 8.0,
        GluActivation::Swish { beta } => 8.0 + 2.0 * (f64::from(beta) * g).abs().min(750.0),
        GluActivation::Relu | GluActivation::Identity => 1.0,
        GluActivation::Relu2 => 2.0,
        GluActivation::Gelu => 14.0,
        GluActivation::GeluTanh => 8.0 + 4.0 * (1.6 * g + 0.0714 * g * g * g).abs().min(750.0),
        other => unimplemented!("no bound is known for {other}"),
    }
}

/// The sum of the magnitudes of the terms of act'(g): act' = s + g·s' for act = g·s.
pub(crate) fn slope_size(activation: GluActivation, g: f64) -> f64 {
    let (a, da) = reference::activation(activation, g);
    match activation {
        GluActivation::Sigmoid | GluActivation::Relu | GluActivation::Identity => da.abs(),
        _ if g == 0.0 => da.abs(),
        _ => (a / g).abs() + (da - a / g).abs(),
    }
}

const STEEPEST: f64 = 1.13; // gelu'(√2) = 1.129; silu' stays below 1.1

/// The largest |act'| within `error` of g.
fn steepest(activation: GluActivation, g: f64, error: f64) -> f64 {
    match activation {
        GluActivation::Relu2 => 2.0 * (g.abs() + error),
        _ => STEEPEST,
    }
}

fn curvature(activation: GluActivation) -> f64 {
    match activation {
        GluActivation::Swish { beta } => 0.5 * f64::from(beta).abs(),
        GluActivation::Relu | GluActivation::Identity => 0.0,
        GluActivation::Relu2 => 2.0,
        _ => 0.8, // gelu''(0) = 0.798, silu''(0) = 0.5
    }
}

/// act(min(m·gate, limit)), its slope in gate, clamp(up) + c, and its slope in up.
fn glu_factors(op: &Glu, gate: Near, up: Near, u: f64) -> [Near; 4] {
    let limit = op.limit.map_or(f64::INFINITY, f64::from);
    let m = f64::from(op.gate_multiplier);
    let g = gate.times(Near::exact(m), if m == 1.0 { 0.0 } else { u });
    let bounded = g.value.min(limit);
    let (a, da) = reference::activation(op.activation, bounded);
    let units = u * glu_units(op.activation, bounded);
    let steepest = steepest(op.activation, bounded, g.error);
    let act = Near { value: a, error: steepest * g.error + units * a.abs() };
    let kink = g.within(limit) || (op.activation == GluActivation::Relu && g.within(0.0));
    let blurred = curvature(op.activation) * g.error + units * slope_size(op.activation, bounded);
    let slope = Near {
        value: if g.value > limit { 0.0 } else { m * da },
        error: m.abs() * (blurred + if kink { steepest } else { 0.0 }),
    };
    let bounded_up = Near { value: up.value.clamp(-limit, limit), error: up.error };
    let up_kink = Near { value: up.value.abs(), error: up.error }.within(limit);
    let passes = Near { value: f64::from(up.value.abs() <= limit), error: f64::from(up_kink) };
    let offset = f64::from(op.up_offset);
    [act, slope, bounded_up.plus(Near::exact(offset), if offset == 0.0 { 0.0 } else { u }), passes]
}

// ---------------------------------------------------------------- matrices of such numbers

#[derive(Clone, Debug)]
pub(crate) struct Matrix {
    rows: usize,
    columns: usize,
    elements: Vec<Near>,
}

impl Matrix {
    /// The exact elements of a matrix, or of a vector as one row.
    pub(crate) fn exact(tensor: &Tensor) -> Result<Self> {
        let (rows, columns) =
            if tensor.rank() == 1 { (1, tensor.dim(0)?) } else { tensor.dims2()? };
        Ok(Self { rows, columns, elements: values(tensor)?.into_iter().map(Near::exact).collect() })
    }

    fn from_fn(rows: usize, columns: usize, mut f: impl FnMut(usize, usize) -> Near) -> Self {
        let elements = (0..rows * columns).map(|i| f(i / columns, i % columns)).collect();
        Self { rows, columns, elements }
    }

    fn at(&self, row: usize, column: usize) -> Near {
        self.elements[row * self.columns + column]
    }

    pub(crate) fn values(&self) -> Vec<f64> {
        self.elements.iter().map(|e| e.value).collect()
    }

    pub(crate) fn errors(&self) -> Vec<f64> {
        self.elements.iter().map(|e| e.error).collect()
    }

    fn map(&self, f: impl Fn(Near) -> Near) -> Self {
        Self { elements: self.elements.iter().map(|&e| f(e)).collect(), ..*self }
    }

    fn scaled(&self, factor: Near, u: f64) -> Self {
        self.map(|e| e.times(factor, u))
    }

    fn transposed(&self) -> Self {
        Self::from_fn(self.columns, self.rows, |r, c| self.at(c, r))
    }

    /// self (M,K) · w (N,K)ᵀ -> (M,N), sums in any order
    fn times_transposed(&self, w: &Self, u: f64) -> Self {
        let n = self.columns as f64 * u;
        let gamma = n / (1.0 - n);
        Self::from_fn(self.rows, w.rows, |r, c| {
            let mut sum = Near::exact(0.0);
            for k in 0..self.columns {
                let product = self.at(r, k).times(w.at(c, k), gamma);
                sum = Near { value: sum.value + product.value, error: sum.error + product.error };
            }
            sum
        })
    }

    /// Sums of the columns, (1,N).
    fn column_sums(&self, u: f64) -> Self {
        let ones = Self::from_fn(1, self.rows, |_, _| Near::exact(1.0));
        ones.times_transposed(&self.transposed(), u)
    }

    fn plus(&self, other: &Self, u: f64) -> Self {
        Self::from_fn(self.rows, self.columns, |r, c| {
            self.at(r, c).plus(other.at(r % other.rows, c), u)
        })
    }
}

impl Pair {
    /// The gradient of u = x·Aᵀ: s·d·B
    fn du(&self, d: &Matrix, u: f64) -> Matrix {
        d.times_transposed(&self.b.transposed(), u).scaled(self.scale, u)
    }

    /// dA = duᵀ·x and dB = s·dᵀ·u
    fn gradients(&self, x: &Matrix, d: &Matrix, u: f64) -> [Matrix; 2] {
        let da = self.du(d, u).transposed().times_transposed(&x.transposed(), u);
        let low = x.times_transposed(&self.a, u);
        let db = d.transposed().times_transposed(&low.transposed(), u).scaled(self.scale, u);
        [da, db]
    }
}

// ---------------------------------------------------------------- the oracle

/// A block over separate projections, in f64, with error bounds.
pub(crate) struct Block {
    op: Glu,
    down_multiplier: f64,
    weights: HashMap<String, Matrix>,
    pairs: HashMap<String, Pair>,
}

/// A low-rank pair: A (r,in), B (out,r), s.
struct Pair {
    a: Matrix,
    b: Matrix,
    scale: Near,
}

/// `act`, multipliers, limit and offset of a config.
pub(crate) fn glu_of(cfg: &FfnConfig) -> Glu {
    let op = Glu::new(cfg.activation)
        .with_gate_multiplier(cfg.gate_multiplier)
        .with_up_offset(cfg.up_offset);
    cfg.limit.map_or(op, |limit| op.with_limit(limit))
}

impl Block {
    /// `weights`: `{gate,up,down}_proj.weight` and optionally `{gate,up,down}_proj.bias`; other
    /// tensors are ignored.
    pub(crate) fn new(cfg: &FfnConfig, weights: &HashMap<String, Tensor>) -> Result<Self> {
        let mut found = HashMap::new();
        for name in ["gate_proj", "up_proj", "down_proj"] {
            for name in [format!("{name}.weight"), format!("{name}.bias")] {
                if let Some(tensor) = weights.get(&name) {
                    found.insert(name, Matrix::exact(tensor)?);
                }
            }
        }
        Ok(Self {
            op: glu_of(cfg),
            down_multiplier: f64::from(cfg.down_multiplier),
            weights: found,
            pairs: HashMap::new(),
        })
    }

    /// Adds a low-rank pair to a projection.
    pub(crate) fn with_pair(mut self, projection: &str, lora: &Lora) -> Result<Self> {
        let (a, b) = (Matrix::exact(lora.a())?, Matrix::exact(lora.b())?);
        let pair = Pair { a, b, scale: Near::exact(lora.scale()) };
        self.pairs.insert(projection.to_string(), pair);
        Ok(self)
    }

    fn project(&self, x: &Matrix, name: &str, u: f64) -> Matrix {
        let mut product = x.times_transposed(&self.weights[&format!("{name}.weight")], u);
        if let Some(Pair { a, b, scale }) = self.pairs.get(name) {
            let low_rank = x.times_transposed(a, u).times_transposed(b, u).scaled(*scale, u);
            product = product.plus(&low_rank, u);
        }
        self.weights
            .get(&format!("{name}.bias"))
            .map_or(product.clone(), |bias| product.plus(bias, u))
    }

    /// The gradient of a projection's input, from that of its output.
    fn project_back(&self, d: &Matrix, name: &str, u: f64) -> Matrix {
        let back = d.times_transposed(&self.weights[&format!("{name}.weight")].transposed(), u);
        match self.pairs.get(name) {
            Some(pair) => back.plus(&pair.du(d, u).times_transposed(&pair.a.transposed(), u), u),
            None => back,
        }
    }

    fn scale(&self, y: &Matrix, u: f64) -> Matrix {
        let d = self.down_multiplier;
        y.scaled(Near::exact(d), if d == 1.0 { 0.0 } else { u })
    }

    /// x (M,H) -> y (M,H)
    pub(crate) fn forward(&self, x: &Tensor, u: f64) -> Result<Matrix> {
        self.forward_rounded(x, u, None)
    }

    /// The same with sums of unit roundoff u. If `dtype` is given, gate and up, h and y are rounded
    /// to it once each.
    pub(crate) fn forward_rounded(
        &self,
        x: &Tensor,
        u: f64,
        dtype: Option<DType>,
    ) -> Result<Matrix> {
        let store = |matrix: Matrix| match dtype {
            Some(dtype) => {
                let tiny = if dtype == DType::F16 { 2f64.powi(-25) } else { 0.0 };
                matrix.map(|near| near.rounded(unit_roundoff(dtype), tiny))
            }
            None => matrix,
        };
        let x = Matrix::exact(x)?;
        let (gate, up) =
            (store(self.project(&x, "gate_proj", u)), store(self.project(&x, "up_proj", u)));
        let h = Matrix::from_fn(gate.rows, gate.columns, |r, c| {
            let [act, _, up, _] = glu_factors(&self.op, gate.at(r, c), up.at(r, c), u);
            act.times(up, u)
        });
        Ok(store(self.scale(&self.project(&store(h), "down_proj", u), u)))
    }

    /// x, dy (M,H) -> `dx` (M,H) and `d<weight>`, the gradients of <y, dy>
    pub(crate) fn gradients(
        &self,
        x: &Tensor,
        dy: &Tensor,
        u: f64,
    ) -> Result<BTreeMap<String, Matrix>> {
        let (x, dy) = (Matrix::exact(x)?, self.scale(&Matrix::exact(dy)?, u));
        let (gate, up) = (self.project(&x, "gate_proj", u), self.project(&x, "up_proj", u));
        let dh = self.project_back(&dy, "down_proj", u); // (M,I)
        let pair = |f: &dyn Fn([Near; 4], Near) -> Near| {
            Matrix::from_fn(dh.rows, dh.columns, |r, c| {
                f(glu_factors(&self.op, gate.at(r, c), up.at(r, c), u), dh.at(r, c))
            })
        };
        let h = pair(&|[act, _, up, _], _| act.times(up, u));
        let dgate = pair(&|[_, slope, up, _], dh| dh.times(up, u).times(slope, u));
        let dup = pair(&|[act, _, _, passes], dh| dh.times(act, u).times(passes, 0.0));
        let back = |d: &Matrix, name| self.project_back(d, name, u);
        let dx = back(&dgate, "gate_proj").plus(&back(&dup, "up_proj"), u);
        let mut all = BTreeMap::from([("dx".to_string(), dx)]);
        for (name, d, input) in
            [("gate_proj", &dgate, &x), ("up_proj", &dup, &x), ("down_proj", &dy, &h)]
        {
            all.insert(
                format!("d{name}.weight"),
                d.transposed().times_transposed(&input.transposed(), u),
            );
            if self.weights.contains_key(&format!("{name}.bias")) {
                all.insert(format!("d{name}.bias"), d.column_sums(u));
            }
            if let Some(pair) = self.pairs.get(name) {
                let [da, db] = pair.gradients(input, d, u);
                all.insert(format!("d{name}.lora_A"), da);
                all.insert(format!("d{name}.lora_B"), db);
            }
        }
        Ok(all)
    }
}
