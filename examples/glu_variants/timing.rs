//! The time of every variant: of a training step without the optimizer, of a block, and of the
//! activation alone. The variants are measured in turn, in many rounds, so that they share the
//! drift of the machine.
//!
//! Gated blocks are measured as the one fused layer that the runs train, and as separate operations
//! like the blocks without a gate. Only separate operations differ by the formula alone.

use std::hint::black_box;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Instant;

use anyhow::{Context, Result};
use candle_core::{DType, Device, Tensor, Var};
use candle_nn::{VarBuilder, VarMap};

use crate::ffn::activate;
use crate::model::Mlp;
use crate::settings::Settings;
use crate::statistics::quartiles;
use crate::table::Table;
use crate::task::Task;
use crate::variables::by_name;
use crate::variant::Variant;

/// Rounds of the measurements at the size of the model, and at a large size.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Rounds {
    pub(crate) model: usize,
    pub(crate) large: usize,
}

/// The sizes of a block, and the rows of its input.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Size {
    pub(crate) hidden_size: usize,
    pub(crate) intermediate_size: usize,
    pub(crate) rows: usize,
}

/// What is measured.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Plan {
    pub(crate) rounds: Rounds,
    pub(crate) large: Size,
}

impl Plan {
    /// The large size is the block of a LLaMA of 1 billion parameters.
    pub(crate) fn usual() -> Self {
        let large = Size { hidden_size: 2048, intermediate_size: 8192, rows: 512 };
        Self { rounds: Rounds { model: 30, large: 11 }, large }
    }

    pub(crate) fn smoke() -> Self {
        let large = Size { hidden_size: 32, intermediate_size: 64, rows: 4 };
        Self { rounds: Rounds { model: 3, large: 3 }, large }
    }
}

/// Measures everything. `times.csv` is written after every case.
pub(crate) fn measure(task: &Task, plan: Plan, out: &Path) -> Result<()> {
    let mut times = Times::new(out);
    let inputs = task.batch(1, 0)?.inputs;
    let small = Size {
        hidden_size: task.settings.hidden_size,
        intermediate_size: task.settings.intermediate_size,
        rows: inputs.elem_count(),
    };
    model(task, small, plan.rounds.model, &mut times)?;
    let case = Case { part: "block", size: small, dtype: DType::F32, pass: BOTH };
    blocks(&task.settings, case, plan.rounds.model, &mut times)?;
    for dtype in [DType::F32, DType::BF16] {
        let case = Case { part: "block", size: plan.large, dtype, pass: FORWARD };
        blocks(&task.settings, case, plan.rounds.large, &mut times)?;
        blocks(&task.settings, Case { pass: BOTH, ..case }, plan.rounds.large, &mut times)?;
        activations(Case { part: "activation", ..case }, plan.rounds.large, &mut times)?;
    }
    Ok(())
}

const FORWARD: &str = "forward";
const BOTH: &str = "forward+backward";
const FUSED: &str = "fused";
const SEPARATE: &str = "separate";

#[derive(Clone, Copy, Debug)]
struct Case {
    part: &'static str,
    size: Size,
    dtype: DType,
    pass: &'static str,
}

/// A variant, whether its operations are fused or separate, and the function that is timed.
type Competitor<'a> = (Variant, &'static str, Box<dyn Fn() -> Result<()> + 'a>);

/// The model's loss on one batch and its gradients, with the blocks that the runs train.
fn model(task: &Task, size: Size, rounds: usize, times: &mut Times) -> Result<()> {
    let batch = &task.batch(1, 0)?;
    let step = |variant: Variant| -> Result<Competitor<'_>> {
        let model = variant.load(&task.settings, task.vocab_size(), &VarMap::new())?;
        let operations = if variant.is_gated() { FUSED } else { SEPARATE };
        let run = move || {
            black_box(candle_swiglu::backward(&batch.loss(&model)?)?);
            Ok(())
        };
        Ok((variant, operations, Box::new(run)))
    };
    let competitors = Variant::ALL.into_iter().map(step).collect::<Result<Vec<_>>>()?;
    let case = Case { part: "model", size, dtype: DType::F32, pass: BOTH };
    times.add(case, rounds, &competitors)
}

