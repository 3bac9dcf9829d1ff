//! Which kernels of this crate a GPU has. `engine` checks once, when a layer is built, and uses
//! candle's matmuls if there are none.

use candle_core::{DType, Device};

use crate::forced;

/// Whether this GPU has kernels for the block and for projections in this dtype.
pub(crate) fn has_kernels(device: &Device, dtype: DType) -> bool {
    match device {
        #[cfg(feature = "cuda")]
        Device::Cuda(device) => crate::cuda::supports(device, dtype),
        #[cfg(feature = "metal")]
        Device::Metal(device) => crate::metal::supports(device, dtype),
        _ => {
            let _ = dtype;
            false
        }
    }
}

/// Whether this device has the fused gate, forward and backward, for this dtype.
pub(crate) fn has_glu(device: &Device, dtype: DType) -> bool {
    match device {
        _ if forced::is_plain() => false,
        Device::Cpu => true,
        #[cfg(feature = "cuda")]
        Device::Cuda(device) => crate::cuda::supports_glu(device, dtype),
        #[cfg(feature = "metal")]
        Device::Metal(device) => crate::metal::supports_glu(device, dtype),
        #[cfg(not(all(feature = "cuda", feature = "metal")))]
        _ => {
            let _ = dtype;
            false
        }
    }
}

/// Loads the kernels of a device for which [`has_kernels`] is true. Synchronizes with the device,
/// so that the weights are complete before the first `forward`.
pub(crate) fn prepare(device: &Device) -> candle_core::Result<()> {
    match device {
        #[cfg(feature = "cuda")]
        Device::Cuda(device) => crate::cuda::prepare(device),
        _ => Ok(()),
    }
}

/// The name of the kernels of a device for which [`has_kernels`] is true.
pub(crate) fn kernel_name(device: &Device) -> &'static str {
    match device {
        #[cfg(feature = "cuda")]
        Device::Cuda(device) => crate::cuda::kernel_name(device),
        #[cfg(feature = "metal")]
        Device::Metal(_) => "metal",
        _ => "plain",
    }
}
