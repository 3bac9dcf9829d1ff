//! A packed linear layer with a low-rank pair.

use std::fmt;
use std::sync::Arc;

use candle_core::{CpuStorage, CustomOp1, DType, Device, Layout, Shape, Tensor};

use crate::cpu::LowRank;
use crate::engine::adapted::drop_elements;
use crate::engine::cpu::{self as packed, output_shape};
use crate::engine::low_rank::{Addend, are_tracked};
use crate::engine::{Projection, is_tracked, trained};
use crate::error::Result;
use crate::lora::Lora;

/// A packed linear layer with a pair. Clones share the weight.
#[derive(Clone)]
pub(in crate::engine) struct Linear(Arc<LinearInner>);

struct LinearInner {
    base: packed::Linear,
    pair: Lora,
    /// The packed pair, if it is constant without dropout.
    low_rank: Option<LowRank>,
}

impl Linear {
    pub(in crate::engine) fn new(base: packed::Linear, pair: &Lora) -> Result<Self> {
        let inner = &*base.0;
        let pairs = [Some(pair.clone())];
        let low_rank = if are_tracked(&pairs) || pair.dropout() > 0.0 {
            None
        } else {
            let addend = Addend::new(&pairs, inner.shape.0, inner.dtype, 1.0)?;
            let pack = |addend: Addend| addend.with(|a, b| inner.layer.low_rank(a, b[0]));
            addend.map(pack).transpose()?
        };
        Ok(Self(Arc::new(LinearInner { base, pair: pair.clone(), low_rank })))
    }

    /// y + s·(drop(x)·Aᵀ)·Bᵀ, as operations on linear layers A and B.
    fn add_low_rank(&self, y: &Tensor, x: &Tensor) -> candle_core::Result<Tensor> {
        let pair = &self.0.pair;
        let x = drop_elements(x, pair.dropout())?;
        let through = |weight: &Tensor, x: &Tensor| {
            trained::Linear::new(weight.to_dtype(self.dtype())?, None)?.forward(x)
        };
        let change = (through(pair.b(), &through(pair.a(), &x)?)? * pair.scale())?;
        y + change.to_dtype(y.dtype())?
    }
}

impl fmt::Debug for Linear {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("cpu_lora::Linear").field(&self.0.base).field(&self.0.pair).finish()
    }
}

impl Projection for Linear {
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
        self.add_low_rank(&self.0.base.forward(x)?, x)
    }

    fn forward_f32(&self, x: &Tensor) -> candle_core::Result<Tensor> {
        if self.0.low_rank.is_some() && !is_tracked(x) {
            return x.apply_op1_no_bwd(&OutputF32(self.clone()));
        }
        self.add_low_rank(&self.0.base.forward_f32(x)?, x)
    }

    fn weight(&self) -> candle_core::Result<Tensor> {
        self.0.base.weight()
    }

    fn bias(&self) -> candle_core::Result<Option<Tensor>> {
        self.0.base.bias()
    }

    fn embed(&self, ids: &Tensor) -> Result<Tensor> {
        self.0.base.embed(ids)
    }
}

impl CustomOp1 for Linear {
    fn name(&self) -> &'static str {
        "packed linear with LoRA"
    }

    fn cpu_fwd(&self, x: &CpuStorage, layout: &Layout) -> candle_core::Result<(CpuStorage, Shape)> {
        let base = &*self.0.base.0;
        let shape = output_shape(layout, base.shape.0)?;
        Ok((base.layer.forward((x, layout), self.0.low_rank.as_ref())?, shape))
    }
}

/// The linear layer with y in f32.
struct OutputF32(Linear);

impl CustomOp1 for OutputF32 {
    fn name(&self) -> &'static str {
        "packed linear with LoRA, f32 output"
    }

    fn cpu_fwd(&self, x: &CpuStorage, layout: &Layout) -> candle_core::Result<(CpuStorage, Shape)> {
        let base = &*self.0.0.base.0;
        let shape = output_shape(layout, base.shape.0)?;
        Ok((base.layer.forward_f32((x, layout), self.0.0.low_rank.as_ref())?, shape))
    }
}
