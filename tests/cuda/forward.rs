//! The forward pass: every activation and modifier, every number of rows, layouts, and sizes at the
//! edges of the tiles.

use anyhow::Result;
use candle_core::{DType, Device, IndexOp, Module, Tensor, Var};
use candle_swiglu::{CudaPrefill, FfnConfig, GateUp, GluActivation, Linear, SwiGluFfn, Weights};

use super::common::{
    ACTIVATIONS, Block, Numbers, bits, check_within, composed, integers, rms_error, values, weights,
};
use super::{KERNEL_DTYPES, build, cuda, on_model, run, sum_roundoff, with_prefill};

/// (H, I): odd sizes, multiples of 8 (for tensor cores), and sizes at the edges of the tiles of 64
/// (k), 128 (columns) and 16 (outputs).
const SIZES: [(usize, usize); 4] = [(33, 45), (72, 136), (128, 128), (136, 200)];

/// Fails unless y is within the bound of sums in f32 (`sum_roundoff`) and one rounding each of
/// gate, up, h and y.
fn check(what: &str, y: &Tensor, block: &Block, x: &Tensor) -> Result<()> {
    let near = block.forward_rounded(x, sum_roundoff(x.dtype()), Some(x.dtype()))?;
    let worst = check_within(what, y, &near.values(), &near.errors())?;
    eprintln!("{worst:.4} of the bound: {what}");
    Ok(())
}

#[test]
fn the_family_follows_the_definition() -> Result<()> {
    let Some(device) = cuda()? else { return Ok(()) };
    for (activation, (h, i)) in
        ACTIVATIONS.into_iter().flat_map(|a| [(33, 45), (72, 136)].map(|size| (a, size)))
    {
        let plain = FfnConfig::new(h, i).with_activation(activation);
        let biased = plain.clone().with_bias(true);
        let falcon = plain.clone().with_multipliers(0.6875, 1.375);
        let gpt_oss = biased.clone().with_limit(0.75).with_up_offset(1.0);
        let all = gpt_oss.clone().with_multipliers(-0.7, 0.3);
        for (cfg, dtype) in [plain, biased, falcon, gpt_oss, all]
            .iter()
            .flat_map(|cfg| KERNEL_DTYPES.map(|dtype| (cfg, dtype)))
        {
            let mut numbers = Numbers::new(8);
            let weights = weights(cfg, &mut numbers, dtype)?;
            let (block, ffn) = (Block::new(cfg, &weights)?, build(cfg, &weights, &device)?);
            for m in [1, 5, 40] {
                let x = numbers.tensor(&[m, h], 3.0, dtype)?;
                check(&format!("{dtype:?} M = {m} {cfg:?}"), &run(&ffn, &x, &device)?, &block, &x)?;
            }
        }
    }
    Ok(())
}

/// M = 1..40 covers every variant of the decode kernels and the change to prefill; 127..129 and 300
/// are at the edges of the prefill tiles.
#[test]
fn any_number_of_rows() -> Result<()> {
    let Some(device) = cuda()? else { return Ok(()) };
    let rows = (1..=40).chain([127, 128, 129, 300]);
    for ((h, i), dtype) in
        SIZES.into_iter().flat_map(|size| KERNEL_DTYPES.map(|dtype| (size, dtype)))
    {
        for bias in [false, true] {
            let cfg = FfnConfig::new(h, i).with_bias(bias);
            let mut numbers = Numbers::new(9);
            let weights = weights(&cfg, &mut numbers, dtype)?;
            let (block, ffn) = (Block::new(&cfg, &weights)?, build(&cfg, &weights, &device)?);
            let x = numbers.tensor(&[300, h], 3.0, dtype)?;
            let near = block.forward_rounded(&x, sum_roundoff(dtype), Some(dtype))?;
            let (expected, bounds) = (near.values(), near.errors());
            for m in rows.clone() {
                let y = run(&ffn, &x.narrow(0, 0, m)?, &device)?;
                let what = format!("{dtype:?} H = {h}, I = {i}, bias {bias}, M = {m}");
                check_within(&what, &y, &expected[..m * h], &bounds[..m * h])?;
            }
        }
    }
    Ok(())
}

