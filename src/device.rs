//! Weights in the layout of the GPU kernels: gate and up in one matrix, the only copy.
//!
//! A backend (`cuda`, `metal`) computes y from a [`DeviceBlock`] or a [`DeviceLinear`] and a
//! contiguous x (M, k) at any offset. `backend.rs` tells which devices have a backend.

use candle_core::Tensor;

use crate::error::{Error, Result};
use crate::gate::activation::Glu;
use crate::which::Which;

/// The block's weights, contiguous, in one dtype on one device.
#[cfg_attr(
    not(any(feature = "cuda", feature = "metal")),
    allow(dead_code, reason = "the backends read them")
)]
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
    /// Factor of the result of the down projection, bias included.
    pub(crate) down_multiplier: f32,
}

/// The weight of a linear layer, contiguous, and its bias in the same dtype on the same device.
#[derive(Clone, Debug)]
pub(crate) struct DeviceLinear {
    /// (out, in)
    pub(crate) weight: Tensor,
    /// (out)
    pub(crate) bias: Option<Tensor>,
}

impl DeviceLinear {
    /// Copies tensors that are not contiguous.
    pub(crate) fn new(weight: &Tensor, bias: Option<&Tensor>) -> candle_core::Result<Self> {
        Ok(Self { weight: weight.contiguous()?, bias: bias.map(Tensor::contiguous).transpose()? })
    }
}

/// A block's weights while they are written to its device.
#[derive(Default)]
pub(crate) struct Parts {
    /// (2I,H)
    gate_up: Option<Tensor>,
    /// (2I)
    gate_up_bias: Option<Tensor>,
    /// Which halves of `gate_up` have been written.
    written: [bool; 2],
    down: Option<DeviceLinear>,
}

impl Parts {
    /// Stores gate and up from one tensor, gate first. A contiguous tensor is used without a copy.
    pub(crate) fn set_gate_up(
        &mut self,
        weight: &Tensor,
        bias: Option<&Tensor>,
    ) -> candle_core::Result<()> {
        self.gate_up = Some(weight.contiguous()?);
        self.gate_up_bias = bias.map(Tensor::contiguous).transpose()?;
        self.written = [true; 2];
        Ok(())
    }

    /// Stores one matrix (rows, k) and its bias (rows).
    pub(crate) fn set(
        &mut self,
        which: Which,
        weight: &Tensor,
        bias: Option<&Tensor>,
    ) -> candle_core::Result<()> {
        let half = match which {
            Which::Gate => 0,
            Which::Up => 1,
            Which::Down => {
                self.down = Some(DeviceLinear::new(weight, bias)?);
                return Ok(());
            }
        };
        set_half(&mut self.gate_up, half, weight)?;
        self.written[half] = true;
        bias.map_or(Ok(()), |bias| set_half(&mut self.gate_up_bias, half, bias))
    }

    /// # Errors
    /// A matrix has not been stored.
    pub(crate) fn into_block(self, glu: Glu, down_multiplier: f32) -> Result<DeviceBlock> {
        for (which, written) in [Which::Gate, Which::Up].into_iter().zip(self.written) {
            if !written {
                return Err(Error::missing(which.name()));
            }
        }
        let gate_up = self.gate_up.ok_or_else(|| Error::missing(Which::Gate.name()))?;
        let DeviceLinear { weight: down, bias: down_bias } =
            self.down.ok_or_else(|| Error::missing(Which::Down.name()))?;
        Ok(DeviceBlock {
            gate_up,
            gate_up_bias: self.gate_up_bias,
            down,
            down_bias,
            glu,
            down_multiplier,
        })
    }
}

/// Writes one of two equal halves of `both`, which is created with zeros.
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

impl DeviceBlock {
    /// A view of a matrix (rows, k).
    pub(crate) fn weight(&self, which: Which) -> candle_core::Result<Tensor> {
        view(&self.gate_up, &self.down, which)
    }

    /// A view of the bias (rows) of a matrix. Where only one of gate and up has a bias, the other's
    /// is zero.
    pub(crate) fn bias(&self, which: Which) -> candle_core::Result<Option<Tensor>> {
        match (which, &self.gate_up_bias) {
            (Which::Down, _) => Ok(self.down_bias.clone()),
            (_, Some(bias)) => view(bias, bias, which).map(Some),
            (_, None) => Ok(None),
        }
    }
}

