//! Heap use. Loading a checkpoint needs the weights themselves and the largest tensor, in any
//! dtypes. Running a block needs its output and bounded scratch.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, missing_docs)]

use std::alloc::{GlobalAlloc, Layout, System};
use std::collections::HashMap;
use std::sync::atomic::{AtomicUsize, Ordering::SeqCst};

use candle_core::{DType, Device, Module, Tensor, Var};
use candle_swiglu::{Checkpoint, FfnConfig, FfnLora, Lora, SwiGluFfn};

static NOW: AtomicUsize = AtomicUsize::new(0);
static PEAK: AtomicUsize = AtomicUsize::new(0);
/// Bytes allocated since the start.
static TOTAL: AtomicUsize = AtomicUsize::new(0);

/// The system's allocator with a count of the bytes in use. The trait's own `realloc` calls these
/// two functions.
struct Counting;

#[allow(unsafe_code)]
// SAFETY: every call is forwarded to the system's allocator unchanged.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        let now = NOW.fetch_add(layout.size(), SeqCst) + layout.size();
        PEAK.fetch_max(now, SeqCst);
        TOTAL.fetch_add(layout.size(), SeqCst);
        // SAFETY: the caller guarantees what `System` requires.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, pointer: *mut u8, layout: Layout) {
        NOW.fetch_sub(layout.size(), SeqCst);
        // SAFETY: the pointer came from `System.alloc` with this layout.
        unsafe { System.dealloc(pointer, layout) }
    }
}

#[global_allocator]
static COUNTING: Counting = Counting;

const H: usize = 512;
const I: usize = 1536;
const LAYERS: usize = 3;
const MIB: usize = 1 << 20;
/// Bound of the size of names, shapes, the config and the header, without tensor data.
const SMALL: usize = 64 << 10;

fn write(dir: &std::path::Path, dtype: DType, fused: bool) {
    let mut tensors = HashMap::new();
    let mut add = |layer, name, shape: [usize; 2]| {
        let tensor = Tensor::full(0.5f32, &shape, &Device::Cpu).unwrap().to_dtype(dtype).unwrap();
        tensors.insert(format!("layers.{layer}.mlp.{name}.weight"), tensor.contiguous().unwrap());
    };
    for layer in 0..LAYERS {
        if fused {
            add(layer, "gate_up_proj", [2 * I, H]);
        } else {
            add(layer, "gate_proj", [I, H]);
            add(layer, "up_proj", [I, H]);
        }
        add(layer, "down_proj", [H, I]);
    }
    candle_core::safetensors::save(&tensors, dir.join("model.safetensors")).unwrap();
    let config = serde_json::json!({"hidden_size": H, "intermediate_size": I});
    std::fs::write(dir.join("config.json"), config.to_string()).unwrap();
}

fn load(checkpoint: &Checkpoint, dtype: DType) -> Vec<SwiGluFfn> {
    let cfg = FfnConfig::from_json(checkpoint.config()).unwrap();
    let vb = checkpoint.var_builder(dtype, &Device::Cpu).pp("layers");
    (0..LAYERS).map(|layer| SwiGluFfn::new(&cfg, vb.pp(layer).pp("mlp")).unwrap()).collect()
}

/// A single test, because the counters belong to the process.
#[test]
fn the_heap() {
    forward();
    training();
    adapters();
    loading();
}

/// Scratch stays within the documented bound and is kept. Later calls allocate only their output.
fn forward() {
    const TENSOR: usize = 2 << 10; // the record of a tensor, its shape and strides
    for dtype in [DType::F32, DType::BF16, DType::F16] {
        let weight = |dims: [usize; 2]| {
            Tensor::full(0.01f32, &dims, &Device::Cpu).unwrap().to_dtype(dtype).unwrap()
        };
        let ffn = SwiGluFfn::from_tensors(weight([I, H]), weight([I, H]), weight([H, I])).unwrap();
        let threads = candle_core::utils::get_num_threads();
        let row_bytes = H * dtype.size_in_bytes();
        for rows in [1usize, 7, 100, 512, 513, 3000] {
            let x = weight([rows, H]);
            let before = NOW.load(SeqCst);
            PEAK.store(before, SeqCst);
            drop(ffn.forward(&x).unwrap());
            let peak = PEAK.load(SeqCst) - before;
            let chunk = rows.min(512);
            // `amx` pads rows to whole tiles and has the sums of 8 panels of 32 columns.
            let (padding, sums) = if ffn.kernel() == "amx" { (15, 1024) } else { (0, 256) };
            let scratch_rows = chunk + padding;
            let scratch =
                scratch_rows * (H + I + 256) * 4 + threads * (scratch_rows * sums + (256 << 10));
            let output = rows * row_bytes;
            assert!(
                peak <= output + scratch + TENSOR,
                "{dtype:?} {rows} rows: {peak} B, output {output}, bound {scratch}"
            );
        }
        let before = NOW.load(SeqCst);
        for rows in [1usize, 512, 3, 1500, 1].repeat(5) {
            let x = weight([rows, H]);
            let total = TOTAL.load(SeqCst);
            let y = ffn.forward(&x).unwrap();
            let allocated = TOTAL.load(SeqCst) - total;
            assert!(
                allocated <= rows * row_bytes + TENSOR,
                "{dtype:?} {rows} rows: {allocated} B allocated"
            );
            drop(y);
        }
        assert!(NOW.load(SeqCst) <= before, "{dtype:?}: repeated calls must not keep more memory");
    }
}

