//! Operations of candle's graph with up to nine inputs, whose value was computed before.
//!
//! candle's custom operations take at most three tensors. Inputs beyond that are grouped under
//! tokens: scalars that an operation of three inputs returns, and whose gradient is 0. The backward
//! pass of the operation computes all gradients at once. It returns those of its direct inputs, and
//! leaves the others for the tokens, which candle visits afterwards on the same thread.
//!
//! `direct.rs` keeps gradients of variables from candle's addition.

use std::collections::HashMap;
use std::fmt;
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::{ThreadId, current};

use candle_core::{
    CpuStorage, CustomOp1, CustomOp2, CustomOp3, DType, Device, Layout, Result, Shape, Storage,
    Tensor, bail,
};

use super::direct;

/// The most inputs of a custom operation.
const INPUTS: usize = 3;

/// dy -> the gradients of all inputs, in their order.
type GradientFn = dyn Fn(&Tensor) -> Result<Vec<Tensor>> + Send + Sync;

/// `y` as a differentiable function of `inputs`, which are the tensors through which a gradient is
/// tracked.
pub(super) fn function(
    name: &'static str,
    y: Value,
    inputs: &[Tensor],
    backward: impl Fn(&Tensor) -> Result<Vec<Tensor>> + Send + Sync + 'static,
) -> Result<Tensor> {
    // Each token takes the place of one direct input and brings up to three.
    let tokens = inputs.len().saturating_sub(INPUTS).div_ceil(INPUTS - 1);
    if tokens > INPUTS {
        bail!("{name} has {} inputs, expected at most {}", inputs.len(), INPUTS * INPUTS);
    }
    let direct = inputs.len().min(INPUTS - tokens);
    let (first, rest) = inputs.split_at(direct);
    let waiting = Waiting::default();
    let mut children = first.to_vec();
    for (number, group) in rest.chunks(INPUTS).enumerate() {
        let (zero, waiting) = (Value::Tensor(zero(&group[0])?), waiting.clone());
        let gradients = move |_: &Tensor| waiting.take(name, number);
        children.push(apply(name, zero, group, Arc::new(gradients))?);
    }
    let tokens: Vec<usize> = rest.chunks(INPUTS).map(<[Tensor]>::len).collect();
    let gradients = move |dy: &Tensor| {
        let mut all = backward(dy)?.into_iter();
        let mut of_children: Vec<Tensor> = all.by_ref().take(direct).collect();
        for (number, &len) in tokens.iter().enumerate() {
            waiting.put(number, all.by_ref().take(len).collect());
            of_children.push(zero(dy)?);
        }
        Ok(of_children)
    };
    apply(name, y, &children, Arc::new(gradients))
}

/// The value and the gradient of a token.
fn zero(beside: &Tensor) -> Result<Tensor> {
    Tensor::zeros((), DType::F32, beside.device())
}

/// A gradient of a function of `input`. If candle keeps the graph of backward passes, it is the
/// result of an operation without a derivative, so that a second derivative is an error and not a
/// silent zero.
pub(super) fn gradient(name: &'static str, value: Value, input: Option<&Tensor>) -> Result<Tensor> {
    thread_local! {
        /// As candle reads it.
        static KEEPS_GRAPH: bool =
            std::env::var("CANDLE_GRAD_DO_NOT_DETACH").is_ok_and(|s| !s.is_empty() && s != "0");
    }
    let input = input.filter(|_| KEEPS_GRAPH.with(|keeps| *keeps));
    let fail = move |_: &Tensor| -> Result<Vec<Tensor>> {
        Err(candle_core::Error::BackwardNotSupported { op: name })
    };
    apply(name, value, input.map_or(&[], std::slice::from_ref), Arc::new(fail))
}

fn apply(
    name: &'static str,
    value: Value,
    inputs: &[Tensor],
    backward: Arc<GradientFn>,
) -> Result<Tensor> {
    let node = Node { name, value: Mutex::new(Some(value)), backward };
    match inputs {
        [] => node.into_tensor(),
        [a] => a.apply_op1(node),
        [a, b] => a.apply_op2(b, node),
        [a, b, c] => a.apply_op3(b, c, node),
        _ => bail!("{name} has {} inputs, expected at most {INPUTS}", inputs.len()),
    }
}

/// A contiguous value.
pub(super) enum Value {
    /// Moved into the graph.
    Cpu(CpuStorage, Shape),
    /// A tensor of its own storage, on any device. A node with inputs clones the storage.
    Tensor(Tensor),
}

/// Gradients on their way from an operation to its tokens. Several threads may differentiate the
/// same graph.
#[derive(Clone, Default)]
struct Waiting(Arc<Mutex<HashMap<Key, Vec<Tensor>>>>);

/// The thread that differentiates, and the number of a token.
type Key = (ThreadId, usize);

impl Waiting {
    fn put(&self, token: usize, gradients: Vec<Tensor>) {
        let mut waiting = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        waiting.insert((current().id(), token), gradients);
    }