/// Few rows: each row has the bits that it has alone. (2800, 1400) gives 175 tiles in both
/// products, more than a GPU has multiprocessors, so decode.cu uses small blocks there, and large
/// ones with (72, 136). The most rows that count as few are 16, or 8 where the environment forces a
/// prefill method.
#[test]
fn few_rows_are_the_same_alone() -> Result<()> {
    let Some(device) = cuda()? else { return Ok(()) };
    let few = if std::env::var_os("CANDLE_SWIGLU_CUDA_PREFILL").is_some() { 8 } else { 16 };
    let sizes: &[_] = if on_model() { &[(72, 136)] } else { &[(72, 136), (2800, 1400)] };
    for (&(h, i), dtype) in sizes.iter().flat_map(|size| KERNEL_DTYPES.map(|dtype| (size, dtype))) {
        let cfg = FfnConfig::new(h, i).with_bias(true);
        let mut numbers = Numbers::new(16);
        let weights = weights(&cfg, &mut numbers, dtype)?;
        let (block, ffn) = (Block::new(&cfg, &weights)?, build(&cfg, &weights, &device)?);
        let x = numbers.tensor(&[few, h], 3.0, dtype)?;
        let all = run(&ffn, &x, &device)?;
        check(&format!("{dtype:?} H = {h}, I = {i}"), &all, &block, &x)?;
        for (start, m) in [
            (0, 1),
            (few - 1, 1),
            (1, 7),
            (few / 2 - 1, few / 2 + 1),
            (few / 2, few / 2),
            (few / 8, few - few / 4),
            (1, few - 1),
        ] {
            let some = run(&ffn, &x.narrow(0, start, m)?, &device)?;
            assert_eq!(
                bits(&some)?,
                bits(&all.narrow(0, start, m)?)?,
                "{dtype:?} H = {h}, rows {start} to {}",
                start + m
            );
        }
    }
    Ok(())
}

/// Both prefill methods, where the device and the sizes support both.
#[test]
fn both_ways_of_prefill() -> Result<()> {
    let Some(device) = cuda()? else { return Ok(()) };
    for ((h, i), dtype) in
        SIZES.into_iter().flat_map(|size| [DType::BF16, DType::F16].map(|dtype| (size, dtype)))
    {
        for activation in ACTIVATIONS {
            let cfg =
                FfnConfig::new(h, i).with_activation(activation).with_bias(true).with_limit(2.0);
            let mut numbers = Numbers::new(10);
            let weights = weights(&cfg, &mut numbers, dtype)?;
            let (block, ffn) = (Block::new(&cfg, &weights)?, build(&cfg, &weights, &device)?);
            let x = numbers.tensor(&[300, h], 3.0, dtype)?;
            let near = block.forward_rounded(&x, sum_roundoff(dtype), Some(dtype))?;
            let (expected, bounds) = (near.values(), near.errors());
            for (way, m) in [CudaPrefill::Fused, CudaPrefill::Cublas]
                .into_iter()
                .flat_map(|way| [9, 33, 128, 129, 257, 300].map(|m| (way, m)))
            {
                let x = x.narrow(0, 0, m)?;
                let y = with_prefill(way, || run(&ffn, &x, &device));
                let what = format!("{way:?} {activation} {dtype:?} H = {h}, I = {i}, M = {m}");
                check_within(&what, &y?, &expected[..m * h], &bounds[..m * h])?;
            }
        }
    }
    Ok(())
}

