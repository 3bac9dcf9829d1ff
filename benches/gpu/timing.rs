//! Times that events on the stream measure, and the ceilings.
#![allow(unsafe_code, reason = "one launch of a kernel of its own")]

use std::fmt::Write as _;

use anyhow::{Context, Result};
use candle_core::cuda_backend::cudarc::driver::{CudaGraph, LaunchConfig, PushKernelArg, sys};
use candle_core::{DType, Device, Tensor};

use crate::systems::{Call, System};

const SAMPLES: usize = 15;
const SAMPLE_US: f64 = 2000.0;

pub(crate) struct Time {
    pub(crate) median: f64,
    pub(crate) least: f64,
    pub(crate) most: f64,
}

impl Time {
    fn of(mut samples: Vec<f64>) -> Self {
        samples.sort_by(f64::total_cmp);
        Self {
            median: samples[samples.len() / 2],
            least: samples[0],
            most: samples[samples.len() - 1],
        }
    }
}

/// A sequence of calls, ready to be timed.
enum Batch<'a> {
    /// The host launches each call.
    Calls(&'a Call<'a>),
    Graph(CudaGraph),
}

/// Device time in microseconds of the work that `work` enqueues.
fn elapsed(device: &Device, work: impl FnOnce() -> Result<()>) -> Result<f64> {
    let stream = device.as_cuda_device()?.cuda_stream();
    let flags = Some(sys::CUevent_flags::CU_EVENT_DEFAULT);
    let start = stream.record_event(flags)?;
    work()?;
    let end = stream.record_event(flags)?;
    Ok(f64::from(start.elapsed_ms(&end)?) * 1e3)
}

/// Microseconds per call of each system; the samples of the systems alternate.
pub(crate) fn in_turn(device: &Device, systems: &[System<'_>]) -> Result<Vec<Time>> {
    // candle uploads the strides of a view on each call. The cache keeps them at the address that a
    // replayed graph reads.
    let _cache = device.as_cuda_device()?.enable_cuda_graph_htod_cache();
    let mut batches = vec![];
    for system in systems {
        let call = &*system.call;
        for n in 0..3 {
            call(n)?;
        }
        device.synchronize()?;
        let first = elapsed(device, || (0..4).try_for_each(call))? / 4.0;
        let calls =
            ((SAMPLE_US / first).ceil() as usize).clamp(4, 200).next_multiple_of(system.sets);
        let batch = if system.name.ends_with("+graph") {
            Batch::Graph(capture(device, call, calls)?)
        } else {
            Batch::Calls(call)
        };
        batches.push((batch, calls, vec![]));
    }
    for _ in 0..SAMPLES {
        for (batch, calls, samples) in &mut batches {
            let us = elapsed(device, || match batch {
                Batch::Calls(call) => (0..*calls).try_for_each(call),
                Batch::Graph(graph) => Ok(graph.launch()?),
            })?;
            samples.push(us / *calls as f64);
        }
    }
    Ok(batches.into_iter().map(|(_, _, samples)| Time::of(samples)).collect())
}

fn capture(device: &Device, call: &Call<'_>, calls: usize) -> Result<CudaGraph> {
    let stream = device.as_cuda_device()?.cuda_stream();
    stream.begin_capture(sys::CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_THREAD_LOCAL)?;
    let done = (0..calls).try_for_each(call);
    let graph = stream.end_capture(sys::CUgraphInstantiate_flags(0));
    done?;
    let graph = graph?.context("nothing was captured")?;
    graph.upload()?;
    graph.launch()?; // maps the graph's memory
    device.synchronize()?;
    Ok(graph)
}

/// The peak rates of the device, measured in this run.
pub(crate) struct Ceilings {
    pub(crate) gb_per_s: f64,
    pub(crate) tflops: f64,
}

impl Ceilings {
    /// Measures both and appends a line for each to `csv`.
    pub(crate) fn measure(
        device: &Device,
        shapes: &[(&'static str, usize, usize)],
        csv: &mut String,
    ) -> Result<Self> {
        let data = Tensor::zeros(4usize << 30, DType::U8, device)?;
        let mut line = |system: &str, shape: &str, time: &Time, gb_per_s: f64, tflops: f64| {
            let (us, least, most) = (time.median, time.least, time.most);
            let _ = writeln!(
                csv,
                "{system},,{shape},,,,{us:.2},{least:.2},{most:.2},{gb_per_s:.0},{tflops:.1},,,,"
            );
        };
        let whole = reads(device, &data, 4 << 30)?;
        let gb_per_s = (4u64 << 30) as f64 / whole.least * 1e-3;
        line("read", "4gib", &whole, gb_per_s, 0.0);
        for &(shape, h, i) in shapes {
            let bytes = 6 * h * i;
            let piece = reads(device, &data, bytes)?;
            line("read", shape, &piece, bytes as f64 / piece.median * 1e-3, 0.0);
        }
        drop(data);
        let a = Tensor::randn(0f32, 1.0, (8192, 8192), device)?.to_dtype(DType::BF16)?;
        a.matmul(&a.t()?)?;
        let samples = (0..SAMPLES)
            .map(|_| elapsed(device, || Ok(a.matmul(&a.t()?).map(drop)?)))
            .collect::<Result<Vec<_>>>()?;
        let product = Time::of(samples);
        let tflops = 2.0 * 8192f64.powi(3) / product.median * 1e-6;
        line("cublas", "8192", &product, 0.0, tflops);
        Ok(Self { gb_per_s, tflops })
    }
}

/// Times reads of `bytes` bytes each, which advance through `data`.
fn reads(device: &Device, data: &Tensor, bytes: usize) -> Result<Time> {
    let device = device.as_cuda_device()?;
    let stream = device.cuda_stream();
    let read = device.get_or_load_custom_func("read_all", "gpu-bench", include_str!("read.ptx"))?;
    let multiprocessors = stream
        .context()
        .attribute(sys::CUdevice_attribute::CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT)?
        as u32;
    let config = LaunchConfig {
        grid_dim: (4 * multiprocessors, 1, 1),
        block_dim: (512, 1, 1),
        shared_mem_bytes: 0,
    };
    let sink = device.alloc_zeros::<u32>(1)?;
    let (storage, _) = data.storage_and_layout();
    let candle_core::Storage::Cuda(storage) = &*storage else {
        anyhow::bail!("not on a CUDA device")
    };
    let slice = storage.as_cuda_slice::<u8>()?;
    let pieces = slice.len() / bytes;
    let vectors = (bytes / 16) as u64;
    let once = |n: usize| -> Result<()> {
        let piece = slice.slice(n % pieces * bytes..(n % pieces + 1) * bytes);
        let mut builder = read.builder();
        builder.arg(&piece).arg(&vectors).arg(&sink);
        // SAFETY: read_all takes the address of 16-byte vectors, their number and the address of a
        // u32.
        unsafe { builder.launch(config)? };
        Ok(())
    };
    let calls = (64 << 30 >> 3) / bytes + 1; // about 8 GB per sample
    once(0)?;
    let cuda = Device::Cuda(device.clone());
    let samples =
        (0..SAMPLES).map(|_| Ok(elapsed(&cuda, || (0..calls).try_for_each(once))? / calls as f64));
    Ok(Time::of(samples.collect::<Result<Vec<_>>>()?))
}