    fn take(&self, name: &'static str, token: usize) -> Result<Vec<Tensor>> {
        let mut waiting = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        match waiting.remove(&(current().id(), token)) {
            Some(gradients) => Ok(gradients),
            None => bail!("{name}: the gradient of a part of the graph without the rest"),
        }
    }
}

/// An operation whose value is known.
struct Node {
    name: &'static str,
    /// Taken by the forward pass.
    value: Mutex<Option<Value>>,
    backward: Arc<GradientFn>,
}

impl fmt::Debug for Node {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Node").field(&self.name).finish()
    }
}

impl Node {
    /// The value without a graph.
    fn into_tensor(self) -> Result<Tensor> {
        let tensor = match &mut *self.value.lock().unwrap_or_else(PoisonError::into_inner) {
            Some(Value::Tensor(tensor)) => Some(tensor.detach()),
            _ => None,
        };
        match tensor {
            Some(tensor) => Ok(tensor),
            None => Tensor::zeros((), DType::U8, &Device::Cpu)?.apply_op1_no_bwd(&self),
        }
    }

    /// The storage and the shape of the value.
    fn take(&self) -> Result<(Storage, Shape)> {
        match self.value.lock().unwrap_or_else(PoisonError::into_inner).take() {
            Some(Value::Cpu(storage, shape)) => Ok((Storage::Cpu(storage), shape)),
            Some(Value::Tensor(value)) => {
                let (storage, layout) = value.storage_and_layout();
                Ok((storage.try_clone(layout)?, value.shape().clone()))
            }
            None => bail!("{}: a second forward pass", self.name),
        }
    }

    fn cpu(&self) -> Result<(CpuStorage, Shape)> {
        match self.take()? {
            (Storage::Cpu(storage), shape) => Ok((storage, shape)),
            _ => bail!("{}: the inputs are on the CPU, the value is not", self.name),
        }
    }

    #[cfg(feature = "cuda")]
    fn cuda(&self) -> Result<(candle_core::CudaStorage, Shape)> {
        match self.take()? {
            (Storage::Cuda(storage), shape) => Ok((storage, shape)),
            _ => bail!("{}: the inputs are on a CUDA device, the value is not", self.name),
        }
    }

    #[cfg(feature = "metal")]
    fn metal(&self) -> Result<(candle_core::MetalStorage, Shape)> {
        match self.take()? {
            (Storage::Metal(storage), shape) => Ok((storage, shape)),
            _ => bail!("{}: the inputs are on a Metal device, the value is not", self.name),
        }
    }

    /// The gradients of the inputs that candle is to add up.
    fn gradients<const N: usize>(
        &self,
        inputs: [&Tensor; N],
        y: &Tensor,
        dy: &Tensor,
    ) -> Result<[Option<Tensor>; N]> {
        let mut found = std::array::from_fn(|_| None);
        let gradients = (self.backward)(dy)?;
        for ((found, input), gradient) in found.iter_mut().zip(inputs).zip(gradients) {
            *found = direct::put(y, input, gradient)?;
        }
        Ok(found)
    }
}

/// A custom operation with these operands.
macro_rules! operation {
    (
        $trait:ident,
        [$($storage:ident $layout:ident $tensor:ident),*],
        $gradients:ty,
        $return:expr
    ) => {
        impl $trait for Node {
            fn name(&self) -> &'static str {
                self.name
            }

            fn cpu_fwd(
                &self,
                $($storage: &CpuStorage, $layout: &Layout),*
            ) -> Result<(CpuStorage, Shape)> {
                let _ = ($($storage, $layout),*);
                self.cpu()
            }

            #[cfg(feature = "cuda")]
            fn cuda_fwd(
                &self,
                $($storage: &candle_core::CudaStorage, $layout: &Layout),*
            ) -> Result<(candle_core::CudaStorage, Shape)> {
                let _ = ($($storage, $layout),*);
                self.cuda()
            }

            #[cfg(feature = "metal")]
            fn metal_fwd(
                &self,
                $($storage: &candle_core::MetalStorage, $layout: &Layout),*
            ) -> Result<(candle_core::MetalStorage, Shape)> {
                let _ = ($($storage, $layout),*);
                self.metal()
            }

            fn bwd(&self, $($tensor: &Tensor,)* y: &Tensor, dy: &Tensor) -> Result<$gradients> {
                self.gradients([$($tensor),*], y, dy).map($return)
            }
        }
    };
}

type Gradient = Option<Tensor>;

operation!(CustomOp1, [s1 l1 t1], Gradient, |[a]| a);
operation!(CustomOp2, [s1 l1 t1, s2 l2 t2], (Gradient, Gradient), |[a, b]| (a, b));
operation!(
    CustomOp3,
    [s1 l1 t1, s2 l2 t2, s3 l3 t3],
    (Gradient, Gradient, Gradient),
    |[a, b, c]| (a, b, c)
);