/// Tiles of every width. Each width divides its I evenly among the 132 multiprocessors of an H100
/// or H200, so it is chosen there. Over integers both prefill methods give the same bits.
#[test]
fn tiles_of_every_width() -> Result<()> {
    let Some(device) = cuda()? else { return Ok(()) };
    let (h, multiprocessors) = (136, if super::on_model() { 7 } else { 132 });
    for (width, dtype) in [64, 80, 96, 112, 128]
        .into_iter()
        .flat_map(|width| [DType::BF16, DType::F16].map(|t| (width, t)))
    {
        let i = multiprocessors * width - 8;
        let mut numbers = Numbers::new(15);
        let mut t =
            |dims: &[usize]| anyhow::Ok(integers(&mut numbers, dims, dtype)?.to_device(&device)?);
        let (gate_proj, up_proj, down_proj, x) =
            (t(&[i, h])?, t(&[i, h])?, t(&[h, i])?, t(&[256, h])?);
        let gate_up = GateUp::separate(gate_proj, up_proj, None, None);
        let cfg = FfnConfig::new(h, i).with_activation(GluActivation::Relu);
        let ffn = SwiGluFfn::from_weights(&cfg, Weights::new(gate_up, down_proj, None))?;
        for m in [40, 128, 200, 256] {
            let x = x.narrow(0, 0, m)?;
            let [fused, cublas] = [CudaPrefill::Fused, CudaPrefill::Cublas]
                .map(|way| bits(&with_prefill(way, || ffn.forward(&x))?));
            assert_eq!(fused?, cublas?, "{dtype:?} width {width}, M = {m}");
        }
    }
    Ok(())
}

/// (…,n) on `device`, in every layout that candle's views can have.
fn views(n: usize, dtype: DType, device: &Device) -> Result<Vec<(&'static str, Tensor)>> {
    let mut numbers = Numbers::new(1);
    let mut t = |dims: &[usize]| anyhow::Ok(numbers.tensor(dims, 2.0, dtype)?.to_device(device)?);
    Ok(vec![
        ("vector", t(&[n])?),
        ("vector, every third element", t(&[n, 3])?.i((.., 1))?),
        ("rows", t(&[6, n])?),
        ("transposed", t(&[n, 6])?.t()?),
        ("last columns", t(&[6, 2 * n + 1])?.narrow(1, n + 1, n)?),
        ("every second row", t(&[6, 2, n])?.i((.., 1))?),
        ("from the second row, which may not start on 16 bytes", t(&[7, n])?.narrow(0, 1, 6)?),
        ("from the second element", t(&[6 * n + 1])?.narrow(0, 1, 6 * n)?.reshape((6, n))?),
        ("one row broadcast", t(&[1, n])?.broadcast_as((6, n))?),
        ("one column broadcast", t(&[6, 1])?.broadcast_as((6, n))?),
        ("rank 3, sequence first", t(&[3, 2, n])?.transpose(0, 1)?),
        ("rank 3, last positions", t(&[2, 40, n])?.narrow(1, 3, 37)?),
        ("rank 4, permuted", t(&[3, n, 2, 4])?.permute((2, 3, 0, 1))?),
    ])
}

#[test]
fn x_of_any_layout() -> Result<()> {
    let Some(device) = cuda()? else { return Ok(()) };
    for ((h, i), dtype) in
        SIZES.into_iter().flat_map(|size| KERNEL_DTYPES.map(|dtype| (size, dtype)))
    {
        let cfg = FfnConfig::new(h, i).with_bias(true);
        let mut numbers = Numbers::new(2);
        let weights = weights(&cfg, &mut numbers, dtype)?;
        let (ffn, linear) =
            (build(&cfg, &weights, &device)?, weights["gate_proj.weight"].to_device(&device)?);
        let linear = Linear::new(linear, None)?;
        for (layout, x) in views(h, dtype, &device)? {
            let copy = x.to_device(&Device::Cpu)?.contiguous()?.to_device(&device)?;
            let (y, of_copy) = (ffn.forward(&x)?, ffn.forward(&copy)?);
            assert_eq!((y.dims(), y.dtype()), (x.dims(), dtype), "{layout}");
            assert_eq!(bits(&y)?, bits(&of_copy)?, "{dtype:?} {layout}");
            assert_eq!(
                bits(&linear.forward(&x)?)?,
                bits(&linear.forward(&copy)?)?,
                "{dtype:?} {layout}, one projection"
            );
        }
        let none = Tensor::zeros((2, 0, h), dtype, &device)?;
        assert_eq!(ffn.forward(&none)?.dims(), [2, 0, h]);
    }
    Ok(())
}