fn view(gate_up: &Tensor, down: &Tensor, which: Which) -> candle_core::Result<Tensor> {
    let i = gate_up.dim(0)? / 2;
    match which {
        Which::Gate => gate_up.narrow(0, 0, i),
        Which::Up => gate_up.narrow(0, i, i),
        Which::Down => Ok(down.clone()),
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use candle_core::Device;

    use super::*;
    use crate::gate::activation::GluActivation;

    /// A matrix (rows, 3) of consecutive numbers, which start with `from`.
    fn matrix(from: f32, rows: usize) -> Tensor {
        Tensor::arange(from, from + 3.0 * rows as f32, &Device::Cpu)
            .unwrap()
            .reshape((rows, 3))
            .unwrap()
    }

    fn silu() -> Glu {
        Glu::new(GluActivation::Silu)
    }

    #[test]
    fn gate_and_up_share_a_matrix_and_are_views_of_it() {
        let (gate, up, down) = (matrix(0.0, 5), matrix(100.0, 5), matrix(200.0, 5).t().unwrap());
        let bias = |from: f32| Tensor::arange(from, from + 5.0, &Device::Cpu).unwrap();
        for gate_first in [true, false] {
            let mut parts = Parts::default();
            let mut pieces = [(Which::Gate, &gate, bias(1.0)), (Which::Up, &up, bias(2.0))];
            if !gate_first {
                pieces.reverse();
            }
            for (which, weight, bias) in &pieces {
                parts.set(*which, weight, Some(bias)).unwrap();
            }
            parts.set(Which::Down, &down, None).unwrap();
            let block = parts.into_block(silu(), 1.0).unwrap();
            assert_eq!((block.gate_up.dims(), block.down.dims()), (&[10, 3][..], &[3, 5][..]));
            assert!(block.gate_up.is_contiguous() && block.down.is_contiguous());
            for (which, expected, from) in [
                (Which::Gate, &gate, Some(1.0)),
                (Which::Up, &up, Some(2.0)),
                (Which::Down, &down, None),
            ] {
                let weight = block.weight(which).unwrap();
                assert_eq!(
                    weight.to_vec2::<f32>().unwrap(),
                    expected.to_vec2::<f32>().unwrap(),
                    "{which:?}"
                );
                let found = block.bias(which).unwrap().map(|bias| bias.to_vec1::<f32>().unwrap());
                assert_eq!(
                    found,
                    from.map(|from| bias(from).to_vec1::<f32>().unwrap()),
                    "{which:?}"
                );
            }
        }
    }

    #[test]
    fn a_fused_tensor_is_used_without_a_copy() {
        let both = matrix(0.0, 6);
        let mut parts = Parts::default();
        parts.set_gate_up(&both, None).unwrap();
        parts.set(Which::Down, &matrix(50.0, 3), None).unwrap();
        let block = parts.into_block(silu(), 1.0).unwrap();
        assert_eq!(block.gate_up.id(), both.id());
        let up = block.weight(Which::Up).unwrap();
        assert_eq!(
            up.to_vec2::<f32>().unwrap(),
            both.narrow(0, 3, 3).unwrap().to_vec2::<f32>().unwrap()
        );
        assert!(block.bias(Which::Up).unwrap().is_none());
    }

    #[test]
    fn a_missing_matrix_is_named() {
        for (set, missing) in [
            (&[][..], "gate_proj"),
            (&[Which::Up, Which::Down][..], "gate_proj"),
            (&[Which::Gate, Which::Down], "up_proj"),
            (&[Which::Gate, Which::Up], "down_proj"),
        ] {
            let mut parts = Parts::default();
            set.iter().for_each(|which| parts.set(*which, &matrix(0.0, 3), None).unwrap());
            let error = parts.into_block(silu(), 1.0).unwrap_err().to_string();
            assert!(error.starts_with(&format!("no tensor {missing}.weight")), "{error}");
        }
    }
}
