//! Tests of whole runs, with the sizes of `--smoke`.

use std::path::Path;

use anyhow::{Context, Result};

use crate::run::{Log, Run};
use crate::settings::Settings;
use crate::table::Table;
use crate::task::Task;
use crate::variables::by_name;
use crate::variant::Variant;
use crate::{experiment, probe, results, timing};

/// All weights, in the order of their names.
fn weights(run: &Run) -> Result<Vec<f32>> {
    let weights = by_name(&run.vars).into_values().map(|var| var.flatten_all()?.to_vec1());
    Ok(weights.collect::<candle_core::Result<Vec<Vec<f32>>>>()?.concat())
}

fn without_times(log: &Log) -> Log {
    Log { seconds: vec![], ..log.clone() }
}

#[test]
fn a_killed_run_continues_with_the_same_losses() -> Result<()> {
    let task = Task::new(Settings::smoke())?;
    for variant in [Variant::Gelu, Variant::SwiGlu] {
        let (whole, killed) = (tempfile::tempdir()?, tempfile::tempdir()?);
        let mut expected = Run::open(&task, variant, 1, whole.path())?;
        while !expected.is_trained() {
            expected.advance()?;
        }
        // Saved after two steps, lost after three.
        let mut first = Run::open(&task, variant, 1, killed.path())?;
        for _ in 0..3 {
            first.advance()?;
        }
        drop(first);
        let mut second = Run::open(&task, variant, 1, killed.path())?;
        assert_eq!(second.steps(), 2);
        while !second.is_trained() {
            second.advance()?;
        }
        assert_eq!(without_times(&second.log), without_times(&expected.log));
        assert_eq!(weights(&second)?, weights(&expected)?);
        // A finished run keeps its log.
        let third = Run::open(&task, variant, 1, killed.path())?;
        assert_eq!(third.log, second.log);
    }
    Ok(())
}

#[test]
fn a_cut_file_of_a_killed_write_is_not_read() -> Result<()> {
    let task = Task::new(Settings::smoke())?;
    let out = tempfile::tempdir()?;
    let mut run = Run::open(&task, Variant::Relu, 1, out.path())?;
    run.advance()?;
    run.advance()?;
    let part = crate::run::dir(out.path(), Variant::Relu, 1).join("state.safetensors.part");
    std::fs::write(part, "cut")?;
    assert_eq!(Run::open(&task, Variant::Relu, 1, out.path())?.steps(), 2);
    Ok(())
}

/// With the sizes of the experiment and with those of `--smoke`.
#[test]
fn all_variants_cost_the_same() -> Result<()> {
    let out = tempfile::tempdir()?;
    let sizes = [(96, 256, 3), (16, 32, 2)];
    for (hidden_size, intermediate_size, layers) in sizes {
        let settings = Settings { hidden_size, intermediate_size, layers, ..Settings::smoke() };
        let task = Task::new(settings)?;
        let costs =
            |variant| anyhow::Ok(results::costs(&Run::open(&task, variant, 1, out.path())?));
        let (parameters, multiply_adds) = costs(Variant::SwiGlu)?;
        assert!(multiply_adds > layers * 3 * hidden_size * intermediate_size);
        for variant in Variant::ALL {
            let found = costs(variant)?;
            for (found, expected) in [(found.0, parameters), (found.1, multiply_adds)] {
                assert!(found.abs_diff(expected) * 100 <= expected, "{variant:?}: {found}");
            }
        }
    }
    Ok(())
}

#[test]
fn the_variants_of_a_seed_start_from_the_same_weights_outside_the_blocks() -> Result<()> {
    let task = Task::new(Settings::smoke())?;
    let out = tempfile::tempdir()?;
    let outside = |variant, seed| -> Result<Vec<(String, Vec<f32>)>> {
        let run = Run::open(&task, variant, seed, out.path())?;
        let vars = by_name(&run.vars).into_iter().filter(|(name, _)| !name.contains(".mlp."));
        vars.map(|(name, var)| Ok((name, var.flatten_all()?.to_vec1()?))).collect()
    };
    let expected = outside(Variant::Relu, 1)?;
    assert!(expected.iter().any(|(name, _)| name.ends_with("q_proj.weight")));
    for variant in Variant::ALL {
        assert_eq!(outside(variant, 1)?, expected);
    }
    assert_ne!(outside(Variant::Relu, 2)?, expected);
    Ok(())
}

