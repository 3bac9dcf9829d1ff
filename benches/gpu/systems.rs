//! The systems that are compared, all with the same numbers.

use anyhow::{Result, ensure};
use candle_core::{D, DType, Device, Tensor};
use candle_nn::Module;
use candle_swiglu::{
    CudaPrefill, FfnConfig, FusedOrder, GateUp, Linear, SwiGluFfn, Weights as BlockWeights,
    force_cuda_prefill,
};

/// The n-th call of a system, with the n-th set of weights.
pub(crate) type Call<'a> = dyn Fn(usize) -> Result<()> + 'a;

pub(crate) struct System<'a> {
    pub(crate) name: String,
    pub(crate) call: Box<Call<'a>>,
    pub(crate) sets: usize,
    pub(crate) rel_error: f64,
}

/// A block's weights: gate_up_proj (2I,H), gate's rows first, and down_proj (H,I).
struct Set {
    gate_up: Tensor,
    down: Tensor,
    ffn: SwiGluFfn,
    linear: Linear,
}

/// Sets of random weights, at least 600 MB together.
pub(crate) struct Weights {
    sets: Vec<Set>,
    device: Device,
    dtype: DType,
    h: usize,
    i: usize,
}

impl Weights {
    pub(crate) fn new(device: &Device, dtype: DType, h: usize, i: usize) -> Result<Self> {
        let bytes = 3 * h * i * dtype.size_in_bytes();
        let count = 600_000_000usize.div_ceil(bytes).max(2);
        let random = |rows: usize, k: usize| {
            Tensor::randn(0f32, (k as f32).powf(-0.5), (rows, k), device)?.to_dtype(dtype)
        };
        let set = |_| -> Result<Set> {
            let (gate_up, down) = (random(2 * i, h)?, random(h, i)?);
            let packed = GateUp::fused(gate_up.clone(), None, FusedOrder::GateFirst);
            let weights = BlockWeights::new(packed, down.clone(), None);
            let ffn = SwiGluFfn::from_weights(&FfnConfig::new(h, i), weights)?;
            let linear = Linear::new(down.clone(), None)?;
            Ok(Set { gate_up, down, ffn, linear })
        };
        let sets = (0..count).map(set).collect::<Result<_>>()?;
        Ok(Self { sets, device: device.clone(), dtype, h, i })
    }
}

/// One shape and number of rows.
pub(crate) struct Case<'a> {
    weights: &'a Weights,
    pub(crate) shape: &'static str,
    pub(crate) rows: usize,
    x: Tensor,
    /// The input of the product with down_proj alone, in place of h.
    h: Tensor,
}

impl<'a> Case<'a> {
    pub(crate) fn new(weights: &'a Weights, shape: &'static str, rows: usize) -> Result<Self> {
        let random = |columns: usize| {
            Tensor::randn(0f32, 1.0, (rows, columns), &weights.device)?.to_dtype(weights.dtype)
        };
        Ok(Self { weights, shape, rows, x: random(weights.h)?, h: random(weights.i)? })
    }

    pub(crate) fn device(&self) -> Result<Device> {
        Ok(self.weights.device.clone())
    }

    pub(crate) fn dtype(&self) -> DType {
        self.weights.dtype
    }

    pub(crate) fn hidden_size(&self) -> usize {
        self.weights.h
    }

    pub(crate) fn intermediate_size(&self) -> usize {
        self.weights.i
    }

    /// Weights, x and y.
    pub(crate) fn bytes(&self) -> f64 {
        let (h, i) = (self.weights.h as f64, self.weights.i as f64);
        (3.0 * h * i + 2.0 * self.rows as f64 * h) * self.weights.dtype.size_in_bytes() as f64
    }

    pub(crate) fn operations(&self) -> f64 {
        6.0 * self.rows as f64 * self.weights.h as f64 * self.weights.i as f64
    }

