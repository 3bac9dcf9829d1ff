//! Packed layers on the CPU with low-rank pairs (LoRA).
//!
//! Pairs that are constants are packed once, and the kernels of the packed layer add them. If a
//! gradient is tracked through x or a pair, or elements are dropped, forward and backward are the
//! operations of `cpu/train` over the packed weights.

mod linear;

use std::fmt;
use std::sync::Arc;

use candle_core::{CpuStorage, CustomOp1, DType, Device, Layout, Shape, Tensor};
use half::{bf16, f16};

pub(super) use self::linear::Linear;

use super::adapted::Pairs;
use super::cpu::{self as packed, output_shape, with_storages};
use super::function::{Value, function, gradient};
use super::low_rank::{Addend, are_tracked, rank};
use super::trained::{check_rows, on_cpu, value};
use super::{BlockSpec, is_tracked};
use crate::cpu::{
    self, BlockWanted, Dropout, LowRank, LowRankGradients, LowRankOperands, Operand, Saved, Trained,
};
use crate::error::Result;
use crate::lora::Lora;
use crate::which::Which;

const BLOCK: &str = "swiglu block with LoRA";
const GRADIENT: &str = "gradient of a swiglu block with LoRA";

/// A packed block with pairs. Clones share the weights.
#[derive(Clone)]
pub(super) struct Block(Arc<Inner>);

struct Inner {
    base: packed::Block,
    pairs: Pairs,
    recompute: bool,
    /// The packed pairs of gate and up, and of down, if they are constants without dropout.
    low_rank: Option<Arc<[Option<LowRank>; 2]>>,
}

impl Block {
    pub(super) fn new(base: packed::Block, pairs: &Pairs) -> Result<Self> {
        let inner = &*base.0;
        let pack = |which| {
            let addend = inner.addend(pairs, which, 1.0)?;
            addend.map(|addend| addend.with(|a, b| inner.layer.low_rank(a, b))).transpose()
        };
        let dropped = pairs.iter().flatten().any(|pair| pair.dropout() > 0.0);
        let low_rank =
            if are_tracked(pairs) || dropped { None } else { Some(Arc::new([pack(0)?, pack(1)?])) };
        let pairs = pairs.clone();
        Ok(Self(Arc::new(Inner { base, pairs, recompute: false, low_rank })))
    }
}

impl fmt::Debug for Block {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("cpu_lora::Block").field(&self.0.base).field(&self.0.pairs).finish()
    }
}

impl super::Block for Block {
    fn dtype(&self) -> DType {
        self.0.base.dtype()
    }

    fn device(&self) -> &Device {
        &Device::Cpu
    }

    fn kernel(&self) -> &str {
        self.0.base.kernel()
    }

    fn is_packed(&self) -> bool {
        true
    }

    fn forward(&self, x: &Tensor) -> candle_core::Result<Tensor> {
        if self.0.low_rank.is_some() && !is_tracked(x) {
            return x.apply_op1_no_bwd(self);
        }
        match self.dtype() {
            DType::F32 => self.0.run::<f32>(x),
            DType::BF16 => self.0.run::<bf16>(x),
            _ => self.0.run::<f16>(x),
        }
    }

    fn weight(&self, which: Which) -> candle_core::Result<Tensor> {
        self.0.base.weight(which)
    }

    fn bias(&self, which: Which) -> candle_core::Result<Option<Tensor>> {
        self.0.base.bias(which)
    }

    fn with_recompute(&self, recompute: bool) -> Option<Arc<dyn super::Block>> {
        let Inner { base, pairs, low_rank, .. } = &*self.0;
        let (base, pairs, low_rank) = (base.clone(), pairs.clone(), low_rank.clone());
        Some(Arc::new(Self(Arc::new(Inner { base, pairs, recompute, low_rank }))))
    }

    fn packed_bytes(&self) -> Vec<&[u8]> {
        self.0.base.packed_bytes()
    }
}

