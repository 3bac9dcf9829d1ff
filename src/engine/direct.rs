//! Gradients of variables that reach the store without an addition.

use std::cell::RefCell;
use std::collections::{HashMap, HashSet};

use candle_core::backprop::GradStore;
use candle_core::{Result, Tensor, TensorId};

/// The gradients of `loss`, as [`Tensor::backward`], in less time and memory.
///
/// candle adds every gradient to a tensor of zeros. For a large weight that takes as long as a part
/// of the products, and in bf16 and f16 longer than all of them. Here the gradients of variables
/// that this crate's layers compute ([`crate::SwiGluFfn`], [`crate::Linear`]) are put into the
/// store as they are. The gradients are the same, up to the sign of a zero and the order in which
/// the shares of a variable with three or more uses are added.
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
    let collecting = Collecting::start(loss);
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

/// The gradients that a call of [`backward`] has collected.
#[derive(Default)]
struct Collection {
    /// The graph of its loss. An operation's backward pass may differentiate other graphs.
    nodes: HashSet<TensorId>,
    gradients: HashMap<TensorId, Tensor>,
}

thread_local! {
    static COLLECTED: RefCell<Option<Collection>> = const { RefCell::new(None) };
}

/// While it lives, gradients are collected.
struct Collecting {
    /// The collection of an outer call.
    outer: Option<Collection>,
}

impl Collecting {
    fn start(loss: &Tensor) -> Self {
        let nodes = loss.sorted_nodes().into_iter().map(Tensor::id).collect();
        let collection = Collection { nodes, ..Collection::default() };
        Self { outer: COLLECTED.replace(Some(collection)) }
    }

    fn stop(mut self) -> HashMap<TensorId, Tensor> {
        let collected = COLLECTED.replace(self.outer.take());
        std::mem::forget(self);
        collected.unwrap_or_default().gradients
    }
}

impl Drop for Collecting {
    /// After a panic.
    fn drop(&mut self) {
        COLLECTED.set(self.outer.take());
    }
}

/// Keeps the gradient of a variable if [`backward`] is running for the graph of `node`. Otherwise
/// returns it, for candle.
pub(super) fn put(node: &Tensor, input: &Tensor, gradient: Tensor) -> Result<Option<Tensor>> {
    if !input.is_variable() {
        return Ok(Some(gradient));
    }
    COLLECTED.with_borrow_mut(|collected| {
        let Some(Collection { nodes, gradients }) = collected else { return Ok(Some(gradient)) };
        if !nodes.contains(&node.id()) {
            return Ok(Some(gradient));
        }
        let sum = match gradients.remove(&input.id()) {
            Some(other) => other.add(&gradient)?,
            None => gradient,
        };
        gradients.insert(input.id(), sum);
        Ok(None)
    })
}