    /// The systems of this case, after a check of their results. `wanted` holds names without
    /// `+graph`; if it is empty, all systems are returned.
    pub(crate) fn systems(&'a self, wanted: &[String]) -> Result<Vec<System<'a>>> {
        let exact = self.exact()?;
        let mut systems = vec![];
        let mut add = |name: &str,
                       block: &'a dyn Fn(&Case<'a>, &Set) -> Result<Tensor>,
                       checked: bool|
         -> Result<()> {
            if !wanted.is_empty() && !wanted.iter().any(|system| system == name) {
                return Ok(());
            }
            let rel_error = if checked {
                rel_error(&block(self, &self.weights.sets[0])?, &exact)?
            } else {
                f64::NAN
            };
            let sets = &self.weights.sets;
            for suffix in ["", "+graph"] {
                let call = Box::new(move |n: usize| block(self, &sets[n % sets.len()]).map(drop));
                systems.push(System {
                    name: format!("{name}{suffix}"),
                    call,
                    sets: sets.len(),
                    rel_error,
                });
            }
            Ok(())
        };
        add("ours", &ours, true)?;
        if self.rows > 8 {
            add("ours-cublas", &ours_cublas, true)?;
            add("ours-fused", &ours_fused, true)?;
        }
        if self.rows <= 32 {
            add("down", &down, false)?;
            add("down-cublas", &down_cublas, false)?;
        }
        add("candle", &candle, true)?;
        add("candle-merged", &candle_merged, true)?;
        add("gemms", &gemms, false)?;
        let candle = rel_error(&candle(self, &self.weights.sets[0])?, &exact)?;
        for system in &systems {
            let error = system.rel_error;
            ensure!(
                error.is_nan() || error <= 4.0 * candle,
                "{}: error {error:e}, candle's {candle:e}",
                system.name
            );
        }
        Ok(systems)
    }

    /// y with the first set of weights in f64, for at most 256 rows.
    fn exact(&self) -> Result<Tensor> {
        let Set { gate_up, down, .. } = &self.weights.sets[0];
        let wide = |t: &Tensor| t.to_dtype(DType::F64);
        let p = wide(&self.x.narrow(0, 0, self.rows.min(256))?)?.matmul(&wide(gate_up)?.t()?)?;
        let (gate, up) =
            (p.narrow(1, 0, self.weights.i)?, p.narrow(1, self.weights.i, self.weights.i)?);
        let h = (&gate / (gate.neg()?.exp()? + 1.0)?)?.mul(&up)?;
        Ok(h.matmul(&wide(down)?.t()?)?)
    }
}

/// The rms of the difference divided by the rms of the exact value. A y that is not finite is an
/// error.
fn rel_error(y: &Tensor, exact: &Tensor) -> Result<f64> {
    let y = y.narrow(0, 0, exact.dim(0)?)?.to_dtype(DType::F64)?;
    let rms = |t: &Tensor| -> Result<f64> { Ok(t.sqr()?.mean_all()?.to_scalar::<f64>()?.sqrt()) };
    let error = rms(&(y - exact)?)? / rms(exact)?;
    ensure!(error.is_finite(), "y is not finite");
    Ok(error)
}

fn ours(case: &Case<'_>, set: &Set) -> Result<Tensor> {
    Ok(set.ffn.forward(&case.x)?)
}

fn forced(way: CudaPrefill, case: &Case<'_>, set: &Set) -> Result<Tensor> {
    force_cuda_prefill(Some(way));
    let y = ours(case, set);
    force_cuda_prefill(None);
    y
}

fn ours_cublas(case: &Case<'_>, set: &Set) -> Result<Tensor> {
    forced(CudaPrefill::Cublas, case, set)
}

fn ours_fused(case: &Case<'_>, set: &Set) -> Result<Tensor> {
    forced(CudaPrefill::Fused, case, set)
}

/// The product with down_proj alone, by `Linear`.
fn down(case: &Case<'_>, set: &Set) -> Result<Tensor> {
    Ok(set.linear.forward(&case.h)?)
}

fn down_cublas(case: &Case<'_>, set: &Set) -> Result<Tensor> {
    Ok(case.h.matmul(&set.down.t()?)?)
}

/// As in the LLaMA of candle-transformers.
fn candle(case: &Case<'_>, set: &Set) -> Result<Tensor> {
    let i = case.weights.i;
    let project = |half: usize| case.x.matmul(&set.gate_up.narrow(0, half * i, i)?.t()?);
    let h = (candle_nn::ops::silu(&project(0)?)? * project(1)?)?;
    Ok(h.matmul(&set.down.t()?)?)
}

fn candle_merged(case: &Case<'_>, set: &Set) -> Result<Tensor> {
    let p = case.x.matmul(&set.gate_up.t()?)?;
    let half = |start| p.narrow(D::Minus1, start, case.weights.i);
    let h = (candle_nn::ops::silu(&half(0)?)? * half(case.weights.i)?)?;
    Ok(h.matmul(&set.down.t()?)?)
}

/// The products with gate_up_proj and with down_proj alone.
fn gemms(case: &Case<'_>, set: &Set) -> Result<Tensor> {
    drop(case.x.matmul(&set.gate_up.t()?)?);
    Ok(case.h.matmul(&set.down.t()?)?)
}
