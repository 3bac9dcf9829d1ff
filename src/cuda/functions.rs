//! The device code of build.rs, loaded once for each CUDA context.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};

use candle_core::cuda_backend::cudarc::driver::{
    CudaContext, CudaFunction, CudaModule, result, sys,
};
use candle_core::cuda_backend::cudarc::nvrtc::Ptx;
use candle_core::cuda_backend::{CudaDevice, WrapErr};
use candle_core::{DType, Result, bail};

use super::plan::{Gpu, Kernel};

const DECODE: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/decode.fatbin"));
const GATE: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/gate.fatbin"));
const PREFILL_SM90: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/prefill_sm90.fatbin"));

/// The major version of the device's compute capability. (The context's own method would also take
/// the error that the context has recorded for the next operation, and so hide it.)
pub(super) fn major(device: &CudaDevice) -> Option<i32> {
    let attribute = sys::CUdevice_attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR;
    // SAFETY: a candle device holds the context of a device that exists.
    unsafe { result::device::get_attribute(device.cuda_stream().context().cu_device(), attribute) }
        .ok()
}

/// A [`Kernel`] as the driver has loaded it for one dtype.
pub(super) struct Function {
    pub(super) name: String,
    function: CudaFunction,
    /// Bytes of dynamic shared memory of a block.
    pub(super) shared: u32,
    /// The code was compiled for sm_90 or newer. It waits for the preceding kernel before it reads
    /// an activation or writes anything, so it may be launched before that kernel has ended.
    pub(super) waits: bool,
}

impl Function {
    pub(super) fn cu_function(&self) -> sys::CUfunction {
        self.function.cu_function()
    }
}

/// All functions that a device can run, and the properties of the device that [`super::plan`]
/// needs.
pub(crate) struct Functions {
    /// For each dtype, by [`Kernel::index`]. None where the dtype or the device has no such kernel.
    by_kernel: [(DType, Vec<Option<Function>>); 4],
    pub(super) gpu: Gpu,
}

impl Functions {
    /// The functions of `device`, which the first call for its context loads. Loading takes
    /// milliseconds and may synchronise, so the constructors of layers call this, not `forward`.
    pub(crate) fn of(device: &CudaDevice) -> Result<Arc<Self>> {
        static LOADED: Mutex<Option<HashMap<usize, Arc<Functions>>>> = Mutex::new(None);
        let stream = device.cuda_stream();
        let context = stream.context();
        let mut loaded = LOADED.lock().unwrap_or_else(PoisonError::into_inner);
        let loaded = loaded.get_or_insert_default();
        let key = context.cu_ctx().addr();
        if let Some(functions) = loaded.get(&key) {
            return Ok(functions.clone());
        }
        // The functions keep the context alive, so its address is not reused.
        let functions = Arc::new(Self::load(context)?);
        loaded.insert(key, functions.clone());
        Ok(functions)
    }

    fn load(context: &Arc<CudaContext>) -> Result<Self> {
        let gpu = describe(context)?;
        let (decode, gate) = (module(context, DECODE)?, module(context, GATE)?);
        let prefill = if gpu.hopper { Some(module(context, PREFILL_SM90)?) } else { None };
        let load = |dtype| -> Result<(DType, Vec<Option<Function>>)> {
            let load = |kernel: Kernel| {
                let module = match kernel {
                    _ if !kernel.has(dtype) => return Ok(None),
                    Kernel::Decode { .. } => Some(&decode),
                    Kernel::Fused(_) => prefill.as_ref(),
                    Kernel::GateForward | Kernel::GateBackward | Kernel::BiasRows => Some(&gate),
                };
                module.map(|module| function(module, kernel, dtype)).transpose()
            };
            Ok((dtype, Kernel::all().map(load).collect::<Result<_>>()?))
        };
        let by_kernel =
            [load(DType::F32)?, load(DType::BF16)?, load(DType::F16)?, load(DType::F64)?];
        Ok(Self { by_kernel, gpu })
    }

    pub(super) fn get(&self, kernel: Kernel, dtype: DType) -> Result<&Function> {
        let of_dtype = self.by_kernel.iter().find(|(found, _)| *found == dtype);
        let function = of_dtype.and_then(|(_, functions)| functions.get(kernel.index())?.as_ref());
        function.ok_or_else(|| {
            candle_core::Error::Msg(format!(
                "this device has no CUDA kernel {}",
                kernel.name(dtype)
            ))
        })
    }
}

fn describe(context: &Arc<CudaContext>) -> Result<Gpu> {
    use sys::CUdevice_attribute as Attribute;
    let sms = context.attribute(Attribute::CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT).w()? as usize;
    // 0 where the driver does not report it: only the choice of the prefill method needs it.
    let number = |attribute| context.attribute(attribute).map_or(0.0, f64::from);
    let bits = number(Attribute::CU_DEVICE_ATTRIBUTE_GLOBAL_MEMORY_BUS_WIDTH);
    let memory_clock = number(Attribute::CU_DEVICE_ATTRIBUTE_MEMORY_CLOCK_RATE);
    let clock = number(Attribute::CU_DEVICE_ATTRIBUTE_CLOCK_RATE).max(1.0);
    // DRAM transfers data on both edges of its clock.
    let bytes_per_clock = 2.0 * memory_clock * bits / 8.0 / (clock * sms as f64);
    let (major, minor) = context.compute_capability().w()?;
    if major < 8 {
        bail!(
            "CUDA kernels of candle-swiglu need compute capability 8.0 or newer, found {major}.{minor}"
        );
    }
    Ok(Gpu { sms, bytes_per_clock, hopper: (major, minor) == (9, 0) })
}

fn function(module: &Arc<CudaModule>, kernel: Kernel, dtype: DType) -> Result<Function> {
    use sys::CUfunction_attribute_enum as Attribute;
    let name = kernel.name(dtype);
    let load = || -> Result<(CudaFunction, bool)> {
        let function = module.load_function(&name).w()?;
        let waits = function.get_attribute(Attribute::CU_FUNC_ATTRIBUTE_PTX_VERSION).w()? >= 90;
        if kernel.shared() > 0 {
            let attribute = Attribute::CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES;
            function.set_attribute(attribute, kernel.shared() as i32).w()?;
        }
        Ok((function, waits))
    };
    let (function, waits) =
        load().map_err(|error| error.context(format!("cannot load the CUDA kernel {name}")))?;
    Ok(Function { name, function, shared: kernel.shared(), waits })
}

fn module(context: &Arc<CudaContext>, fatbin: &[u8]) -> Result<Arc<CudaModule>> {
    if fatbin.is_empty() {
        bail!(
            "this build of candle-swiglu has no CUDA kernels: it was built with CANDLE_SWIGLU_CUDA_SKIP_NVCC=1"
        );
    }
    let module = context.load_module(Ptx::from_binary(fatbin.to_vec()));
    module.map_err(|error| {
        candle_core::Error::Msg(format!(
            "cannot load the CUDA kernels built into candle-swiglu: {error}"
        ))
    })
}
