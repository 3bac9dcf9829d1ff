//! Compiles swiglu.metal: one library per GPU, and one pipeline per kernel, dtype and alignment.
//! Each is created at its first use.
//!
//! Fast math is off. Metal's default may assume that there are no NaN and ∞, and it uses divisions
//! and functions that are outside the error bounds of the activations.

use std::collections::HashMap;
use std::sync::{Mutex, OnceLock, PoisonError};

use candle_core::{DType, MetalDevice, MetalError, Result};
use candle_metal_kernels::metal::{ComputePipeline, ConstantValues, Library, Value};
use objc2::available;
use objc2::rc::Retained;
use objc2_metal::{
    MTLCompileOptions, MTLComputePipelineState, MTLDevice, MTLGPUFamily,
    MTLMathFloatingPointFunctions, MTLMathMode,
};

use super::plan::{Kernel, THREADS};
use super::source;

/// Lanes of a simdgroup, as in the kernels.
const LANES: usize = 32;

/// The index of the function constant `ALIGNED`.
const ALIGNED: usize = 0;

/// Keyed by the GPU's registry id, because several candle devices may use the same GPU.
#[derive(Default)]
struct Cache {
    libraries: HashMap<u64, Library>,
    pipelines: HashMap<(u64, Kernel, DType, bool), ComputePipeline>,
}

/// Whether the kernels run on this GPU in this dtype. They need simdgroup matrices (M1 and A14 or
/// newer), as candle's GEMM does.
pub(crate) fn supports(device: &MetalDevice, dtype: DType) -> bool {
    let dtype_is_known = match dtype {
        DType::F32 | DType::F16 => true,
        DType::BF16 => available!(macos = 14.0, ios = 17.0), // Metal 3.1
        _ => false,
    };
    dtype_is_known && device.metal_device().as_ref().supportsFamily(MTLGPUFamily::Apple7)
}

/// Whether the gate's kernels run on this GPU in this dtype.
pub(crate) fn supports_glu(device: &MetalDevice, dtype: DType) -> bool {
    supports(device, dtype)
}

/// The pipeline of a kernel. The first use of a GPU compiles the library, which takes seconds.
pub(super) fn pipeline(
    device: &MetalDevice,
    kernel: Kernel,
    dtype: DType,
    aligned: bool,
) -> Result<ComputePipeline> {
    static CACHE: OnceLock<Mutex<Cache>> = OnceLock::new();
    // A thread that panicked with the lock held has inserted a complete entry or none.
    let mut cache =
        CACHE.get_or_init(Mutex::default).lock().unwrap_or_else(PoisonError::into_inner);
    let gpu = device.metal_device().registry_id();
    let key = (gpu, kernel, dtype, aligned);
    if let Some(pipeline) = cache.pipelines.get(&key) {
        return Ok(pipeline.clone());
    }
    let library = match cache.libraries.get(&gpu) {
        Some(library) => library.clone(),
        None => {
            let library = device
                .metal_device()
                .new_library_with_source(&source(), Some(&options()))
                .map_err(MetalError::from)?;
            cache.libraries.insert(gpu, library.clone());
            library
        }
    };
    let pipeline = compile(device, &library, &kernel.name(dtype), aligned)?;
    cache.pipelines.insert(key, pipeline.clone());
    Ok(pipeline)
}

fn compile(
    device: &MetalDevice,
    library: &Library,
    name: &str,
    aligned: bool,
) -> Result<ComputePipeline> {
    let failed = |error| {
        candle_core::Error::from(MetalError::from(error))
            .context(format!("cannot make the Metal kernel {name}"))
    };
    let constants = ConstantValues::new(vec![(ALIGNED, Value::Bool(aligned))]);
    let function = library.get_function(name, Some(&constants)).map_err(failed)?;
    let pipeline = device
        .metal_device()
        .new_compute_pipeline_state_with_function(&function)
        .map_err(failed)?;
    let (lanes, threads) =
        (pipeline.as_ref().threadExecutionWidth(), pipeline.max_total_threads_per_threadgroup());
    if lanes != LANES || threads < THREADS {
        candle_core::bail!(
            "{name}: expected simdgroups of {LANES} and {THREADS} threads, found {lanes} and {threads}"
        );
    }
    Ok(pipeline)
}

/// Safe math: NaN, ∞ and signed zeros are respected, and divisions are correctly rounded.
fn options() -> Retained<MTLCompileOptions> {
    let options = MTLCompileOptions::new();
    if available!(macos = 15.0, ios = 18.0) {
        options.setMathMode(MTLMathMode::Safe);
        options.setMathFloatingPointFunctions(MTLMathFloatingPointFunctions::Precise);
    } else {
        #[allow(deprecated, reason = "there is no other before macOS 15")]
        options.setFastMathEnabled(false);
    }
    options
}
