//! Launches, by cuBLAS too, and what they need: device pointers, arguments, tensor maps.

use std::ffi::c_void;
use std::ops::Deref;

use candle_core::backend::BackendStorage;
use candle_core::cuda_backend::cudarc::cublas::result::gemm_ex;
use candle_core::cuda_backend::cudarc::cublas::sys::{self as blas, cudaDataType_t};
use candle_core::cuda_backend::cudarc::driver::{
    CudaSlice, CudaStream, DevicePtr, DevicePtrMut, DeviceRepr, SyncOnDrop, sys,
};
use candle_core::cuda_backend::{
    CudaDType, CudaDevice, CudaStorage, WrapErr, gemm_reduced_precision_f32,
};
use candle_core::{Layout, Result, Storage, Tensor, WithDType, bail};
use half::{bf16, f16};

use super::functions::Functions;
use super::plan::{Grid, Kernel, gate_grid};

// ---------------------------------------------------------------- dtypes

/// An element type of the kernels.
pub(super) trait Element: CudaDType + WithDType + DeviceRepr + 'static {
    /// The dtype in cuBLAS.
    const CUDA: cudaDataType_t;
}

impl Element for f64 {
    const CUDA: cudaDataType_t = cudaDataType_t::CUDA_R_64F;
}

impl Element for f32 {
    const CUDA: cudaDataType_t = cudaDataType_t::CUDA_R_32F;
}

impl Element for bf16 {
    const CUDA: cudaDataType_t = cudaDataType_t::CUDA_R_16BF;
}

impl Element for f16 {
    const CUDA: cudaDataType_t = cudaDataType_t::CUDA_R_16F;
}

// ---------------------------------------------------------------- pointers

/// Device memory that a launch reads or writes. While this value exists, cudarc knows that the
/// stream uses the memory: it has waited for the writes of other streams, and when the value is
/// dropped it records the use. (Both only happen where a device has a stream of its own.) Drop it
/// after the launch.
pub(super) struct Pointer<'a> {
    pub(super) address: u64,
    _in_use: Option<SyncOnDrop<'a>>,
}

/// A null pointer: no bias.
pub(super) const NULL: Pointer<'static> = Pointer { address: 0, _in_use: None };

impl<'a> Pointer<'a> {
    /// The elements of `storage` from `offset` on, for reading.
    pub(super) fn read<T: Element>(
        storage: &'a CudaStorage,
        offset: usize,
        stream: &'a CudaStream,
    ) -> Result<Self> {
        let slice = storage.as_cuda_slice::<T>()?;
        if slice.context().cu_ctx() != stream.context().cu_ctx() {
            bail!("the tensors of one operation are on different GPUs");
        }
        let (start, in_use) = slice.device_ptr(stream);
        Ok(Self { address: start + (offset * size_of::<T>()) as u64, _in_use: Some(in_use) })
    }

    /// All elements of `slice`, for reading and writing.
    pub(super) fn write<T: Element>(slice: &'a mut CudaSlice<T>, stream: &'a CudaStream) -> Self {
        let (address, in_use) = slice.device_ptr_mut(stream);
        Self { address, _in_use: Some(in_use) }
    }

    /// Whether a 16-byte vector access may start here.
    pub(super) fn is_aligned(&self) -> bool {
        self.address.is_multiple_of(16)
    }
}

/// A contiguous weight or bias on a CUDA device. G is candle's read lock.
pub(super) struct Weight<G> {
    storage: G,
    offset: usize,
}

/// Locks `tensor` for reading.
pub(super) fn weight(tensor: &Tensor) -> Result<Weight<impl Deref<Target = Storage> + '_>> {
    let (storage, layout) = tensor.storage_and_layout();
    match (&*storage, layout.contiguous_offsets()) {
        (Storage::Cuda(_), Some((offset, _))) => Ok(Weight { storage, offset }),
        _ => bail!("a weight of the CUDA kernels must be contiguous and on a CUDA device"),
    }
}

impl<G: Deref<Target = Storage>> Weight<G> {
    pub(super) fn pointer<'a, T: Element>(&'a self, stream: &'a CudaStream) -> Result<Pointer<'a>> {
        match &*self.storage {
            Storage::Cuda(storage) => Pointer::read::<T>(storage, self.offset, stream),
            _ => bail!("a weight of the CUDA kernels must be on a CUDA device"),
        }
    }

    /// A null pointer where there is no weight.
    pub(super) fn optional<'a, T: Element>(
        weight: &'a Option<Self>,
        stream: &'a CudaStream,
    ) -> Result<Pointer<'a>> {
        weight.as_ref().map_or(Ok(NULL), |weight| weight.pointer::<T>(stream))
    }
}

/// A copy of the elements of `layout` in row-major order.
pub(super) fn contiguous<T: Element>(
    storage: &CudaStorage,
    layout: &Layout,
) -> Result<CudaStorage> {
    let device = storage.device();
    // SAFETY: the copy below writes all of it before anything reads it.
    let copy = unsafe { device.alloc::<T>(layout.shape().elem_count())? };
    let mut copy = CudaStorage::wrap_cuda_slice(copy, device.clone());
    storage.copy_strided_src(&mut copy, 0, layout)?;
    Ok(copy)
}

// ---------------------------------------------------------------- launches

/// Pointers to a kernel's arguments, in order.
macro_rules! arguments {
    ($($value:expr),* $(,)?) => { &mut [$(std::ptr::from_ref(&$value).cast_mut().cast::<std::ffi::c_void>()),*] };
}
pub(super) use arguments;

/// What all launches of one call share.
pub(super) struct LaunchContext<'a> {
    pub(super) device: &'a CudaDevice,
    pub(super) stream: &'a CudaStream,
    pub(super) functions: &'a Functions,
}

