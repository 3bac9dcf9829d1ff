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

/// The kernels of a GPU, loaded once when a layer is built.
#[derive(Clone)]
pub(crate) struct GpuKernels {
    /// The name that `kernel()` returns.
    pub(crate) name: &'static str,
    #[cfg(feature = "cuda")]
    functions: Option<std::sync::Arc<crate::cuda::Functions>>,
}

impl GpuKernels {
    /// Loads the kernels of a device for which [`has_kernels`] is true. Waits for the device, so
    /// that the weights are complete before the first `forward`.
    pub(crate) fn load(device: &Device) -> candle_core::Result<Self> {
        match device {
            #[cfg(feature = "cuda")]
            Device::Cuda(device) => {
                let functions = Some(crate::cuda::prepare(device)?);
                Ok(Self { name: crate::cuda::kernel_name(device), functions })
            }
            #[cfg(feature = "metal")]
            Device::Metal(_) => Ok(Self {
                name: "metal",
                #[cfg(feature = "cuda")]
                functions: None,
            }),
            // The layout of the weights is tested on the CPU.
            _ => Ok(Self {
                name: "plain",
                #[cfg(feature = "cuda")]
                functions: None,
            }),
        }
    }

    /// The functions of a CUDA device.
    #[cfg(feature = "cuda")]
    pub(crate) fn cuda(&self) -> candle_core::Result<&crate::cuda::Functions> {
        match &self.functions {
            Some(functions) => Ok(functions),
            None => candle_core::bail!("x is on a CUDA device, the weights are not"),
        }
    }
}
