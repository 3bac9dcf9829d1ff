//! Which functions a small block can represent: blocks of equal parameters are fitted to functions
//! of two numbers.
//!
//! The input is (x, y, 1), so that every unit has a bias. The output is one number. x and y lie on
//! a grid of 21 x 21 points over [-1, 1]². All seeds of a block are fitted at the same time, as a
//! batch of matrices.

use std::collections::BTreeMap;
use std::f64::consts::PI;
use std::path::Path;

use anyhow::Result;
use candle_core::{Device, Tensor, Var};
use candle_nn::ParamsAdamW;
use rand::SeedableRng;
use rand::rngs::StdRng;
use rand_distr::{Distribution, StandardNormal};

use crate::adamw::AdamW;
use crate::ffn::activate;
use crate::schedule::learning_rate;
use crate::statistics::quartiles;
use crate::table::Table;
use crate::variant::Variant;

/// A function of x and y.
type Function = fn(f64, f64) -> f64;

/// The functions, under their names.
const FUNCTIONS: [(&str, Function); 3] = [
    ("x*y", |x, y| x * y),
    ("|x|", |x, _| x.abs()),
    ("sin(pi*(x+y))", |x, y| (PI * (x + y)).sin()),
];

/// Units of a gated block, of 7 parameters each; a block without a gate has units of 4 parameters.
const GATED_UNITS: usize = 8;
const SEEDS: usize = 8;
const LR: f64 = 0.03;

/// Fits every variant to every function for a number of steps and writes `fits.csv`.
pub(crate) fn measure(steps: u64, out: &Path) -> Result<()> {
    let mut table = Table::new(&[
        "function",
        "variant",
        "units",
        "parameters",
        "seeds",
        "root_mean_square_error_least",
        "root_mean_square_error_median",
    ]);
    for (name, function) in FUNCTIONS {
        for variant in Variant::ALL {
            let block = Block::new(variant)?;
            let errors = block.fit(function, steps)?;
            let least = errors.iter().copied().fold(f64::INFINITY, f64::min);
            let [_, median, _] = quartiles(&errors);
            let (units, parameters) = (block.units(), block.parameters());
            let variant = variant.name();
            table.push(&[&name, &variant, &units, &parameters, &SEEDS, &least, &median])?;
        }
    }
    table.write(&out.join("fits.csv"))
}

/// A block (x, y, 1) -> output for each seed.
struct Block {
    variant: Variant,
    /// `gate_proj` and `up_proj` (S,3,units), `down_proj` (S,units,1). Without a gate `up_proj` is
    /// the input of the activation.
    vars: BTreeMap<String, Var>,
}

impl Block {
    fn new(variant: Variant) -> Result<Self> {
        let units = match variant.is_gated() {
            true => GATED_UNITS,
            false => GATED_UNITS * 7 / 4,
        };
        let mut random = StdRng::seed_from_u64(1);
        let mut var = |rows: usize, columns: usize| -> Result<Var> {
            let count = SEEDS * rows * columns;
            let scale = 1.0 / (rows as f32).sqrt();
            let values = (0..count).map(|_| StandardNormal.sample(&mut random));
            let values: Vec<f32> = values.map(|z: f32| scale * z).collect();
            let values = Tensor::from_vec(values, (SEEDS, rows, columns), &Device::Cpu)?;
            Ok(Var::from_tensor(&values)?)
        };
        let mut vars = BTreeMap::from([
            ("up_proj".to_string(), var(3, units)?),
            ("down_proj".to_string(), var(units, 1)?),
        ]);
        if variant.is_gated() {
            vars.insert("gate_proj".to_string(), var(3, units)?);
        }
        Ok(Self { variant, vars })
    }

    fn units(&self) -> usize {
        self.vars["down_proj"].elem_count() / SEEDS
    }

    /// The parameters of one seed.
    fn parameters(&self) -> usize {
        self.vars.values().map(|var| var.elem_count()).sum::<usize>() / SEEDS
    }

    /// inputs (S,N,3) -> outputs (S,N)
    fn forward(&self, inputs: &Tensor) -> Result<Tensor> {
        let up = inputs.matmul(&self.vars["up_proj"])?;
        let gate = self.vars.get("gate_proj").map(|gate| inputs.matmul(gate)).transpose()?;
        let (pre, factor) = match gate {
            Some(gate) => (gate, Some(up)),
            None => (up, None),
        };
        let hidden = activate(self.variant.activation(), &pre, factor.as_ref())?;
        Ok(hidden.matmul(&self.vars["down_proj"])?.squeeze(2)?)
    }

