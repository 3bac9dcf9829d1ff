//! Products through cuBLAS.

use std::ffi::c_void;

use candle_core::cuda_backend::cudarc::cublas::{result::gemm_ex, sys as blas};
use candle_core::cuda_backend::{CudaDevice, WrapErr, gemm_reduced_precision_f32};
use candle_core::{Result, bail};

use super::launch::{Element, Pointer};

/// y (M,N) = factor · (x (M,K) · w (N,K)ᵀ + y if `add`), on candle's handle and so on candle's
/// stream. Sums are in f32, or in TF32 where candle is configured to use it for f32 matmuls.
///
/// cuBLAS is column-major: it sees row-major w as Wᵀ (K,N), x as (K,M) and y as (N,M). The product
/// is y = (Wᵀ)ᵀ·x with leading dimensions K, K and N. With `add`, y is the C operand, and both α
/// and β are the factor.
///
/// # Safety
/// The pointers are valid for the sizes given.
pub(super) unsafe fn gemm<T: Element>(
    device: &CudaDevice,
    (x, w, y): (u64, &Pointer<'_>, u64),
    sizes: (usize, usize, usize),
    factor: f32,
    add: bool,
) -> Result<()> {
    let [Ok(m), Ok(n), Ok(k)] = [sizes.0, sizes.1, sizes.2].map(i32::try_from) else {
        bail!("cuBLAS takes sizes below 2^31, found M, N, K = {sizes:?}")
    };
    let compute = match T::CUDA {
        blas::cudaDataType_t::CUDA_R_32F if gemm_reduced_precision_f32() => {
            blas::cublasComputeType_t::CUBLAS_COMPUTE_32F_FAST_TF32
        }
        _ => blas::cublasComputeType_t::CUBLAS_COMPUTE_32F,
    };
    tracing::trace!(kernel = "cublas", rows = m, columns = n, k, "launch");
    let (alpha, beta) = (factor, if add { factor } else { 0.0 });
    device.cuda_stream().context().bind_to_thread().w()?;
    let handle = device.cublas_handle();
    // SAFETY: the handle is alive. α and β are f32, as these compute types require, and are read
    // before the call returns. The caller guarantees the memory.
    unsafe {
        gemm_ex(
            *handle.handle(),
            blas::cublasOperation_t::CUBLAS_OP_T,
            blas::cublasOperation_t::CUBLAS_OP_N,
            n,
            m,
            k,
            std::ptr::from_ref(&alpha).cast::<c_void>(),
            w.address as *const c_void,
            T::CUDA,
            k,
            x as *const c_void,
            T::CUDA,
            k,
            std::ptr::from_ref(&beta).cast::<c_void>(),
            y as *mut c_void,
            T::CUDA,
            n,
            compute,
            blas::cublasGemmAlgo_t::CUBLAS_GEMM_DEFAULT_TENSOR_OP,
        )
    }
    .w()
}
