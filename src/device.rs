//! Weights on a GPU as its kernels read them: gate and up in one matrix, the only copy.
//!
//! A backend (`cuda`, `metal`) takes a [`DeviceBlock`] or a [`DeviceLinear`] and x (M, k), contiguous at any offset, and gives
//! y (`backend.rs` says which devices have one).

use candle_core::Tensor;

use crate::activation::Glu;
use crate::cpu::Part;

/// The block's weights, contiguous, in one dtype on one device.
#[cfg_attr(not(any(feature = "cuda", feature = "metal")), allow(dead_code, reason = "the backends read them"))]
#[derive(Clone, Debug)]
pub(crate) struct DeviceBlock {
    /// (2I,H): rows 0..I are the gate, rows I..2I up
    pub(crate) gate_up: Tensor,
    /// (2I)
    pub(crate) gate_up_bias: Option<Tensor>,
    /// (H,I)
    pub(crate) down: Tensor,
    /// (H)
    pub(crate) down_bias: Option<Tensor>,
    pub(crate) glu: Glu,
    /// Times the down projection's result, bias included.
    pub(crate) down_multiplier: f32,
}

/// One projection's, likewise.
#[derive(Clone, Debug)]
pub(crate) struct DeviceLinear {
    /// (out, in)
    pub(crate) weight: Tensor,
    /// (out)
    pub(crate) bias: Option<Tensor>,
}

/// A layer's weights on their way to its device.
#[derive(Default)]
pub(crate) struct Parts {
    /// Gate and up of a block.
    gate_up: Pair,
    /// Down of a block, or a linear layer's.
    whole: Pair,
}

/// A weight (rows, k) and a bias (rows).
type Pair = (Option<Tensor>, Option<Tensor>);

impl Parts {
    /// Gate and up of a checkpoint that has them in this order: as they lie, if they are contiguous.
    pub(crate) fn set_gate_up(&mut self, weight: &Tensor, bias: Option<&Tensor>) -> candle_core::Result<()> {
        self.gate_up = (Some(weight.contiguous()?), bias.map(Tensor::contiguous).transpose()?);
        Ok(())
    }

    pub(crate) fn set(&mut self, part: Part, weight: &Tensor, bias: Option<&Tensor>) -> candle_core::Result<()> {
        let Some(half) = half_of(part) else {
            self.whole = (Some(weight.contiguous()?), bias.map(Tensor::contiguous).transpose()?);
            return Ok(());
        };
        set_half(&mut self.gate_up.0, half, weight)?;
        bias.map_or(Ok(()), |bias| set_half(&mut self.gate_up.1, half, bias))
    }

    /// A view of a weight (rows, k) that was set, and of its bias (rows).
    pub(crate) fn get(&self, part: Part) -> candle_core::Result<Option<(Tensor, Option<Tensor>)>> {
        let (weight, bias) = if half_of(part).is_some() { &self.gate_up } else { &self.whole };
        weight.as_ref().map(|weight| view(weight, bias.as_ref(), half_of(part))).transpose()
    }

    /// None if a part is missing.
    pub(crate) fn into_block(self, glu: Glu, down_multiplier: f32) -> Option<DeviceBlock> {
        let ((gate_up, gate_up_bias), (down, down_bias)) = (self.gate_up, self.whole);
        Some(DeviceBlock { gate_up: gate_up?, gate_up_bias, down: down?, down_bias, glu, down_multiplier })
    }

    /// None if it is missing.
    pub(crate) fn into_linear(self) -> Option<DeviceLinear> {
        let (weight, bias) = self.whole;
        Some(DeviceLinear { weight: weight?, bias })
    }
}

/// Writes one of two equal halves of `both`, which begins as zeros.
fn set_half(both: &mut Option<Tensor>, half: usize, value: &Tensor) -> candle_core::Result<()> {
    let rows = value.dim(0)?;
    let all = match both.take() {
        Some(all) => all,
        None => {
            let mut dims = value.dims().to_vec();
            dims[0] = 2 * rows;
            Tensor::zeros(dims, value.dtype(), value.device())?
        }
    };
    all.slice_set(&value.contiguous()?, 0, half * rows)?;
    *both = Some(all);
    Ok(())
}