/// Weights that are not 16-byte aligned, transposed or packed give the same bits. They are
/// integers, whose sums are exact in any order.
#[test]
fn weights_of_any_layout() -> Result<()> {
    let Some(device) = cuda()? else { return Ok(()) };
    let (h, i) = (72, 136);
    for dtype in KERNEL_DTYPES {
        let mut numbers = Numbers::new(3);
        let mut t =
            |dims: &[usize]| anyhow::Ok(integers(&mut numbers, dims, dtype)?.to_device(&device)?);
        let [gate, up, down] = [
            t(&[i * h + 1])?.narrow(0, 1, i * h)?.reshape((i, h))?,
            t(&[h, i])?.t()?,
            t(&[h, 2 * i])?.narrow(1, i, i)?,
        ];
        let xs = [1, 9, 33].map(|m| t(&[m, h]));
        let cfg = FfnConfig::new(h, i).with_activation(GluActivation::Relu);
        let ffn = |[gate_proj, up_proj, down_proj]: [Tensor; 3]| {
            let gate_up = GateUp::separate(gate_proj, up_proj, None, None);
            SwiGluFfn::from_weights(&cfg, Weights::new(gate_up, down_proj, None))
        };
        let to_cpu = |t: &Tensor| t.to_device(&Device::Cpu);
        let of_cpu = ffn([to_cpu(&gate)?, to_cpu(&up)?, to_cpu(&down)?])?;
        let ours = ffn([gate, up, down])?;
        for x in xs {
            let x = x?;
            let expected = of_cpu.forward(&x.to_device(&Device::Cpu)?)?;
            assert_eq!(bits(&ours.forward(&x)?)?, bits(&expected)?, "{dtype:?}");
        }
    }
    Ok(())
}

#[test]
fn one_projection() -> Result<()> {
    let Some(device) = cuda()? else { return Ok(()) };
    for ((k, n), dtype) in [(33, 45), (72, 1), (128, 1000), (8, 16)]
        .into_iter()
        .flat_map(|size| KERNEL_DTYPES.map(|dtype| (size, dtype)))
    {
        let mut numbers = Numbers::new(11);
        let (weight, bias) =
            (numbers.tensor(&[n, k], 1.0, dtype)?, numbers.tensor(&[n], 1.0, dtype)?);
        for bias in [None, Some(bias)] {
            let moved = bias.as_ref().map(|bias| bias.to_device(&device)).transpose()?;
            let layer = Linear::new(weight.to_device(&device)?, moved)?;
            for m in [1, 8, 9, 17, 32, 33, 130] {
                let x = numbers.tensor(&[m, k], 2.0, dtype)?;
                let y = run(&layer, &x, &device)?;
                let (xs, ws) = (values(&x)?, values(&weight)?);
                let bs = bias.as_ref().map_or(Ok(vec![0.0; n]), values)?;
                // The bound: |y - exact| <= γ·Σ|x||w| + u·|y|, with γ = (k + 1)·u of the sums. With
                // many rows cuBLAS also rounds before the bias is added.
                let (gamma, u) =
                    ((k + 1) as f64 * sum_roundoff(dtype), super::common::unit_roundoff(dtype));
                let (mut exact, mut bounds) = (vec![], vec![]);
                for (row, column) in (0..m).flat_map(|row| (0..n).map(move |column| (row, column)))
                {
                    let pairs = || xs[row * k..][..k].iter().zip(&ws[column * k..][..k]);
                    let y = pairs().map(|(x, w)| x * w).sum::<f64>() + bs[column];
                    let size = pairs().map(|(x, w)| (x * w).abs()).sum::<f64>() + bs[column].abs();
                    exact.push(y);
                    let before_bias =
                        if m > 8 && bias.is_some() { u * (y - bs[column]).abs() } else { 0.0 };
                    bounds.push(1.01 * (gamma * size + u * y.abs() + before_bias + 2f64.powi(-25)));
                }
                check_within(&format!("{dtype:?} K = {k}, N = {n}, M = {m}"), &y, &exact, &bounds)?;
            }
        }
    }
    Ok(())
}

