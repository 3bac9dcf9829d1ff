//! The kernels of build.rs, loaded once for each CUDA context.

use std::collections::HashMap;
use std::fmt;
use std::sync::{Arc, Mutex, PoisonError};

use candle_core::cuda_backend::cudarc::driver::{CudaContext, CudaFunction, CudaModule, result, sys};
use candle_core::cuda_backend::cudarc::nvrtc::Ptx;
use candle_core::cuda_backend::{CudaDevice, WrapErr};
use candle_core::{Result, bail};

const DECODE: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/decode.fatbin"));
const GATE: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/gate.fatbin"));
const PREFILL_SM90: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/prefill_sm90.fatbin"));

/// A kernel of prefill_sm90.cu: a cluster of so many blocks, each with tiles of 128 rows by `width` features.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Tile {
    pub(super) cluster: usize,
    pub(super) width: usize,
    pub(super) variant: &'static str,
    /// Bytes of dynamic shared memory, of 232448 that a block can have.
    pub(super) shared: u32,
}

const fn tile(cluster: usize, width: usize, variant: &'static str, shared: u32) -> Tile {
    Tile { cluster, width, variant, shared }
}

/// All of them.
pub(super) const TILES: [Tile; 8] = [
    tile(1, 64, "_c1_w64", 214_272),
    tile(1, 80, "_c1_w80", 206_080),
    tile(1, 96, "_c1_w96", 230_656),
    tile(1, 112, "_c1_w112", 210_176),
    tile(1, 128, "_c1_w128", 230_656),
    tile(2, 96, "_c2_w96", 230_656),
    tile(2, 112, "_c2_w112", 210_176),
    tile(2, 128, "_c2_w128", 230_656),
];

/// A kernel's name in its parts: `gate_up_mma_bf16_n1_w8`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) struct Name {
    /// gate_up, linear, gate_forward, ...
    pub(super) op: &'static str,
    /// _mma, _sm90, ... or nothing
    pub(super) family: &'static str,
    pub(super) dtype: &'static str,
    /// _n1, _n1_w8, _c2_w128, ... or nothing
    pub(super) variant: &'static str,
}

impl fmt::Display for Name {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}{}_{}{}", self.op, self.family, self.dtype, self.variant)
    }
}

/// Variants of decode.cu's kernels for up to 8, 16 and 32 rows: of `fma`; of `mma` by its warps, 8 or 16.
pub(super) const ROWS: [&str; 3] = ["_n1", "_n2", "_n4"];
pub(super) const ROWS_OF_8_WARPS: [&str; 3] = ["_n1_w8", "_n2_w8", "_n4_w8"];
pub(super) const ROWS_OF_16_WARPS: [&str; 3] = ["_n1_w16", "_n2_w16", "_n4_w16"];

fn decode_names() -> Vec<Name> {
    let mut names = vec![];
    for op in ["gate_up", "linear"] {
        let mut add = |family, dtype, variant| names.push(Name { op, family, dtype, variant });
        ROWS.iter().for_each(|variant| add("_fma", "f32", variant));
        for variant in ROWS_OF_8_WARPS.into_iter().chain(ROWS_OF_16_WARPS) {
            add("_mma", "bf16", variant);
            add("_mma", "f16", variant);
        }
        add("_fma", "bf16", "");
        add("_fma", "f16", "");
    }
    names
}

fn gate_names() -> Vec<Name> {
    let all = ["gate_forward", "gate_backward", "bias_rows"].into_iter();
    let all = all.flat_map(|op| ["f32", "bf16", "f16", "f64"].map(|dtype| Name { op, family: "", dtype, variant: "" }));
    all.filter(|name| (name.op, name.dtype) != ("bias_rows", "f64")).collect()
}

fn prefill_names() -> Vec<Name> {
    let all = TILES.into_iter().map(|tile| tile.variant);
    all.flat_map(|variant| ["bf16", "f16"].map(|dtype| Name { op: "gate_up", family: "_sm90", dtype, variant })).collect()
}

/// The first number of the device's compute capability. (The context's own method would also take, and so hide, an error that the context
/// has recorded for the next operation.)
pub(super) fn major(device: &CudaDevice) -> Option<i32> {
    let attribute = sys::CUdevice_attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR;
    // SAFETY: a candle device holds the context of a device that exists.
    unsafe { result::device::get_attribute(device.cuda_stream().context().cu_device(), attribute) }.ok()
}

/// A function of a module.
pub(super) struct Kernel {
    pub(super) name: Name,
    function: CudaFunction,
    /// Bytes of dynamic shared memory of a block.
    pub(super) shared: u32,
    /// It was compiled for sm_90 or newer, and so waits for what precedes it before it reads an activation or writes: it may be
    /// launched before that has ended.
    pub(super) waits: bool,
}