impl CustomOp1 for Block {
    fn name(&self) -> &'static str {
        BLOCK
    }

    fn cpu_fwd(&self, x: &CpuStorage, layout: &Layout) -> candle_core::Result<(CpuStorage, Shape)> {
        let (base, low_rank) = (&*self.0.base.0, self.0.low_rank.as_deref());
        let shape = output_shape(layout, base.spec.hidden_size)?;
        let low_rank = low_rank.map_or([None; 2], |pairs| pairs.each_ref().map(Option::as_ref));
        Ok((base.layer.forward((x, layout), low_rank)?, shape))
    }
}

impl packed::Inner {
    /// The addend of gate and up, or of down.
    fn addend(
        &self,
        pairs: &Pairs,
        which: usize,
        factor: f64,
    ) -> candle_core::Result<Option<Addend>> {
        let BlockSpec { hidden_size, intermediate_size, .. } = self.spec;
        let (pairs, rows) = match which {
            0 => (&pairs[..2], intermediate_size),
            _ => (&pairs[2..], hidden_size),
        };
        Addend::new(pairs, rows, self.dtype, factor)
    }
}

/// What a call computes with: the addends in the dtype of the weights, and their dropouts.
struct Call {
    addends: [Option<Addend>; 2],
    dropouts: [Option<Dropout>; 2],
}

impl Call {
    fn with_operands<R>(
        &self,
        f: impl FnOnce([Option<LowRankOperands>; 2]) -> Result<R>,
    ) -> candle_core::Result<R> {
        let [gate_up, down] = &self.addends;
        let [gate_up_dropout, down_dropout] = self.dropouts;
        with_addend(gate_up.as_ref(), gate_up_dropout, |gate_up| {
            with_addend(down.as_ref(), down_dropout, |down| f([gate_up, down]))
                .map_err(crate::Error::Candle)
        })
    }
}

fn with_addend<R>(
    addend: Option<&Addend>,
    dropout: Option<Dropout>,
    f: impl FnOnce(Option<LowRankOperands>) -> Result<R>,
) -> candle_core::Result<R> {
    match addend {
        Some(addend) => addend.with(|a, b| f(Some(LowRankOperands { a, b, dropout }))),
        None => Ok(f(None)?),
    }
}

/// The pairs of gate and up have one mask, and the same probability (`adapted.rs`).
fn dropout_of(pairs: &[Option<Lora>]) -> candle_core::Result<Option<Dropout>> {
    let probability = pairs.iter().flatten().map(Lora::dropout).fold(0.0, f32::max);
    if probability == 0.0 {
        return Ok(None);
    }
    let bits = Tensor::rand(0f64, 1.0, 2, &Device::Cpu)?.to_vec1::<f64>()?;
    let seed = bits.iter().fold(0u64, |seed, bits| seed.rotate_left(32) ^ bits.to_bits());
    Ok(Some(Dropout { seed, probability }))
}

/// 1/(1-p); 0 if everything is dropped.
fn kept(dropout: Option<Dropout>) -> f64 {
    match dropout {
        None => 1.0,
        Some(Dropout { probability, .. }) if probability >= 1.0 => 0.0,
        Some(Dropout { probability, .. }) => 1.0 / (1.0 - f64::from(probability)),
    }
}

impl Inner {
    fn call(&self) -> candle_core::Result<Call> {
        let dropouts = [dropout_of(&self.pairs[..2])?, dropout_of(&self.pairs[2..])?];
        let base = &self.base.0;
        let addend = |which: usize| base.addend(&self.pairs, which, kept(dropouts[which]));
        Ok(Call { addends: [addend(0)?, addend(1)?], dropouts })
    }