/// Which half of a pair's matrix is this weight.
fn half_of(part: Part) -> Option<usize> {
    match part {
        Part::Gate => Some(0),
        Part::Up => Some(1),
        Part::Down | Part::Whole => None,
    }
}

/// A weight and its bias, or one half of both.
fn view(weight: &Tensor, bias: Option<&Tensor>, half: Option<usize>) -> candle_core::Result<(Tensor, Option<Tensor>)> {
    let narrow = |tensor: &Tensor| match half {
        Some(half) => tensor.narrow(0, half * (tensor.dim(0)? / 2), tensor.dim(0)? / 2),
        None => Ok(tensor.clone()),
    };
    Ok((narrow(weight)?, bias.map(narrow).transpose()?))
}

impl DeviceBlock {
    /// A view of a weight (rows, k) and of its bias (rows).
    pub(crate) fn get(&self, part: Part) -> candle_core::Result<(Tensor, Option<Tensor>)> {
        match half_of(part) {
            Some(half) => view(&self.gate_up, self.gate_up_bias.as_ref(), Some(half)),
            None => view(&self.down, self.down_bias.as_ref(), None),
        }
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use candle_core::Device;

    use super::*;
    use crate::activation::GluActivation;

    /// rows · 3 numbers from `from` on
    fn matrix(from: f32, rows: usize) -> Tensor {
        Tensor::arange(from, from + 3.0 * rows as f32, &Device::Cpu).unwrap().reshape((rows, 3)).unwrap()
    }

    #[test]
    fn both_halves_lie_in_one_matrix_and_come_back() {
        let (gate, up, down) = (matrix(0.0, 5), matrix(100.0, 5), matrix(200.0, 5).t().unwrap());
        let bias = |from: f32| Tensor::arange(from, from + 5.0, &Device::Cpu).unwrap();
        for gate_first in [true, false] {
            let mut parts = Parts::default();
            let mut pieces = [(Part::Gate, &gate, bias(1.0)), (Part::Up, &up, bias(2.0))];
            if !gate_first {
                pieces.reverse();
            }
            for (part, weight, bias) in &pieces {
                parts.set(*part, weight, Some(bias)).unwrap();
            }
            assert!(parts.get(Part::Down).unwrap().is_none(), "not set yet");
            parts.set(Part::Down, &down, None).unwrap();
            let block = parts.into_block(Glu::new(GluActivation::Silu), 1.0).unwrap();
            assert_eq!((block.gate_up.dims(), block.down.dims()), (&[10, 3][..], &[3, 5][..]));
            assert!(block.gate_up.is_contiguous() && block.down.is_contiguous());
            for (part, expected, from) in
                [(Part::Gate, &gate, Some(1.0)), (Part::Up, &up, Some(2.0)), (Part::Down, &down, None)]
            {
                let (weight, found) = block.get(part).unwrap();
                assert_eq!(weight.to_vec2::<f32>().unwrap(), expected.to_vec2::<f32>().unwrap(), "{part:?}");
                let expected = from.map(|from| bias(from).to_vec1::<f32>().unwrap());
                assert_eq!(found.map(|bias| bias.to_vec1::<f32>().unwrap()), expected, "{part:?}");
            }
        }
    }

    #[test]
    fn a_packed_pair_is_taken_as_it_lies() {
        let both = matrix(0.0, 6);
        let mut parts = Parts::default();
        assert!(Parts::default().into_linear().is_none());
        parts.set_gate_up(&both, None).unwrap();
        let (up, bias) = parts.get(Part::Up).unwrap().unwrap();
        assert_eq!(up.to_vec2::<f32>().unwrap(), both.narrow(0, 3, 3).unwrap().to_vec2::<f32>().unwrap());
        assert!(bias.is_none());
        assert!(parts.into_block(Glu::new(GluActivation::Silu), 1.0).is_none(), "no down projection");
    }
}
