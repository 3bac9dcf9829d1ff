//! What the units of a trained model do, and the gradients that reach them.

use std::sync::PoisonError;

use anyhow::{Context, Result};
use candle_core::Tensor;
use candle_core::backprop::GradStore;

use crate::batch::Batch;
use crate::ffn::{Pass, Passes};
use crate::run::Run;
use crate::statistics::LayerValues;

/// The values of each layer at all tokens of the probe's stories.
pub(crate) fn layers(run: &Run) -> Result<Vec<LayerValues>> {
    let settings = &run.task.settings;
    let passes: Vec<Passes> = (0..settings.layers).map(|_| Passes::default()).collect();
    let model = run.variant.load_probed(settings, run.task.vocab_size(), &run.vars, &passes)?;
    let units = run.variant.units(settings.intermediate_size);
    let mut layers: Vec<_> =
        passes.iter().map(|_| LayerValues { units, ..LayerValues::default() }).collect();
    for batch in &run.task.probe {
        // The sum over the tokens: the gradient of a token does not depend on the others' number.
        let loss = (batch.loss(&model)? * batch.tokens() as f64)?;
        let gradients = loss.backward()?;
        for (layer, passes) in layers.iter_mut().zip(&passes) {
            for pass in passes.lock().unwrap_or_else(PoisonError::into_inner).drain(..) {
                add(layer, &pass, &gradients, batch)?;
            }
        }
    }
    Ok(layers)
}

/// Adds the tokens of one pass.
fn add(layer: &mut LayerValues, pass: &Pass, gradients: &GradStore, batch: &Batch) -> Result<()> {
    let gradient = gradients.get(&pass.zero).context("pre: no gradient")?;
    for (values, tensor) in [
        (&mut layer.pre, &pass.pre),
        (&mut layer.gradient, gradient),
        (&mut layer.hidden, &pass.hidden),
    ] {
        values.extend(of_tokens(tensor, batch)?);
    }
    Ok(())
}

/// (B,T,units) -> the rows at the batch's positions, without its padding
fn of_tokens(tensor: &Tensor, batch: &Batch) -> Result<Vec<f32>> {
    let rows = tensor.flatten_to(1)?.contiguous()?.index_select(&batch.positions, 0)?;
    Ok(rows.flatten_all()?.to_vec1()?)
}
