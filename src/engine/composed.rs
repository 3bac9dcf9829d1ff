//! Layers of variables where the CPU kernels do not run: on GPUs, and in f64. Forward and backward
//! are one operation of candle's graph each, in candle's matmuls and the fused gate.
//!
//! The graph keeps x, and gate and up unless they are computed again. candle's own graph would also
//! keep h, and compute the gradients of frozen weights.

use std::sync::Arc;

use candle_core::{DType, Device, Result, Tensor};

use super::function::{Value, function, gradient};
use super::plain::{self, matrix, product};
use super::{Projection, is_tracked};
use crate::load::Weights;
use crate::which::Which;

const BLOCK: &str = "swiglu block";
const BLOCK_GRADIENT: &str = "swiglu block gradient";
const LINEAR: &str = "linear";
const LINEAR_GRADIENT: &str = "linear gradient";

/// A block of variables.
#[derive(Clone, Debug)]
pub(super) struct Block(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    variables: plain::Block,
    /// The same tensors without their graph.
    constants: plain::Block,
    /// The backward pass computes gate and up again. Otherwise the forward pass keeps them.
    recompute: bool,
}

/// gate (M,I) and up (M,I)
type Pair = (Tensor, Tensor);

impl Block {
    pub(super) fn new(variables: plain::Block) -> Self {
        let constants = variables.detached();
        Self(Arc::new(Inner { variables, constants, recompute: false }))
    }
}

impl super::Block for Block {
    fn dtype(&self) -> DType {
        self.0.variables.dtype()
    }

    fn device(&self) -> &Device {
        self.0.variables.device()
    }

    fn kernel(&self) -> &str {
        self.0.variables.kernel()
    }

    fn is_packed(&self) -> bool {
        false
    }

    fn forward(&self, x: &Tensor) -> Result<Tensor> {
        let (this, wants_x) = (self.0.clone(), is_tracked(x));
        let layers = this.layers();
        let inputs = inputs(x, &layers);
        let x = matrix(&x.detach())?;
        let (gate, up) = this.constants.gate_up.forward(&x)?;
        let h = this.constants.glu.mul(&gate, &up)?;
        let keeps = !this.recompute && this.wants_pair(wants_x);
        let kept = keeps.then_some((gate, up));
        let y = this.constants.project_down(&h)?;
        let under = inputs.first().cloned();
        let backward = move |dy: &Tensor| {
            let gradients = this.gradients(&x, &matrix(&dy.detach())?, kept.as_ref(), wants_x)?;
            gradients_of(BLOCK_GRADIENT, gradients, under.as_ref())
        };
        function(BLOCK, Value::Tensor(y), &inputs, backward)
    }

    fn weight(&self, which: Which) -> Result<Tensor> {
        self.0.variables.weight(which)
    }

    fn bias(&self, which: Which) -> Result<Option<Tensor>> {
        self.0.variables.bias(which)
    }

    fn weights(&self) -> Result<Weights> {
        self.0.variables.weights()
    }

    fn with_recompute(&self, recompute: bool) -> Option<Arc<dyn super::Block>> {
        let (variables, constants) = (self.0.variables.clone(), self.0.constants.clone());
        Some(Arc::new(Self(Arc::new(Inner { variables, constants, recompute }))))
    }
}

impl Inner {
    /// gate and up, or the layer of both; then down.
    fn layers(&self) -> Vec<&plain::Linear> {
        let mut layers = self.variables.gate_up.layers();
        layers.push(&self.variables.down);
        layers
    }

    /// Whether the gradient of h is needed.
    fn wants_h(&self, wants_x: bool) -> bool {
        wants_x || self.variables.gate_up.layers().into_iter().any(has_variables)
    }

    /// Whether the backward pass reads gate and up.
    fn wants_pair(&self, wants_x: bool) -> bool {
        self.wants_h(wants_x) || is_tracked(&self.variables.down.weight)
    }