/// The probed model has the same logits, sees all tokens, and passes no value and no gradient where
/// a rectified unit is off.
#[test]
fn the_probe_computes_what_the_model_computes() -> Result<()> {
    let task = Task::new(Settings::smoke())?;
    let out = tempfile::tempdir()?;
    let tokens = crate::batch::tokens(&task.probe);
    for variant in Variant::ALL {
        let mut run = Run::open(&task, variant, 1, out.path())?;
        run.advance()?;
        let passes = vec![crate::ffn::Passes::default(); 2];
        let probed = variant.load_probed(&task.settings, task.vocab_size(), &run.vars, &passes)?;
        let batch = &task.probe[0];
        let logits = |model: &crate::model::Llama| {
            model.forward_all(&batch.inputs)?.flatten_all()?.to_vec1::<f32>()
        };
        assert_eq!(logits(&probed)?, logits(&run.model)?, "{variant:?}");
        for layer in probe::layers(&run)? {
            assert_eq!(layer.units, variant.units(32));
            for values in [&layer.pre, &layer.gradient, &layer.hidden] {
                assert_eq!(values.len(), tokens * layer.units);
            }
            assert!(layer.gradient.iter().any(|g| *g != 0.0));
            let negative = layer.pre.iter().zip(layer.hidden.iter().zip(&layer.gradient));
            for (_, (h, gradient)) in negative.filter(|(pre, _)| **pre < 0.0) {
                assert_eq!(variant.is_rectified(), *h == 0.0 && *gradient == 0.0, "{variant:?}");
            }
        }
    }
    Ok(())
}

fn modified(path: &Path) -> Result<std::time::SystemTime> {
    Ok(std::fs::metadata(path)?.modified()?)
}

#[test]
fn an_experiment_writes_tables_and_pictures_and_skips_finished_runs() -> Result<()> {
    let out = tempfile::tempdir()?;
    experiment(Settings::smoke(), 1, 2, out.path())?;
    let state = crate::run::dir(out.path(), Variant::Glu, 1).join("state.safetensors");
    let written = modified(&state)?;
    experiment(Settings::smoke(), 1, 2, out.path())?;
    assert_eq!(modified(&state)?, written);
    let runs = Table::read(&out.path().join("runs.csv"))?;
    assert_eq!(runs.rows().count(), Variant::ALL.len());
    for row in runs.rows() {
        let (loss, floor) = (row.number("held_out_loss")?, row.number("floor")?);
        assert!(loss > floor && floor > 0.0, "{loss} {floor}");
    }
    for name in ["activations", "gate", "curves", "loss", "histograms", "gradients"] {
        let svg = std::fs::read_to_string(out.path().join(format!("{name}.svg")))?;
        assert!(svg.trim_end().ends_with("</svg>"), "{name}");
    }
    let other = Settings { steps: 7, ..Settings::smoke() };
    let error = experiment(other, 1, 1, out.path()).err().context("other settings are refused")?;
    assert!(error.to_string().starts_with("steps: expected 4 as in "), "{error}");
    Ok(())
}

#[test]
fn times_are_measured_for_every_case_and_variant() -> Result<()> {
    let (task, out) = (Task::new(Settings::smoke())?, tempfile::tempdir()?);
    timing::measure(&task, timing::Plan::smoke(), out.path())?;
    let times = Table::read(&out.path().join("times.csv"))?;
    let (all, gated) = (Variant::ALL.len(), 5);
    // The model; blocks of one small and four large cases; activations in two dtypes.
    assert_eq!(times.rows().count(), all + (1 + 4) * (all + gated) + 2 * all);
    for row in times.rows() {
        let quartiles = ["first_quartile", "median", "third_quartile"]
            .map(|name| row.number(&format!("seconds_{name}")));
        let [first, median, third] = quartiles;
        let (first, median, third) = (first?, median?, third?);
        assert!(0.0 < first && first <= median && median <= third);
        let ratio = row.number("ratio_to_relu")?;
        assert!(ratio > 0.0 && (row.text("variant")? != "ReLU" || ratio == 1.0));
    }
    Ok(())
}