    /// The root mean square error of each seed after the steps.
    fn fit(&self, function: Function, steps: u64) -> Result<Vec<f64>> {
        let (inputs, targets) = grid(function)?;
        let params =
            ParamsAdamW { lr: 0.0, beta1: 0.9, beta2: 0.99, eps: 1e-12, weight_decay: 0.0 };
        let mut optimizer = AdamW::new(self.vars.clone(), params)?;
        let squares = || anyhow::Ok(self.forward(&inputs)?.broadcast_sub(&targets)?.sqr()?);
        for step in 0..steps {
            // The seeds have no variable in common: their sum has the gradients of each.
            let loss = squares()?.mean(1)?.sum_all()?;
            optimizer.step(&loss.backward()?, learning_rate(LR, step, steps))?;
        }
        let errors = squares()?.mean(1)?.sqrt()?.to_vec1::<f32>()?;
        Ok(errors.into_iter().map(f64::from).collect())
    }
}

/// (S,N,3) inputs and (1,N) values of the function.
fn grid(function: Function) -> Result<(Tensor, Tensor)> {
    let points =
        (0..21 * 21).map(|i| (f64::from(i % 21) / 10.0 - 1.0, f64::from(i / 21) / 10.0 - 1.0));
    let inputs: Vec<f32> = points.clone().flat_map(|(x, y)| [x as f32, y as f32, 1.0]).collect();
    let targets: Vec<f32> = points.map(|(x, y)| function(x, y) as f32).collect();
    let count = targets.len();
    let inputs = Tensor::from_vec(inputs, (1, count, 3), &Device::Cpu)?;
    let inputs = inputs.broadcast_as((SEEDS, count, 3))?.contiguous()?;
    Ok((inputs, Tensor::from_vec(targets, (1, count), &Device::Cpu)?))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The weights of x, y and 1 in `gate_proj` and in `up_proj`, and the weight of the output.
    type Unit = ([f32; 3], [f32; 3], f32);

    fn block(variant: Variant, units: &[Unit]) -> Result<Block> {
        let matrix = |column: fn(&Unit) -> [f32; 3]| -> Result<Var> {
            let columns: Vec<Vec<f32>> = units.iter().map(|unit| column(unit).to_vec()).collect();
            let matrix = Tensor::new(columns, &Device::Cpu)?.t()?.unsqueeze(0)?;
            let shape = (SEEDS, 3, units.len());
            Ok(Var::from_tensor(&matrix.broadcast_as(shape)?.contiguous()?)?)
        };
        let down: Vec<f32> = units.iter().map(|unit| unit.2).collect();
        let down = Tensor::new(down, &Device::Cpu)?.reshape((1, units.len(), 1))?;
        let down = down.broadcast_as((SEEDS, units.len(), 1))?.contiguous()?;
        let vars = BTreeMap::from([
            ("gate_proj".to_string(), matrix(|unit| unit.0)?),
            ("up_proj".to_string(), matrix(|unit| unit.1)?),
            ("down_proj".to_string(), Var::from_tensor(&down)?),
        ]);
        Ok(Block { variant, vars })
    }

    fn largest_error(block: &Block, function: Function) -> Result<f32> {
        let (inputs, targets) = grid(function)?;
        let error = block.forward(&inputs)?.broadcast_sub(&targets)?.abs()?;
        Ok(error.max_all()?.to_scalar()?)
    }

    const X: [f32; 3] = [1.0, 0.0, 0.0];
    const MINUS_X: [f32; 3] = [-1.0, 0.0, 0.0];
    const Y: [f32; 3] = [0.0, 1.0, 0.0];

    /// Bilinear: one unit. ReGLU, GEGLU and SwiGLU: act(x) - act(-x) = x, so two units.
    #[test]
    fn gated_blocks_multiply_their_inputs() -> Result<()> {
        // Two activations of at most 14 units of 2⁻²⁴ and at most 1 each, their difference, and
        // the rounding of x, y and of the target x·y.
        let tolerance = (2.0 * 14.0 + 1.0 + 3.0) * 2f32.powi(-24);
        let one = block(Variant::Bilinear, &[(X, Y, 1.0)])?;
        assert!(largest_error(&one, |x, y| x * y)? <= tolerance);
        for variant in [Variant::ReGlu, Variant::GeGlu, Variant::SwiGlu] {
            let two = block(variant, &[(X, Y, 1.0), (MINUS_X, Y, -1.0)])?;
            let error = largest_error(&two, |x, y| x * y)?;
            assert!(error <= tolerance, "{variant:?}: {error}");
        }
        Ok(())
    }

    #[test]
    fn blocks_have_equal_parameters_and_a_fit_reduces_the_error() -> Result<()> {
        for variant in Variant::ALL {
            let block = Block::new(variant)?;
            assert_eq!(block.parameters(), 56, "{variant:?}");
            let before = block.fit(|x, y| x * y, 0)?;
            let after = block.fit(|x, y| x * y, 20)?;
            assert!(after.iter().sum::<f64>() < before.iter().sum(), "{variant:?}");
        }
        Ok(())
    }
}
