//! Gradients of variables that reach the store without an addition.

use std::cell::RefCell;
use std::collections::HashMap;

use candle_core::backprop::GradStore;
use candle_core::{Result, Tensor, TensorId};

/// The gradients of `loss`, as [`Tensor::backward`], in less time and memory.
///
/// candle adds every gradient to a tensor of zeros. For a large weight that takes as long as a part
/// of the products, and in bf16 and f16 longer than all of them. Here the gradients of variables
/// that this crate's layers compute on the CPU ([`crate::SwiGluFfn`], [`crate::Linear`]) are put
/// into the store as they are. Everything else, and the result, is the same.
///
/// # Errors
/// Those of [`Tensor::backward`].
///
/// ```
/// use candle_core::{DType, Device, Tensor};
/// use candle_nn::{AdamW, Module, Optimizer, VarBuilder, VarMap};
/// let vars = VarMap::new();
/// let vb = VarBuilder::from_varmap(&vars, DType::F32, &Device::Cpu);
/// let layer = candle_swiglu::linear(8, 8, vb)?;
/// let mut optimizer = AdamW::new_lr(vars.all_vars(), 1e-2)?;
/// let loss = layer.forward(&Tensor::ones((2, 8), DType::F32, &Device::Cpu)?)?.sqr()?.mean_all()?;
/// optimizer.step(&candle_swiglu::backward(&loss)?)?; // instead of backward_step(&loss)
/// # Ok::<(), candle_core::Error>(())
/// ```
pub fn backward(loss: &Tensor) -> Result<GradStore> {
    let collecting = Collecting::start();
    let store = loss.backward();
    let gradients = collecting.stop();
    let mut store = store?;
    for (id, gradient) in gradients {
        let sum = match store.get_id(id) {
            Some(other) => other.add(&gradient)?,
            None => gradient,
        };
        store.insert_id(id, sum);
    }
    Ok(store)
}

type Gradients = HashMap<TensorId, Tensor>;

thread_local! {
    /// What the calls of [`backward`] on this thread have collected.
    static COLLECTED: RefCell<Option<Gradients>> = const { RefCell::new(None) };
}

/// While it lives, gradients are collected.
struct Collecting {
    /// Those of an outer call.
    outer: Option<Gradients>,
}

impl Collecting {
    fn start() -> Self {
        Self { outer: COLLECTED.replace(Some(HashMap::new())) }
    }

    fn stop(mut self) -> Gradients {
        let collected = COLLECTED.replace(self.outer.take());
        std::mem::forget(self);
        collected.unwrap_or_default()
    }
}

impl Drop for Collecting {
    /// After a panic.
    fn drop(&mut self) {
        COLLECTED.set(self.outer.take());
    }
}

/// Keeps the gradient of a variable if [`backward`] is running. Otherwise returns it, for candle.
pub(super) fn put(input: &Tensor, gradient: Tensor) -> Result<Option<Tensor>> {
    if !input.is_variable() {
        return Ok(Some(gradient));
    }
    COLLECTED.with_borrow_mut(|collected| {
        let Some(collected) = collected else { return Ok(Some(gradient)) };
        let sum = match collected.remove(&input.id()) {
            Some(other) => other.add(&gradient)?,
            None => gradient,
        };
        collected.insert(input.id(), sum);
        Ok(None)
    })
}