/// A kernel, its grid, and the rows that it computes (for the trace).
#[derive(Clone, Copy, Debug)]
pub(super) struct Launch {
    pub(super) kernel: Kernel,
    pub(super) grid: Grid,
    pub(super) rows: usize,
    /// The kernel may start while its predecessor on the stream still runs (programmatic dependent
    /// launch), if its code waits by itself. This hides its start and the latency of its first
    /// weights.
    pub(super) early: bool,
}

impl LaunchContext<'_> {
    /// Allocates (rows, columns). The launches that follow must write all of it.
    pub(super) fn alloc<T: Element>(&self, rows: usize, columns: usize) -> Result<CudaSlice<T>> {
        let Some(elements) = rows.checked_mul(columns) else {
            bail!("a matrix of {rows} by {columns} is too large")
        };
        // SAFETY: every path writes each element before anything reads it, on the stream of the
        // allocation.
        unsafe { self.device.alloc::<T>(elements) }
    }

    /// A launch of gate.cu over (rows, columns).
    pub(super) fn over<T: Element>(&self, kernel: Kernel, rows: usize, columns: usize) -> Launch {
        let grid = gate_grid(rows, columns, T::DTYPE, self.functions.gpu.sms);
        Launch { kernel, grid, rows, early: false }
    }

    /// Launches the code of a kernel for T.
    ///
    /// # Safety
    /// The arguments are those of the kernel in number, order and type. Its pointers are valid for
    /// all it reads and writes. With `early`, the weights that it reads were complete before its
    /// predecessor on the stream was launched.
    pub(super) unsafe fn launch<T: Element>(
        &self,
        launch: Launch,
        arguments: &mut [*mut c_void],
    ) -> Result<()> {
        let Launch { kernel, grid, rows, early } = launch;
        let function = self.functions.get(kernel, T::DTYPE)?;
        let name = function.name.as_str();
        tracing::trace!(kernel = name, grid = grid.blocks, threads = grid.threads, rows, "launch");
        let Ok(blocks) = u32::try_from(grid.blocks) else {
            bail!(
                "the CUDA kernel {name} takes a grid of fewer than 2^32 blocks, found {}",
                grid.blocks
            )
        };
        self.stream.context().bind_to_thread().w()?;
        let mut attribute = sys::CUlaunchAttribute {
            id: sys::CUlaunchAttributeID::CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION,
            pad: Default::default(),
            value: sys::CUlaunchAttributeValue { programmaticStreamSerializationAllowed: 1 },
        };
        let config = sys::CUlaunchConfig {
            gridDimX: blocks,
            gridDimY: 1,
            gridDimZ: 1,
            blockDimX: grid.threads,
            blockDimY: 1,
            blockDimZ: 1,
            sharedMemBytes: function.shared,
            hStream: self.stream.cu_stream(),
            attrs: &mut attribute,
            numAttrs: u32::from(early && function.waits),
        };
        // SAFETY: the configuration and its attribute outlive the call, and the context is current.
        // The caller guarantees the rest.
        unsafe {
            sys::cuLaunchKernelEx(
                &config,
                function.cu_function(),
                arguments.as_mut_ptr(),
                std::ptr::null_mut(),
            )
        }
        .result()
        .w()
        .map_err(|error| error.context(format!("cannot launch the CUDA kernel {name}")))
    }
}

/// Whether the stream records a CUDA graph. (An error means that another stream does, which the
/// next launch will report.)
pub(super) fn is_capturing(stream: &CudaStream) -> bool {
    let none = sys::CUstreamCaptureStatus::CU_STREAM_CAPTURE_STATUS_NONE;
    stream.capture_status().is_ok_and(|status| status != none)
}

/// The tensor map of a row-major matrix (rows, columns) of 2-byte elements at `address`, in boxes
/// of (rows, columns). Boxes of 64 columns, which are 128 B, are swizzled; narrower ones are not.
pub(super) fn tensor_map<T: Element>(
    address: u64,
    (rows, columns): (usize, usize),
    (box_rows, box_columns): (u32, u32),
) -> Result<sys::CUtensorMap> {
    let swizzle = if box_columns == 64 {
        sys::CUtensorMapSwizzle::CU_TENSOR_MAP_SWIZZLE_128B
    } else {
        sys::CUtensorMapSwizzle::CU_TENSOR_MAP_SWIZZLE_NONE
    };
    let dtype = match T::CUDA {
        cudaDataType_t::CUDA_R_16BF => sys::CUtensorMapDataType::CU_TENSOR_MAP_DATA_TYPE_BFLOAT16,
        _ => sys::CUtensorMapDataType::CU_TENSOR_MAP_DATA_TYPE_FLOAT16,
    };
    let (dims, strides) = ([columns as u64, rows as u64], [(columns * size_of::<T>()) as u64]);
    let (boxes, element_strides) = ([box_columns, box_rows], [1, 1]);
    let mut map = sys::CUtensorMap { opaque: [0; 16] };
    // SAFETY: every pointer is to an array that outlives the call, of the rank's length, or of one
    // less for the strides. `address` is only encoded.
    unsafe {
        sys::cuTensorMapEncodeTiled(
            &mut map,
            dtype,
            2,
            address as *mut c_void,
            dims.as_ptr(),
            strides.as_ptr(),
            boxes.as_ptr(),
            element_strides.as_ptr(),
            sys::CUtensorMapInterleave::CU_TENSOR_MAP_INTERLEAVE_NONE,
            swizzle,
            sys::CUtensorMapL2promotion::CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
            sys::CUtensorMapFloatOOBfill::CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE,
        )
    }
    .result()
    .w()?;
    Ok(map)
}

// ---------------------------------------------------------------- cuBLAS

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