/// Forward and backward of a block of variables stay within the documented bounds.
fn training() {
    // All cases take minutes on the slower kernels.
    let is_forced = std::env::var_os("CANDLE_SWIGLU_KERNEL").is_some();
    let (dtypes, rows): (&[DType], &[usize]) = match is_forced {
        true => (&[DType::BF16], &[100]),
        false => (&[DType::F32, DType::BF16, DType::F16, DType::F64], &[100, 1100]),
    };
    for (dtype, rows, recompute) in dtypes
        .iter()
        .flat_map(|&dtype| rows.iter().map(move |&rows| (dtype, rows)))
        // candle's products in f64 have no chunks, and take long.
        .filter(|&(dtype, rows)| dtype != DType::F64 || rows == 100)
        .flat_map(|(dtype, rows)| [false, true].map(|recompute| (dtype, rows, recompute)))
    {
        let size = dtype.size_in_bytes();
        for frozen in [false, true] {
            let var = |dims: [usize; 2]| {
                let values = Tensor::full(0.01f32, &dims, &Device::Cpu).unwrap();
                Var::from_tensor(&values.to_dtype(dtype).unwrap()).unwrap()
            };
            let vars = [var([I, H]), var([I, H]), var([H, I])];
            // With frozen matrices of gate and up, only down's gradient is computed, and dx.
            let take = |i: usize| match frozen && i < 2 {
                true => vars[i].as_detached_tensor(),
                false => vars[i].as_tensor().clone(),
            };
            let ffn = SwiGluFfn::from_tensors(take(0), take(1), take(2)).unwrap();
            let (ffn, x) = (ffn.with_recompute(recompute), var([rows, H]));
            let case = format!("{dtype:?}, {rows} rows, recompute {recompute}, frozen {frozen}");
            let dy = x.ones_like().unwrap();

            let before = NOW.load(SeqCst);
            let y = ffn.forward(&x).unwrap();
            let kept = NOW.load(SeqCst) - before;
            let pair = if recompute { 0 } else { 2 * rows * I * size };
            // In f64 it is candle's, which packs blocks of the operands.
            let scratch = match dtype {
                DType::F64 => 4 << 20,
                _ => (rows.min(512) + 15) * (H + I + 256) * 4 + (4 << 20),
            };
            let bound = rows * H * size + pair + SMALL;
            assert!(kept <= bound + scratch, "{case}: {kept} B are kept, bound {bound}");

            // candle differentiates <y, dy> into a product and a sum of y's size, and adds each
            // gradient to zeros.
            let loss = (&y * &dy).unwrap().sum_all().unwrap();
            let before = NOW.load(SeqCst);
            PEAK.store(before, SeqCst);
            let store = loss.backward().unwrap();
            let peak = PEAK.load(SeqCst) - before;
            let weights = if frozen { 1 } else { 3 };
            let gradients = (weights * H * I + rows * H) * size;
            let threads = candle_core::utils::get_num_threads();
            let chunk = rows.min(512);
            // In f64: gate and up if they are computed again, dh, dgate and dup.
            let scratch = match dtype {
                DType::F64 => (if recompute { 5 } else { 3 }) * rows * I * size + (4 << 20),
                _ => {
                    (chunk + 128) * (4 * H + 5 * I + 768) * 4
                        + threads * ((chunk + 32) * 1792 + (1 << 20))
                }
            };
            let sums = if dtype != DType::F64 && rows > 512 {
                weights * 4 * (I + 512) * (H + 64)
            } else {
                0
            };
            let candle = gradients + H * I * size + 6 * rows * H * size;
            let bound = gradients + scratch + sums + candle + SMALL;
            assert!(peak <= bound, "{case}: {peak} B at the peak of backward, bound {bound}");
            assert_eq!(store.get(&vars[0]).is_some(), !frozen, "{case}");
        }
    }
}

