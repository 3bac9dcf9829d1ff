//! AdamW with moments that can be saved. Its steps are bit for bit those of
//! [`candle_nn::AdamW`], which keeps its moments private.
//!
//! ```text
//! m = β₁·m + (1 - β₁)·g      v = β₂·v + (1 - β₂)·g²
//! θ = (1 - lr·λ)·θ - lr·(m / (1 - β₁ᵗ)) / (√(v / (1 - β₂ᵗ)) + ε)
//! ```
//!
//! Source: I. Loshchilov, F. Hutter, "Decoupled Weight Decay Regularization", 2019, algorithm 2,
//! <https://arxiv.org/abs/1711.05101>.

use std::collections::{BTreeMap, HashMap};

use anyhow::{Context, Result, ensure};
use candle_core::backprop::GradStore;
use candle_core::{Tensor, Var};
use candle_nn::ParamsAdamW;

/// The optimizer.
pub(crate) struct AdamW {
    params: ParamsAdamW,
    moments: BTreeMap<String, Moments>,
    steps: i32,
}

/// A variable with its m and v.
struct Moments {
    var: Var,
    first: Tensor,
    second: Tensor,
}

impl AdamW {
    pub(crate) fn new(vars: BTreeMap<String, Var>, params: ParamsAdamW) -> Result<Self> {
        let zeros = |var: Var| -> Result<Moments> {
            let zero = var.zeros_like()?.detach();
            Ok(Moments { var, first: zero.clone(), second: zero })
        };
        let moments = vars.into_iter().map(|(name, var)| Ok((name, zeros(var)?)));
        Ok(Self { params, moments: moments.collect::<Result<_>>()?, steps: 0 })
    }

    pub(crate) fn step(&mut self, gradients: &GradStore, lr: f64) -> Result<()> {
        self.steps += 1;
        let ParamsAdamW { beta1, beta2, eps, weight_decay, .. } = self.params;
        let scale_first = 1.0 / (1.0 - beta1.powi(self.steps));
        let scale_second = 1.0 / (1.0 - beta2.powi(self.steps));
        for Moments { var, first, second } in self.moments.values_mut() {
            let Some(g) = gradients.get(var) else { continue };
            *first = ((&*first * beta1)? + (g * (1.0 - beta1))?)?;
            *second = ((&*second * beta2)? + (g.sqr()? * (1.0 - beta2))?)?;
            let direction =
                ((&*first * scale_first)? / ((&*second * scale_second)?.sqrt()? + eps)?)?;
            let decayed = (var.as_tensor() * (1.0 - lr * weight_decay))?;
            var.set(&(decayed - (direction * lr)?)?)?;
        }
        Ok(())
    }

    /// The variables and their moments, under the names `theta.NAME`, `m.NAME`, `v.NAME`.
    pub(crate) fn tensors(&self) -> Vec<(String, Tensor)> {
        let named = |(name, moments): (&String, &Moments)| {
            let theta = moments.var.as_tensor().clone();
            [("theta", theta), ("m", moments.first.clone()), ("v", moments.second.clone())]
                .map(|(kind, tensor)| (format!("{kind}.{name}"), tensor))
        };
        self.moments.iter().flat_map(named).collect()
    }

    /// Sets the variables and the moments to those of [`Self::tensors`] after `steps` steps.
    ///
    /// # Errors
    /// A tensor that is missing or has another shape; the error names it.
    pub(crate) fn restore(
        &mut self,
        tensors: &HashMap<String, Tensor>,
        steps: usize,
    ) -> Result<()> {
        for (name, moments) in &mut self.moments {
            let find = |kind| {
                let name = format!("{kind}.{name}");
                let tensor = tensors.get(&name).with_context(|| format!("{name}: missing"))?;
                let (expected, found) = (moments.var.dims(), tensor.dims());
                ensure!(expected == found, "{name}: expected shape {expected:?}, found {found:?}");
                Ok(tensor.clone())
            };
            let (theta, first, second) = (find("theta")?, find("m")?, find("v")?);
            moments.var.set(&theta)?;
            (moments.first, moments.second) = (first, second);
        }
        self.steps = i32::try_from(steps)?;
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use candle_core::Device;
    use candle_nn::Optimizer;

    use super::*;

    const PARAMS: ParamsAdamW =
        ParamsAdamW { lr: 0.0, beta1: 0.9, beta2: 0.98, eps: 1e-8, weight_decay: 0.05 };

    fn vars() -> Result<BTreeMap<String, Var>> {
        let a = Var::new(&[[0.5f32, -1.25, 3.0], [0.1, 0.0, -2.5]], &Device::Cpu)?;
        let b = Var::new(&[0.3f32, -0.7, 1.1], &Device::Cpu)?;
        Ok(BTreeMap::from([("a".to_string(), a), ("b".to_string(), b)]))
    }

    /// A loss whose gradient changes from step to step.
    fn gradients(vars: &BTreeMap<String, Var>) -> Result<GradStore> {
        let product = vars["a"].broadcast_mul(&vars["b"])?;
        Ok((product.sqr()?.sum_all()? + vars["a"].sin()?.sum_all()?)?.backward()?)
    }

    fn values(vars: &BTreeMap<String, Var>) -> Result<Vec<f32>> {
        Ok([vars["a"].flatten_all()?.to_vec1::<f32>()?, vars["b"].to_vec1()?].concat())
    }

    #[test]
    fn steps_are_those_of_candle_nn() -> Result<()> {
        let (ours, theirs) = (vars()?, vars()?);
        let mut own = AdamW::new(ours.clone(), PARAMS)?;
        let mut candle = candle_nn::AdamW::new(theirs.values().cloned().collect(), PARAMS)?;
        for lr in [1e-3, 2e-3, 5e-2, 1e-2, 1e-4, 3e-3] {
            own.step(&gradients(&ours)?, lr)?;
            candle.set_learning_rate(lr);
            candle.step(&gradients(&theirs)?)?;
            assert_eq!(values(&ours)?, values(&theirs)?);
        }
        Ok(())
    }

    #[test]
    fn a_state_with_a_missing_or_wrong_tensor_is_refused() -> Result<()> {
        let mut optimizer = AdamW::new(vars()?, PARAMS)?;
        let state: HashMap<_, _> = AdamW::new(vars()?, PARAMS)?.tensors().into_iter().collect();
        optimizer.restore(&state, 0)?;
        let mut missing = state.clone();
        missing.remove("m.b");
        let error = optimizer.restore(&missing, 0).map_or_else(|e| e.to_string(), |()| "ok".into());
        assert_eq!(error, "m.b: missing");
        let mut wrong = state;
        wrong.insert("v.a".into(), Tensor::new(&[1f32], &Device::Cpu)?);
        let error = optimizer.restore(&wrong, 0).map_or_else(|e| e.to_string(), |()| "ok".into());
        assert_eq!(error, "v.a: expected shape [2, 3], found [1]");
        Ok(())
    }
}
