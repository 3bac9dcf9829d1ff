//! Every gated MLP class of transformers that `tests/golden/families.py` can build. With the saved
//! config and the parameters, the block must give the module's own output, or an error that names
//! what is not supported.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, missing_docs)]

mod common;

use std::collections::{BTreeMap, HashMap};

use anyhow::{Context, Result, ensure};
use candle_core::{DType, Device, Tensor};
use candle_nn::{Module, VarBuilder};
use candle_swiglu::{FfnConfig, SwiGluFfn};
use common::{golden_dir, unit_roundoff, values};
use serde_json::Value;

/// One module with one config.
#[derive(serde::Deserialize)]
struct Pair {
    pair: String,
    class: String,
    variant: String,
    kind: String,
    intermediate_size: usize,
    config: Value,
}

enum Outcome {
    Equal,
    Refused(String),
    Wrong(f64),
}

/// Builds the block as a user does, and returns its output.
fn compute(
    pair: &Pair,
    tensors: &HashMap<String, Tensor>,
    x: &Tensor,
) -> candle_swiglu::Result<Tensor> {
    let cfg = if pair.kind == "expert" {
        // The width of a shared expert is one of several fields, so the caller chooses the block.
        let mut cfg = FfnConfig::from_json_expert(&pair.config)?;
        cfg.intermediate_size = pair.intermediate_size;
        cfg
    } else {
        FfnConfig::from_json(&pair.config)?
    };
    let prefix = format!("{}.block.", pair.pair);
    let block: HashMap<String, Tensor> = tensors
        .iter()
        .filter_map(|(name, tensor)| {
            Some((format!("mlp.{}", name.strip_prefix(&prefix)?), tensor.clone()))
        })
        .collect();
    let vb = VarBuilder::from_tensors(block, DType::F32, &Device::Cpu);
    Ok(SwiGluFfn::new(&cfg, vb.pp("mlp"))?.forward(x)?)
}

fn outcome(pair: &Pair, tensors: &HashMap<String, Tensor>) -> Result<Outcome> {
    let tensor = |name: &str| tensors.get(name).with_context(|| name.to_string());
    let y = match compute(pair, tensors, tensor("x")?) {
        Ok(y) => values(&y)?,
        Err(error) => return Ok(Outcome::Refused(error.to_string())),
    };
    let exact = values(tensor(&format!("{}.y_f64", pair.pair))?)?;
    let module = values(tensor(&format!("{}.y", pair.pair))?)?;
    let largest =
        |a: &[f64], b: &[f64]| a.iter().zip(b).map(|(a, b)| (a - b).abs()).fold(0.0, f64::max);
    let size = exact.iter().fold(0.0, |m: f64, v| m.max(v.abs()));
    // Both sum the same terms in f32, in different orders. The error relative to f64 may be four
    // times that of the module itself, which may happen to be near zero. Therefore the bound also
    // has the rounding of some tens of terms of the result's size.
    let bound = 4.0 * largest(&module, &exact) + 64.0 * unit_roundoff(DType::F32) * size;
    let error = largest(&y, &exact);
    Ok(if error <= bound { Outcome::Equal } else { Outcome::Wrong(error / size) })
}

/// The refused pairs with the reason for each: `class variant: a part of the message`.
fn expected_refusals() -> Result<BTreeMap<String, String>> {
    let text = std::fs::read_to_string(golden_dir().join("families/refused.txt"))?;
    let lines = text.lines().filter(|line| !line.starts_with('#') && !line.trim().is_empty());
    lines
        .map(|line| {
            let (name, reason) = line.split_once(": ").with_context(|| line.to_string())?;
            Ok((name.trim().to_string(), reason.trim().to_string()))
        })
        .collect()
}

#[test]
fn the_config_of_every_class_gives_its_output() -> Result<()> {
    let folder = golden_dir().join("families");
    let pairs: Vec<Pair> =
        serde_json::from_str(&std::fs::read_to_string(folder.join("classes.json"))?)?;
    let tensors = candle_core::safetensors::load(folder.join("blocks.safetensors"), &Device::Cpu)?;
    let expected = expected_refusals()?;
    let (mut equal, mut problems, mut refused) = (0, vec![], BTreeMap::new());
    for pair in &pairs {
        let name = format!("{} {}", pair.class, pair.variant).trim().to_string();
        match outcome(pair, &tensors)? {
            Outcome::Equal => equal += 1,
            Outcome::Wrong(error) => {
                problems.push(format!("{name}: SILENTLY WRONG, relative error {error:.1e}"))
            }
            Outcome::Refused(message) => drop(refused.insert(name, message)),
        }
    }
    for (name, message) in &refused {
        if !expected.get(name).is_some_and(|reason| message.contains(reason.as_str())) {
            problems.push(format!("{name}: refused: {message}"));
        }
    }
    problems.extend(
        expected
            .keys()
            .filter(|name| !refused.contains_key(*name))
            .map(|name| format!("{name}: no longer refused")),
    );
    println!("{} pairs: {equal} equal, {} refused", pairs.len(), refused.len());
    ensure!(problems.is_empty(), "{} problems:\n{}", problems.len(), problems.join("\n"));
    ensure!(equal >= 200, "{equal} of {} pairs are equal", pairs.len());
    Ok(())
}