/// Forward and backward of a packed block with low-rank pairs stay within the documented bounds.
fn adapters() {
    const R: usize = 8;
    let size = DType::F32.size_in_bytes();
    let ones = |dims: [usize; 2]| Tensor::full(0.01f32, &dims, &Device::Cpu).unwrap();
    let var = |dims| Var::from_tensor(&ones(dims)).unwrap();
    for (rows, dropout, recompute) in [(100, 0.0, false), (100, 0.5, true), (600, 0.5, false)] {
        let base = SwiGluFfn::from_tensors(ones([I, H]), ones([I, H]), ones([H, I])).unwrap();
        let pair = |out, k| {
            let (a, b) = (var([R, k]), var([out, R]));
            let lora = Lora::new(a.as_tensor().clone(), b.as_tensor().clone(), 0.5, dropout);
            (Some(lora.unwrap()), [a, b])
        };
        let ((gate_proj, gate), (up_proj, up), (down_proj, down)) =
            (pair(I, H), pair(I, H), pair(H, I));
        let mut ffn = base.with_recompute(recompute);
        ffn.add_adapter("a", FfnLora { gate_proj, up_proj, down_proj }).unwrap();
        ffn.set_adapter("a").unwrap();
        ffn.set_training(true).unwrap();
        let x = var([rows, H]);
        let dy = x.ones_like().unwrap();
        let case = format!("{rows} rows, dropout {dropout}, recompute {recompute}");

        let (threads, chunk) = (candle_core::utils::get_num_threads(), rows.min(512));
        // A and B of gate and up together, and of down, in the form that the products read.
        let pairs = 2 * R * H + R * I + 2 * I * 2 * R + H * R;
        let scratch = (chunk + 128) * (5 * H + 5 * I + 9 * R + 1024) * 4
            + threads * ((chunk + 32) * 1792 + MIB);
        drop(ffn.forward(&x).unwrap()); // keeps its scratch for the next call
        let before = NOW.load(SeqCst);
        let y = ffn.forward(&x).unwrap();
        let kept = NOW.load(SeqCst) - before;
        let gate_up = if recompute { 0 } else { 2 * rows * I * size };
        let u = (rows + 15) * (3 * R + 64) * 4;
        let bound = rows * H * size + gate_up + u + pairs * size + SMALL;
        assert!(kept <= bound, "{case}: {kept} B are kept, bound {bound}");

        let loss = (&y * &dy).unwrap().sum_all().unwrap();
        let before = NOW.load(SeqCst);
        PEAK.store(before, SeqCst);
        let store = candle_swiglu::backward(&loss).unwrap();
        let peak = PEAK.load(SeqCst) - before;
        let of_chunks = |rows: usize, columns: usize| 4 * (rows + 512) * (columns + 64);
        let sums = if rows > 512 {
            of_chunks(2 * R, H) + of_chunks(R, I) + 2 * of_chunks(I, 2 * R) + of_chunks(H, R)
        } else {
            0
        };
        // The f32 gradients of the pairs and two copies, dx, and candle's sums of y's size.
        let bound = 3 * pairs * 4 + scratch + sums + 7 * rows * H * size + SMALL;
        assert!(peak <= bound, "{case}: {peak} B at the peak of backward, bound {bound}");
        let vars = gate.iter().chain(&up).chain(&down);
        vars.for_each(|var| assert!(store.get(var).is_some(), "{case}"));
    }
}

fn loading() {
    for (in_file, in_memory, fused) in [
        (DType::BF16, DType::BF16, false),
        (DType::BF16, DType::F32, false),
        (DType::F32, DType::BF16, false),
        (DType::F32, DType::F32, true),
        (DType::F64, DType::F16, true),
    ] {
        let case = format!("{in_file:?} as {in_memory:?}, fused: {fused}");
        let dir = tempfile::tempdir().unwrap();
        write(dir.path(), in_file, fused);
        drop(load(&Checkpoint::open(dir.path()).unwrap(), in_memory)); // allocates what a process allocates once

        let before = NOW.load(SeqCst);
        PEAK.store(before, SeqCst);
        let checkpoint = Checkpoint::open(dir.path()).unwrap();
        assert!(PEAK.load(SeqCst) - before < SMALL, "{case}: opening must not read tensor data");
        let blocks = load(&checkpoint, in_memory);
        let (peak, after) = (PEAK.load(SeqCst) - before, NOW.load(SeqCst) - before);

        let element = in_memory.size_in_bytes();
        let weights = LAYERS * 3 * H * I * element;
        let largest = if fused { 2 } else { 1 } * H * I * element;
        assert!(largest > MIB, "{case}: a chunk must be smaller than a tensor");
        assert!(
            (weights..weights + SMALL).contains(&after),
            "{case}: {after} B remain for {weights} B of weights"
        );
        assert!(
            peak <= weights + largest + MIB + SMALL,
            "{case}: {peak} B at the peak for {weights} B of weights"
        );
        drop((blocks, checkpoint));
        assert!(NOW.load(SeqCst) < before + SMALL, "{case}: all memory must be freed");
    }
}