/// One block. The forward pass alone has constant weights, as in inference; with a backward pass
/// the weights and the input are variables.
fn blocks(settings: &Settings, case: Case, rounds: usize, times: &mut Times) -> Result<()> {
    let Size { hidden_size, intermediate_size, rows } = case.size;
    let settings = &Settings { hidden_size, intermediate_size, ..settings.clone() };
    let x = Tensor::randn(0f32, 1.0, (rows, hidden_size), &Device::Cpu)?.to_dtype(case.dtype)?;
    let x = &Var::from_tensor(&x)?;
    // Blocks with equal shapes share their weights.
    let weights = [VarMap::new(), VarMap::new()];
    let mut competitors: Vec<Competitor> = vec![];
    for variant in Variant::ALL {
        let vars = &weights[usize::from(variant.is_gated())];
        let trained = VarBuilder::from_varmap(vars, case.dtype, &Device::Cpu);
        let mut kinds = vec![SEPARATE];
        kinds.extend(variant.is_gated().then_some(FUSED));
        for operations in kinds {
            let build = |vb: VarBuilder| match operations {
                FUSED => variant.fused(settings, vb),
                _ => variant.separate(settings, vb),
            };
            let block = build(trained.clone())?; // creates the variables
            let run: Box<dyn Fn() -> Result<()>> = match case.pass {
                FORWARD => {
                    let constants = by_name(vars).into_iter();
                    let constants = constants.map(|(name, var)| (name, var.as_detached_tensor()));
                    let constants = constants.collect();
                    let vb = VarBuilder::from_tensors(constants, case.dtype, &Device::Cpu);
                    forward(build(vb)?, x.as_detached_tensor())
                }
                _ => forward_backward(block, x),
            };
            competitors.push((variant, operations, run));
        }
    }
    times.add(case, rounds, &competitors)
}

fn forward<'a>(block: Arc<dyn Mlp>, x: Tensor) -> Box<dyn Fn() -> Result<()> + 'a> {
    Box::new(move || {
        black_box(block.forward(&x)?);
        Ok(())
    })
}

fn forward_backward(block: Arc<dyn Mlp>, x: &Var) -> Box<dyn Fn() -> Result<()> + '_> {
    Box::new(move || {
        black_box(candle_swiglu::backward(&block.forward(x)?)?);
        Ok(())
    })
}

/// h from its inputs: act(g)·u of the width I, or act(g) of the width 3/2·I.
fn activations(case: Case, rounds: usize, times: &mut Times) -> Result<()> {
    let competitor = |variant: Variant| -> Result<Competitor<'_>> {
        let units = variant.units(case.size.intermediate_size);
        let random = || {
            let values = Tensor::randn(0f32, 1.0, (case.size.rows, units), &Device::Cpu)?;
            values.to_dtype(case.dtype)
        };
        let (pre, factor) = (random()?, variant.is_gated().then(random).transpose()?);
        let run = move || {
            black_box(activate(variant.activation(), &pre, factor.as_ref())?);
            Ok(())
        };
        Ok((variant, SEPARATE, Box::new(run)))
    };
    let competitors = Variant::ALL.into_iter().map(competitor).collect::<Result<Vec<_>>>()?;
    times.add(case, rounds, &competitors)
}

/// The table of the times, and its file.
struct Times {
    table: Table,
    path: PathBuf,
}

impl Times {
    fn new(out: &Path) -> Self {
        let table = Table::new(&[
            "part",
            "hidden_size",
            "intermediate_size",
            "rows",
            "dtype",
            "pass",
            "variant",
            "operations",
            "rounds",
            "seconds_first_quartile",
            "seconds_median",
            "seconds_third_quartile",
            "ratio_to_relu",
        ]);
        Self { table, path: out.join("times.csv") }
    }

    /// Measures the competitors in turn, after one call of each that does not count. The first is
    /// ReLU.
    fn add(&mut self, case: Case, rounds: usize, competitors: &[Competitor]) -> Result<()> {
        let mut seconds = vec![vec![]; competitors.len()];
        for round in 0..=rounds {
            for ((_, _, run), seconds) in competitors.iter().zip(&mut seconds) {
                let start = Instant::now();
                run()?;
                if round > 0 {
                    seconds.push(start.elapsed().as_secs_f64());
                }
            }
        }
        let relu = seconds.first().context("competitors: none")?;
        for ((variant, operations, _), seconds) in competitors.iter().zip(&seconds) {
            let ratios: Vec<f64> = seconds.iter().zip(relu).map(|(own, relu)| own / relu).collect();
            let ([first, median, third], [_, ratio, _]) = (quartiles(seconds), quartiles(&ratios));
            self.table.push(&[
                &case.part,
                &case.size.hidden_size,
                &case.size.intermediate_size,
                &case.size.rows,
                &case.dtype.as_str(),
                &case.pass,
                &variant.name(),
                operations,
                &rounds,
                &first,
                &median,
                &third,
                &ratio,
            ])?;
        }
        self.table.write(&self.path)
    }
}