    /// The gradients of the inputs, in their order. h is computed again for that of down_proj.
    fn gradients(
        &self,
        x: &Tensor,
        dy: &Tensor,
        kept: Option<&Pair>,
        wants_x: bool,
    ) -> Result<Vec<Tensor>> {
        let Self { variables, constants, .. } = self;
        let pair = match kept {
            Some(pair) => Some(pair.clone()),
            None if self.wants_pair(wants_x) => Some(constants.gate_up.forward(x)?),
            None => None,
        };
        let dy = constants.scale(dy.clone())?;
        let h = match &pair {
            Some((gate, up)) if is_tracked(&variables.down.weight) => {
                Some(constants.glu.mul(gate, up)?)
            }
            _ => None,
        };
        let wants_h = self.wants_h(wants_x);
        let (dh, of_down) = linear_gradients(&variables.down, h.as_ref(), &dy, wants_h)?;
        drop(h);
        let Some((dh, (gate, up))) = dh.zip(pair) else { return Ok(of_down) };
        let (dgate, dup) = constants.glu.gradients(&gate, &up, &dh)?;
        drop((gate, up, dh));
        let (mut dx, mut of_weights) = (None, vec![]);
        let joined = variables.gate_up.join(dgate, dup)?;
        for (layer, d) in variables.gate_up.layers().into_iter().zip(&joined) {
            let (share, of_layer) = linear_gradients(layer, Some(x), d, wants_x)?;
            dx = match (dx, share) {
                (Some(dx), Some(share)) => Some((dx + share)?),
                (dx, share) => dx.or(share),
            };
            of_weights.extend(of_layer);
        }
        Ok(dx.into_iter().chain(of_weights).chain(of_down).collect())
    }
}

/// A linear layer of variables.
#[derive(Clone, Debug)]
pub(super) struct Linear {
    variables: plain::Linear,
    /// The same tensors without their graph.
    constants: plain::Linear,
}

impl Linear {
    pub(super) fn new(variables: plain::Linear) -> Self {
        Self { constants: variables.detached(), variables }
    }
}

impl Projection for Linear {
    fn dtype(&self) -> DType {
        self.variables.dtype()
    }

    fn device(&self) -> &Device {
        self.variables.device()
    }

    fn kernel(&self) -> &str {
        self.variables.kernel()
    }

    fn is_packed(&self) -> bool {
        false
    }

    fn forward(&self, x: &Tensor) -> Result<Tensor> {
        let (layer, wants_x) = (self.variables.clone(), is_tracked(x));
        let inputs = inputs(x, &[&layer]);
        let x = matrix(&x.detach())?;
        let y = self.constants.forward(&x)?;
        let under = inputs.first().cloned();
        let backward = move |dy: &Tensor| {
            let dy = matrix(&dy.detach())?;
            let (dx, of_layer) = linear_gradients(&layer, Some(&x), &dy, wants_x)?;
            gradients_of(LINEAR_GRADIENT, dx.into_iter().chain(of_layer), under.as_ref())
        };
        function(LINEAR, Value::Tensor(y), &inputs, backward)
    }

    fn forward_f32(&self, x: &Tensor) -> Result<Tensor> {
        self.variables.forward_f32(x)
    }

    fn weight(&self) -> Result<Tensor> {
        self.variables.weight()
    }

    fn bias(&self) -> Result<Option<Tensor>> {
        self.variables.bias()
    }

    fn embed(&self, ids: &Tensor) -> crate::error::Result<Tensor> {
        self.variables.embed(ids)
    }
}

/// The tensors through which a gradient is tracked: x, then the weight and the bias of each layer.
fn inputs(x: &Tensor, layers: &[&plain::Linear]) -> Vec<Tensor> {
    let of_layers = layers.iter().flat_map(|layer| [Some(&layer.weight), layer.bias.as_ref()]);
    let all = std::iter::once(x).chain(of_layers.flatten());
    all.filter(|tensor| is_tracked(tensor)).cloned().collect()
}

fn has_variables(layer: &plain::Linear) -> bool {
    is_tracked(&layer.weight) || layer.bias.as_ref().is_some_and(is_tracked)
}

/// The wanted gradients of x·Wᵀ + b: dx = dy·W, and dW = dyᵀ·x and db = Σ dy of the variables. x is
/// needed if W is one.
fn linear_gradients(
    layer: &plain::Linear,
    x: Option<&Tensor>,
    dy: &Tensor,
    wants_x: bool,
) -> Result<(Option<Tensor>, Vec<Tensor>)> {
    let dx = match wants_x {
        true => Some(product(dy, &layer.weight.detach().t()?)?),
        false => None,
    };
    let mut of_variables = vec![];
    if let Some(x) = x.filter(|_| is_tracked(&layer.weight)) {
        of_variables.push(product(&dy.t()?, &x.t()?)?);
    }
    if layer.bias.as_ref().is_some_and(is_tracked) {
        of_variables.push(column_sums(dy)?);
    }
    Ok((dx, of_variables))
}

/// (M,N) -> (N). A product with ones sums halves in f32, which candle's own sum does not.
fn column_sums(dy: &Tensor) -> Result<Tensor> {
    Tensor::ones((1, dy.dim(0)?), dy.dtype(), dy.device())?.matmul(dy)?.squeeze(0)
}

fn gradients_of(
    name: &'static str,
    gradients: impl IntoIterator<Item = Tensor>,
    under: Option<&Tensor>,
) -> Result<Vec<Tensor>> {
    gradients.into_iter().map(|d| gradient(name, Value::Tensor(d), under)).collect()
}
