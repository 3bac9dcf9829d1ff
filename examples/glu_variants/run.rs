//! One run: a variant trained with one seed, which continues exactly where a kill stopped it.

use std::path::{Path, PathBuf};
use std::time::Instant;

use anyhow::{Context, Result};
use candle_core::{Device, Tensor, Var};
use candle_nn::{ParamsAdamW, VarMap};
use rand::SeedableRng;
use rand::rngs::StdRng;

use crate::adamw::AdamW;
use crate::batch::mean_loss;
use crate::files;
use crate::model::Llama;
use crate::schedule::learning_rate;
use crate::task::Task;
use crate::variables::{by_name, draw};
use crate::variant::Variant;

/// The state of a run after a number of steps.
pub(crate) struct Run<'a> {
    pub(crate) task: &'a Task,
    pub(crate) variant: Variant,
    pub(crate) seed: u64,
    pub(crate) vars: VarMap,
    pub(crate) model: Llama,
    optimizer: AdamW,
    pub(crate) log: Log,
    dir: PathBuf,
}

/// What was measured during training.
#[derive(Clone, Debug, Default, PartialEq)]
pub(crate) struct Log {
    /// The training loss of each step.
    pub(crate) losses: Vec<f64>,
    /// The time of each step: forward, backward and optimizer.
    pub(crate) seconds: Vec<f64>,
    /// The held-out loss after every `curve_every` steps and after the last.
    pub(crate) curve: Vec<f64>,
}

/// The directory of a run.
pub(crate) fn dir(out: &Path, variant: Variant, seed: u64) -> PathBuf {
    out.join("runs").join(format!("{}-{seed}", variant.name()))
}

impl<'a> Run<'a> {
    /// A new run, or the one whose state is in its directory under `out`.
    pub(crate) fn open(task: &'a Task, variant: Variant, seed: u64, out: &Path) -> Result<Self> {
        let dir = dir(out, variant, seed);
        std::fs::create_dir_all(&dir).with_context(|| dir.display().to_string())?;
        let vars = VarMap::new();
        let model = variant.load(&task.settings, task.vocab_size(), &vars)?;
        for (name, var) in by_name(&vars) {
            initialise(&name, &var, task.settings.layers, seed)?;
        }
        let params =
            ParamsAdamW { lr: 0.0, beta1: 0.9, beta2: 0.98, eps: 1e-8, weight_decay: 0.05 };
        let optimizer = AdamW::new(by_name(&vars), params)?;
        let log = Log::default();
        let mut run = Self { task, variant, seed, vars, model, optimizer, log, dir };
        if run.state().exists() {
            run.restore().with_context(|| run.state().display().to_string())?;
        }
        Ok(run)
    }

    /// The number of steps that are done.
    pub(crate) fn steps(&self) -> u64 {
        self.log.losses.len() as u64
    }

    pub(crate) fn is_trained(&self) -> bool {
        self.steps() >= self.task.settings.steps
    }

    /// Makes one step, and the measurement and the copy of the state that are due after it.
    pub(crate) fn advance(&mut self) -> Result<()> {
        let settings = &self.task.settings;
        let batch = self.task.batch(self.seed, self.steps())?;
        let start = Instant::now();
        let loss = batch.loss(&self.model)?;
        let lr = learning_rate(settings.lr, self.steps(), settings.steps);
        self.optimizer.step(&candle_swiglu::backward(&loss)?, lr)?;
        self.log.losses.push(f64::from(loss.to_scalar::<f32>()?));
        self.log.seconds.push(start.elapsed().as_secs_f64());
        let (steps, is_last) = (self.steps(), self.is_trained());
        let is_due = |every| steps.is_multiple_of(every) || is_last;
        if is_due(settings.curve_every) {
            self.log.curve.push(mean_loss(&self.model, &self.task.curve)?);
        }
        if is_due(settings.save_every) { self.save() } else { Ok(()) }
    }

    /// The step after which entry `i` of the curve was measured.
    pub(crate) fn curve_step(&self, i: usize) -> u64 {
        ((i as u64 + 1) * self.task.settings.curve_every).min(self.task.settings.steps)
    }

    fn state(&self) -> PathBuf {
        self.dir.join("state.safetensors")
    }

    fn save(&self) -> Result<()> {
        let mut tensors = self.optimizer.tensors();
        tensors.extend(self.log.tensors()?);
        files::replace(&self.state(), |path| {
            Ok(safetensors::serialize_to_file(tensors, None, path)?)
        })
    }

    fn restore(&mut self) -> Result<()> {
        let tensors = candle_core::safetensors::load(self.state(), &Device::Cpu)?;
        let numbers = |name: &str| {
            let tensor = tensors.get(name).with_context(|| format!("{name}: missing"))?;
            tensor.to_vec1::<f64>().with_context(|| name.to_string())
        };
        self.log = Log {
            losses: numbers("losses")?,
            seconds: numbers("seconds")?,
            curve: numbers("curve")?,
        };
        self.optimizer.restore(&tensors, self.log.losses.len())
    }
}

impl Log {
    fn tensors(&self) -> Result<Vec<(String, Tensor)>> {
        let lists = [("losses", &self.losses), ("seconds", &self.seconds), ("curve", &self.curve)];
        let tensor = |list: &[f64]| Tensor::from_slice(list, list.len(), &Device::Cpu);
        lists.into_iter().map(|(name, list)| Ok((name.to_string(), tensor(list)?))).collect()
    }

    /// The mean training loss of the last 50 steps.
    pub(crate) fn training_loss(&self) -> f64 {
        let last = &self.losses[self.losses.len().saturating_sub(50)..];
        last.iter().sum::<f64>() / last.len() as f64
    }
}

/// Draws a matrix from random numbers that depend on the seed and the name only, so that variants
/// differ only where their blocks do.
fn initialise(name: &str, var: &Var, layers: usize, seed: u64) -> Result<()> {
    // FNV-1a, from the seed instead of its offset
    let mix = |hash: u64, byte| (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3);
    let mixed = name.bytes().fold(seed, mix);
    draw(name, var, layers, &mut StdRng::seed_from_u64(mixed))
}