    fn run<T: Trained>(self: &Arc<Self>, x: &Tensor) -> candle_core::Result<Tensor> {
        let BlockSpec { hidden_size, intermediate_size, .. } = self.base.0.spec;
        check_rows(x, [hidden_size, intermediate_size])?;
        let call = self.call()?;
        let tensors = self.pairs.iter().flatten().flat_map(|pair| [pair.a(), pair.b()]);
        let inputs: Vec<Tensor> =
            [x].into_iter().chain(tensors).filter(|tensor| is_tracked(tensor)).cloned().collect();
        let save = !self.recompute && !inputs.is_empty();
        let (y, saved) = call.with_operands(|low_rank| {
            Ok(with_storages([x], |[x]| {
                self.base.0.with_operands(low_rank, |block| {
                    T::block_forward(cpu::selected()?, block, x, save)
                })
            })?)
        })?;
        let (this, under) = (self.clone(), inputs.first().cloned());
        let (value, x) = (value(y, x.shape().clone()), x.clone());
        let backward = move |dy: &Tensor| {
            let gradients = this.gradients::<T>([&x, dy], &call, &saved)?;
            gradients.into_iter().map(|value| gradient(GRADIENT, value, under.as_ref())).collect()
        };
        function(BLOCK, value, &inputs, backward)
    }

    /// The gradients of the inputs, in their order.
    fn gradients<T: Trained>(
        &self,
        [x, dy]: [&Tensor; 2],
        call: &Call,
        saved: &Saved<T>,
    ) -> candle_core::Result<Vec<Value>> {
        let (gate_up, down) = self.pairs.split_at(2);
        let low_rank = [are_tracked(gate_up), are_tracked(down)];
        let wanted = BlockWanted { x: is_tracked(x), low_rank, ..BlockWanted::default() };
        let gradients = call.with_operands(|low_rank| {
            Ok(with_storages([x, dy], |operands| {
                self.base.0.with_operands(low_rank, |block| {
                    T::block_backward(cpu::selected()?, block, operands, saved, &wanted)
                })
            })?)
        })?;
        let mut all = vec![];
        all.extend(gradients.x.map(|dx| value(dx, x.shape().clone())));
        let pairs = [gate_up, down].into_iter().zip(gradients.low_rank).zip(call.dropouts);
        for ((pairs, gradients), dropout) in pairs {
            if let Some(gradients) = gradients {
                all.extend(of_pairs(pairs, gradients, kept(dropout))?);
            }
        }
        Ok(all)
    }
}

/// The gradients of A and B of each pair, as far as they are tracked, from those of an addend.
fn of_pairs(
    pairs: &[Option<Lora>],
    LowRankGradients { a, b }: LowRankGradients,
    factor: f64,
) -> candle_core::Result<Vec<Value>> {
    let (mut all, mut start) = (vec![], 0);
    let ranks: usize = pairs.iter().flatten().map(rank).sum();
    let a = Tensor::from_vec(a, (ranks, ()), &Device::Cpu)?;
    for (pair, b) in pairs.iter().zip(b) {
        let Some(pair) = pair else { continue };
        let r = rank(pair);
        if is_tracked(pair.a()) {
            let a = a.narrow(0, start, r)?.to_dtype(pair.a().dtype())?;
            all.push(Value::Tensor(a.force_contiguous()?));
        }
        if is_tracked(pair.b()) {
            let b = Tensor::from_vec(b, ((), ranks), &Device::Cpu)?.narrow(1, start, r)?;
            let b = (b * (pair.scale() * factor))?;
            all.push(Value::Tensor(b.to_dtype(pair.b().dtype())?));
        }
        start += r;
    }
    Ok(all)
}

impl Addend {
    /// Calls `f` with the storages of A and B.
    fn with<R>(&self, f: impl FnOnce(Operand, &[Operand]) -> Result<R>) -> candle_core::Result<R> {
        let a = self.a.storage_and_layout();
        let b: Vec<_> = self.b.iter().map(Tensor::storage_and_layout).collect();
        let b = b.iter().map(|(storage, layout)| on_cpu((&**storage, *layout)));
        let b: Vec<Operand> = b.collect::<candle_core::Result<_>>()?;
        Ok(f(on_cpu((&*a.0, a.1))?, &b)?)
    }
}
