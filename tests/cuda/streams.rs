//! Order of execution: no waiting for the device, capture in a CUDA graph, several streams, several
//! threads.
#![allow(unsafe_code, reason = "candle's switch of event tracking")]

use anyhow::{Context, Result, ensure};
use candle_core::cuda_backend::CudaDevice;
use candle_core::cuda_backend::cudarc::driver::{CudaGraph, sys};
use candle_core::{DType, Device, Module, Tensor};
use candle_swiglu::{CudaPrefill, FfnConfig, Linear, SwiGluFfn, silu_mul};

use super::common::{Numbers, bits, weights};
use super::{KERNEL_DTYPES, build, cuda, cuda_with_stream, with_prefill};

fn block(h: usize, i: usize, dtype: DType, device: &Device) -> Result<SwiGluFfn> {
    let cfg = FfnConfig::new(h, i).with_bias(true);
    build(&cfg, &weights(&cfg, &mut Numbers::new(31), dtype)?, device)
}

fn random(dims: &[usize], seed: u64, dtype: DType, device: &Device) -> Result<Tensor> {
    Ok(Numbers::new(seed).tensor(dims, 2.0, dtype)?.to_device(device)?)
}

// ---------------------------------------------------------------- 1. the host does not wait

#[test]
fn forward_does_not_wait_for_the_device() -> Result<()> {
    let Some(device) = cuda()? else { return Ok(()) };
    let stream = device.as_cuda_device()?.cuda_stream();
    // The driver model runs work only when the host waits for it, so any work is slow there.
    let side = if super::on_model() { 64 } else { 8192 };
    let slow = Tensor::ones((side, side), DType::F32, &device)?;
    for (dtype, m) in
        KERNEL_DTYPES.into_iter().flat_map(|dtype| [1, 32, 33, 300].map(|m| (dtype, m)))
    {
        let (ffn, x) = (block(136, 200, dtype, &device)?, random(&[m, 136], 32, dtype, &device)?);
        ffn.forward(&x)?; // cuBLAS loads its kernels at the first product
        slow.matmul(&slow)?;
        device.synchronize()?;
        for _ in 0..4 {
            slow.matmul(&slow)?; // 1.1 TFLOP each: 17 ms at 67 TFLOP/s
        }
        let before = stream.record_event(None)?;
        let y = ffn.forward(&x)?;
        ensure!(
            !before.try_is_complete()?,
            "{dtype:?} M = {m}: forward returned after the work that precedes it"
        );
        drop(y);
    }
    Ok(())
}

// ---------------------------------------------------------------- 2. CUDA graphs

/// The work that `work` queues on the device's stream, as a graph.
fn capture(device: &CudaDevice, work: impl FnOnce() -> Result<()>) -> Result<CudaGraph> {
    let stream = device.cuda_stream();
    stream.begin_capture(sys::CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_THREAD_LOCAL)?;
    let done = work();
    let graph = stream.end_capture(sys::CUgraphInstantiate_flags(0));
    done?;
    graph?.context("nothing was captured")
}

/// Replays of a captured call read the values that x has at the time of the replay. They give the
/// bits of calls that are not captured.
fn replays(
    device: &Device,
    layer: &dyn Module,
    shape: &[usize],
    width: usize,
    dtype: DType,
    what: &str,
) -> Result<()> {
    let inputs =
        (0..3).map(|seed| random(shape, 40 + seed, dtype, device)).collect::<Result<Vec<_>>>()?;
    let expected = inputs.iter().map(|x| bits(&layer.forward(x)?)).collect::<Result<Vec<_>>>()?;
    let x = random(shape, 50, dtype, device)?;
    let out = Tensor::zeros((shape[0], width), dtype, device)?;
    out.slice_set(&layer.forward(&x)?, 0, 0)?; // loads candle's copy kernel
    device.synchronize()?;
    let graph =
        capture(device.as_cuda_device()?, || Ok(out.slice_set(&layer.forward(&x)?, 0, 0)?))?;
    for _ in 0..2 {
        for (input, expected) in inputs.iter().zip(&expected) {
            x.slice_set(input, 0, 0)?;
            graph.launch()?;
            ensure!(bits(&out)? == *expected, "{what}: a replay differs");
        }
    }
    Ok(())
}

fn capture_and_replay(device: &Device) -> Result<()> {
    for (dtype, m) in
        KERNEL_DTYPES.into_iter().flat_map(|dtype| [1, 9, 32, 40, 129, 300].map(|m| (dtype, m)))
    {
        let (h, i) = (136, 200);
        let ffn = block(h, i, dtype, device)?;
        for way in [CudaPrefill::Cublas, CudaPrefill::Fused] {
            let what = format!("{dtype:?} M = {m} {way:?}");
            with_prefill(way, || replays(device, &ffn, &[m, h], h, dtype, &what))?;
        }
        let linear = Linear::new(
            random(&[i, h], 33, dtype, device)?,
            Some(random(&[i], 34, dtype, device)?),
        )?;
        replays(device, &linear, &[m, h], i, dtype, &format!("{dtype:?} M = {m}, one projection"))?;
        let gate = candle_nn::Func::new(|x: &Tensor| silu_mul(x, x).map_err(Into::into));
        replays(device, &gate, &[m, h], h, dtype, &format!("{dtype:?} M = {m}, the gate"))?;
    }
    Ok(())
}

