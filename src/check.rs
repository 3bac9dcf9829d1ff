//! Checks of tensors that several layers share.

use candle_core::{DType, Device, Tensor};

use crate::error::{Error, Result};

/// `tensor` has a float dtype of this crate.
pub(crate) fn check_float(name: &str, tensor: &Tensor) -> Result<()> {
    match tensor.dtype() {
        DType::F16 | DType::BF16 | DType::F32 | DType::F64 => Ok(()),
        other => Err(Error::DTypeUnsupported {
            name: name.to_string(),
            found: format!("{other:?}"),
            location: None,
        }),
    }
}

/// `tensor` has the dtype and the device of `other`.
pub(crate) fn check_same(
    name: &'static str,
    tensor: &Tensor,
    other_name: &'static str,
    other: &Tensor,
) -> Result<()> {
    check_like(name, tensor, other_name, other.dtype(), other.device())
}

/// `tensor` has this dtype and this device, which are those of `other`.
pub(crate) fn check_like(
    name: &'static str,
    tensor: &Tensor,
    other: &'static str,
    dtype: DType,
    device: &Device,
) -> Result<()> {
    let (expected, found) = (device.location(), tensor.device().location());
    if expected != found {
        return Err(Error::DeviceMismatch { name, other, expected, found });
    }
    let (expected, found) = (dtype, tensor.dtype());
    if expected != found {
        return Err(Error::DTypeMismatch { name, other, expected, found });
    }
    Ok(())
}