impl Kernel {
    pub(super) fn cu_function(&self) -> sys::CUfunction {
        self.function.cu_function()
    }
}

/// All kernels that a device can run.
pub(super) struct Kernels {
    kernels: HashMap<Name, Kernel>,
    /// Streaming multiprocessors.
    pub(super) sms: usize,
    /// Bytes that the device's memory could bring each of them in one of its clocks.
    pub(super) bytes_per_clock: f64,
    /// Compute capability 9.0: the kernels of prefill_sm90.cu are there.
    pub(super) hopper: bool,
}

impl Kernels {
    /// Loads them at the first call for the context of `device`. That takes milliseconds and may synchronise, so the constructors of
    /// layers call it, not `forward`.
    pub(super) fn of(device: &CudaDevice) -> Result<Arc<Self>> {
        static LOADED: Mutex<Option<HashMap<usize, Arc<Kernels>>>> = Mutex::new(None);
        let stream = device.cuda_stream();
        let context = stream.context();
        let mut loaded = LOADED.lock().unwrap_or_else(PoisonError::into_inner);
        let loaded = loaded.get_or_insert_default();
        let key = context.cu_ctx().addr();
        if let Some(kernels) = loaded.get(&key) {
            return Ok(kernels.clone());
        }
        // The functions keep the context alive, so its address is not used again.
        let kernels = Arc::new(Self::load(context)?);
        loaded.insert(key, kernels.clone());
        Ok(kernels)
    }

    fn load(context: &Arc<CudaContext>) -> Result<Self> {
        use sys::CUdevice_attribute as Attribute;
        let sms = context.attribute(Attribute::CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT).w()? as usize;
        // 0 where a driver does not tell; only a choice between two ways depends on it.
        let number = |attribute| context.attribute(attribute).map_or(0.0, f64::from);
        let bits = number(Attribute::CU_DEVICE_ATTRIBUTE_GLOBAL_MEMORY_BUS_WIDTH);
        let memory_clock = number(Attribute::CU_DEVICE_ATTRIBUTE_MEMORY_CLOCK_RATE);
        let clock = number(Attribute::CU_DEVICE_ATTRIBUTE_CLOCK_RATE).max(1.0);
        // Twice a clock of the memory.
        let bytes_per_clock = 2.0 * memory_clock * bits / 8.0 / (clock * sms as f64);
        let (major, minor) = context.compute_capability().w()?;
        if major < 8 {
            bail!("CUDA kernels of candle-swiglu need compute capability 8.0 or newer, found {major}.{minor}");
        }
        let hopper = (major, minor) == (9, 0);
        let mut all = Self { kernels: HashMap::new(), sms, bytes_per_clock, hopper };
        all.add(&module(context, DECODE)?, decode_names())?;
        all.add(&module(context, GATE)?, gate_names())?;
        if all.hopper {
            all.add(&module(context, PREFILL_SM90)?, prefill_names())?;
        }
        Ok(all)
    }

    fn add(&mut self, module: &Arc<CudaModule>, names: Vec<Name>) -> Result<()> {
        use sys::CUfunction_attribute_enum as Attribute;
        for name in names {
            let function = module.load_function(&name.to_string()).w()?;
            let waits = function.get_attribute(Attribute::CU_FUNC_ATTRIBUTE_PTX_VERSION).w()? >= 90;
            let shared = TILES.iter().find(|tile| tile.variant == name.variant).map_or(0, |tile| tile.shared);
            if shared > 0 {
                let attribute = Attribute::CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES;
                function.set_attribute(attribute, shared as i32).w()?;
            }
            self.kernels.insert(name, Kernel { name, function, shared, waits });
        }
        Ok(())
    }

    pub(super) fn get(&self, name: Name) -> Result<&Kernel> {
        self.kernels.get(&name).ok_or_else(|| candle_core::Error::Msg(format!("no CUDA kernel {name}")))
    }
}

fn module(context: &Arc<CudaContext>, fatbin: &[u8]) -> Result<Arc<CudaModule>> {
    if fatbin.is_empty() {
        bail!("this build of candle-swiglu has no CUDA kernels: it was built with CANDLE_SWIGLU_CUDA_SKIP_NVCC=1");
    }
    let module = context.load_module(Ptx::from_binary(fatbin.to_vec()));
    module.map_err(|error| candle_core::Error::Msg(format!("cannot load the CUDA kernels built into candle-swiglu: {error}")))
}