#[test]
fn a_graph_on_the_stream_of_the_thread() -> Result<()> {
    let Some(device) = cuda()? else { return Ok(()) };
    capture_and_replay(&device)
}

#[test]
fn a_graph_on_a_stream_of_its_own() -> Result<()> {
    let Some(device) = cuda_with_stream()? else { return Ok(()) };
    // SAFETY: this device's tensors are used only on its one stream.
    unsafe { device.as_cuda_device()?.disable_event_tracking() };
    capture_and_replay(&device)
}

// ---------------------------------------------------------------- 3. streams, threads, again

/// Two candle devices on one GPU, each with a stream, are used alternately. Each gives the bits
/// that it gives alone, with the other's weights too.
#[test]
fn two_streams() -> Result<()> {
    let (Some(a), Some(b)) = (cuda_with_stream()?, cuda_with_stream()?) else { return Ok(()) };
    for (dtype, m) in KERNEL_DTYPES.into_iter().flat_map(|dtype| [1, 16, 300].map(|m| (dtype, m))) {
        let (of_a, of_b) = (block(136, 200, dtype, &a)?, block(136, 200, dtype, &b)?);
        let (xa, xb) = (random(&[m, 136], 35, dtype, &a)?, random(&[m, 136], 35, dtype, &b)?);
        let alone = bits(&of_a.forward(&xa)?)?;
        let (mut on_a, mut on_b) = (vec![], vec![]);
        for _ in 0..20 {
            on_a.push(of_a.forward(&xa)?);
            on_b.push(of_b.forward(&xb)?);
        }
        for y in on_a.iter().chain(&on_b) {
            ensure!(bits(y)? == alone, "{dtype:?} M = {m}: a stream disturbed the other");
        }
        ensure!(
            bits(&of_a.forward(&xb)?)? == alone,
            "{dtype:?} M = {m}: x and weights of different streams"
        );
    }
    Ok(())
}

/// Repeated calls give the same bits: no sum depends on the order in which blocks finish.
#[test]
fn results_do_not_vary() -> Result<()> {
    let Some(device) = cuda()? else { return Ok(()) };
    for (dtype, m) in
        KERNEL_DTYPES.into_iter().flat_map(|dtype| [1, 7, 8, 32, 300].map(|m| (dtype, m)))
    {
        let (ffn, x) = (block(512, 1376, dtype, &device)?, random(&[m, 512], 36, dtype, &device)?);
        let first = bits(&ffn.forward(&x)?)?;
        for _ in 0..if super::on_model() { 2 } else { 20 } {
            ensure!(bits(&ffn.forward(&x)?)? == first, "{dtype:?} M = {m}");
        }
        // With more rows of 16 bits, another kernel may be chosen.
        if m <= if dtype == DType::F32 { 32 } else { 8 } {
            let alone = bits(&ffn.forward(&x.narrow(0, m - 1, 1)?)?)?;
            ensure!(first.ends_with(&alone), "{dtype:?}: a row depends on its {m} neighbours");
        }
    }
    Ok(())
}

/// Threads that share a layer (each has its own stream, as in candle's default device), and threads
/// with a device each.
#[test]
fn concurrent_threads() -> Result<()> {
    let Some(device) = cuda()? else { return Ok(()) };
    for dtype in KERNEL_DTYPES {
        let (ffn, x) = (block(136, 200, dtype, &device)?, random(&[5, 136], 37, dtype, &device)?);
        let expected = bits(&ffn.forward(&x)?)?; // and with it, all that was written is there
        let expected_of_many = bits(&ffn.forward(&random(&[300, 136], 38, dtype, &device)?)?)?;
        std::thread::scope(|scope| {
            let shared = |ffn: SwiGluFfn, x: Tensor| {
                (0..20).map(|_| bits(&ffn.forward(&x)?)).collect::<Result<Vec<_>>>()
            };
            let own = || -> Result<Vec<Vec<u64>>> {
                let device = Device::new_cuda(0)?;
                let (ffn, x) =
                    (block(136, 200, dtype, &device)?, random(&[300, 136], 38, dtype, &device)?);
                (0..5).map(|_| bits(&ffn.forward(&x)?)).collect()
            };
            let sharing: Vec<_> = (0..4)
                .map(|_| (ffn.clone(), x.clone()))
                .map(|(ffn, x)| scope.spawn(move || shared(ffn, x)))
                .collect();
            let owning: Vec<_> = (0..3).map(|_| scope.spawn(own)).collect();
            for (workers, expected) in [(sharing, &expected), (owning, &expected_of_many)] {
                for worker in workers {
                    let results = worker.join().ok().context("a worker panicked")??;
                    ensure!(results.iter().all(|y| y == expected), "{dtype:?}");
                }
            }
            Ok(())
        })?;
    }
    Ok(())
}