/// The documented accuracy: at most twice the error of candle's own operations on the same device.
#[test]
fn no_less_accurate_than_candle() -> Result<()> {
    let Some(device) = cuda()? else { return Ok(()) };
    for (activation, dtype) in
        ACTIVATIONS.into_iter().flat_map(|a| KERNEL_DTYPES.map(|dtype| (a, dtype)))
    {
        let (cfg, mut numbers) =
            (FfnConfig::new(256, 640).with_activation(activation), Numbers::new(12));
        let weights = weights(&cfg, &mut numbers, dtype)?;
        for m in [4, 64] {
            let x = numbers.tensor(&[m, 256], 3.0, dtype)?;
            let exact = Block::new(&cfg, &weights)?.forward(&x, 0.0)?.values();
            let ours =
                rms_error(&values(&run(&build(&cfg, &weights, &device)?, &x, &device)?)?, &exact);
            let x = x.to_device(&device)?;
            let project = |x: &Tensor, name: &str| {
                x.matmul(&weights[&format!("{name}.weight")].to_device(&device)?.t()?)
            };
            let h = composed(activation, &project(&x, "gate_proj")?, &project(&x, "up_proj")?)?;
            let theirs = rms_error(&values(&project(&h, "down_proj")?)?, &exact);
            eprintln!("{:.3} of candle's error: {activation} {dtype:?} M = {m}", ours / theirs);
            assert!(
                ours <= 2.0 * theirs,
                "{activation} {dtype:?} M = {m}: error {ours:e}, candle's {theirs:e}"
            );
        }
    }
    Ok(())
}

/// 1,100 rows of 3·65,536 f32 exceed the scratch memory of a call, so they are computed in chunks.
#[test]
fn chunks_of_rows_make_one_result() -> Result<()> {
    let Some(device) = cuda()? else { return Ok(()) };
    let (m, h, i) = (1100, 8, 65536);
    let mut numbers = Numbers::new(13);
    let mut t =
        |dims: &[usize]| anyhow::Ok(integers(&mut numbers, dims, DType::F32)?.to_device(&device)?);
    let (gate_proj, up_proj, down_proj, x) = (t(&[i, h])?, t(&[i, h])?, t(&[h, i])?, t(&[m, h])?);
    let gate_up = GateUp::separate(gate_proj, up_proj, None, None);
    let cfg = FfnConfig::new(h, i).with_activation(GluActivation::Relu);
    // |gate|, |up| <= 32 and |y| <= 65,536·1,024·2 = 2^27, but the terms of y cancel. The sums are
    // exact in f32 while all partial sums stay below 2^24.
    let ffn = SwiGluFfn::from_weights(&cfg, Weights::new(gate_up, down_proj, None))?;
    let y = ffn.forward(&x)?;
    for start in [0, 500, 1000, 1090] {
        let rows = 10;
        assert_eq!(
            bits(&ffn.forward(&x.narrow(0, start, rows)?)?)?,
            bits(&y.narrow(0, start, rows)?)?,
            "from row {start}"
        );
    }
    Ok(())
}

/// f64 and weights of a variable use candle's matmuls around the gate's kernel, and x gets its
/// gradient with all weights.
#[test]
fn gradients_of_x() -> Result<()> {
    let Some(device) = cuda()? else { return Ok(()) };
    for (dtype, u) in [(DType::F64, 2f64.powi(-53)), (DType::F32, 2f64.powi(-24))] {
        let cfg = FfnConfig::new(33, 45).with_bias(true).with_limit(2.0).with_multipliers(0.7, 0.3);
        let mut numbers = Numbers::new(14);
        let weights = weights(&cfg, &mut numbers, dtype)?;
        let ffn = build(&cfg, &weights, &device)?;
        for m in [3, 40] {
            let (x, dy) =
                (numbers.tensor(&[m, 33], 2.0, dtype)?, numbers.tensor(&[m, 33], 1.0, dtype)?);
            let near = &Block::new(&cfg, &weights)?.gradients(&x, &dy, u)?["dx"];
            let var = Var::from_tensor(&x.to_device(&device)?)?;
            let store = (ffn.forward(&var)? * dy.to_device(&device)?)?.sum_all()?.backward()?;
            let dx = store.get(&var).ok_or_else(|| anyhow::anyhow!("no gradient"))?;
            let bounds: Vec<f64> = near.errors().iter().map(|error| 2.0 * error).collect();
            check_within(&format!("{dtype:?} M = {m}"), dx, &near.values(), &bounds)?;
        }
    }
    Ok(())
}
