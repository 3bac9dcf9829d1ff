//! `Linear::forward_f32`: the f32 sums behind `forward`.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, missing_docs)]

mod common;

use anyhow::Result;
use candle_core::{D, DType, Device, Tensor, Var};
use candle_nn::Module;
use candle_swiglu::{Error, Linear};
use common::{Numbers, bits, check_within, unit_roundoff, values};

/// (rows, in, out): edges of tiles for every kernel, more rows than a chunk, an odd k.
const CASES: [(usize, usize, usize); 7] = [
    (1, 64, 32),
    (2, 33, 31),
    (5, 129, 65),
    (12, 257, 40),
    (13, 96, 1),
    (25, 7, 130),
    (515, 48, 17),
];

#[test]
fn rounding_the_f32_output_gives_the_output() -> Result<()> {
    let mut numbers = Numbers::new(1);
    for dtype in [DType::F32, DType::BF16, DType::F16] {
        for (rows, k, columns) in CASES {
            let (x, w) = (
                numbers.tensor(&[rows, k], 1.0, dtype)?,
                numbers.tensor(&[columns, k], 1.0, dtype)?,
            );
            for bias in [None, Some(numbers.tensor(&[columns], 1.0, dtype)?)] {
                let what = format!("{dtype:?} ({rows}, {k}, {columns}), bias {}", bias.is_some());
                let layer = Linear::new(w.clone(), bias.clone())?;
                let y = layer.forward_f32(&x)?;
                assert_eq!((y.dtype(), y.dims()), (DType::F32, &[rows, columns][..]), "{what}");
                assert_eq!(bits(&y.to_dtype(dtype)?)?, bits(&layer.forward(&x)?)?, "{what}");

                // k products and a bias are added in f32. Each sum is off by at most k + 1
                // roundings of the sum of the magnitudes. Denormals that bf16 instructions flush
                // are far smaller.
                let wide = |t: &Tensor| t.to_dtype(DType::F64);
                let exact = wide(&x)?.matmul(&wide(&w)?.t()?)?;
                let size = wide(&x)?.abs()?.matmul(&wide(&w)?.abs()?.t()?)?;
                let (exact, size) = match &bias {
                    Some(bias) => (
                        exact.broadcast_add(&wide(bias)?)?,
                        size.broadcast_add(&wide(bias)?.abs()?)?,
                    ),
                    None => (exact, size),
                };
                let gamma = (k + 1) as f64 * unit_roundoff(DType::F32);
                let bounds: Vec<f64> = values(&size)?.iter().map(|size| gamma * size).collect();
                check_within(&what, &y, &values(&exact)?, &bounds)?;
            }
        }
    }
    Ok(())
}

#[test]
fn plain_weights_and_any_rank() -> Result<()> {
    let mut numbers = Numbers::new(2);
    for dtype in [DType::F32, DType::BF16, DType::F16] {
        let w = Var::from_tensor(&numbers.tensor(&[6, 10], 1.0, dtype)?)?;
        let b = numbers.tensor(&[6], 1.0, dtype)?;
        let x = numbers.tensor(&[2, 3, 10], 1.0, dtype)?;
        let plain = Linear::new(w.as_tensor().clone(), Some(b.clone()))?;
        let packed = Linear::new(w.as_tensor().detach(), Some(b))?;
        let (plain, packed) = (plain.forward_f32(&x)?, packed.forward_f32(&x)?);
        assert_eq!((packed.dims(), packed.dtype()), (&[2, 3, 6][..], DType::F32));
        // Two sums of 11 terms of at most 1 in magnitude.
        let bounds = vec![2.0 * 11.0 * 11.0 * unit_roundoff(DType::F32); 36];
        check_within("plain", &plain, &values(&packed)?, &bounds)?;
        let empty = Tensor::zeros((2, 0, 10), dtype, &Device::Cpu)?;
        let y = Linear::new(w.as_tensor().detach(), None)?.forward_f32(&empty)?;
        assert_eq!((y.dims(), y.dtype()), (&[2, 0, 6][..], DType::F32));
    }
    Ok(())
}

#[test]
fn gradient_of_x() -> Result<()> {
    let mut numbers = Numbers::new(3);
    for dtype in [DType::F32, DType::BF16] {
        let w = numbers.tensor(&[6, 10], 1.0, dtype)?;
        let x = Var::from_tensor(&numbers.tensor(&[4, 10], 1.0, dtype)?)?;
        let layer = Linear::new(w.clone(), None)?;
        let gradients = layer.forward_f32(x.as_tensor())?.sum_all()?.backward()?;
        let dx = gradients.get(x.as_tensor()).expect("a gradient of x");
        assert_eq!(dx.dtype(), dtype);
        let ones = Tensor::ones((4, 6), dtype, &Device::Cpu)?;
        assert_eq!(bits(dx)?, bits(&ones.matmul(&w)?)?);
        assert_eq!(dx.dim(D::Minus1)?, 10);
    }
    Ok(())
}

#[test]
fn errors() -> Result<()> {
    let f64_layer = Linear::new(Tensor::ones((3, 4), DType::F64, &Device::Cpu)?, None)?;
    let error =
        f64_layer.forward_f32(&Tensor::ones((1, 4), DType::F64, &Device::Cpu)?).unwrap_err();
    assert!(matches!(Error::find(&error), Some(Error::DTypeUnsupported { .. })), "{error}");
    let layer = Linear::new(Tensor::ones((3, 4), DType::F32, &Device::Cpu)?, None)?;
    let error = layer.forward_f32(&Tensor::ones((1, 5), DType::F32, &Device::Cpu)?).unwrap_err();
    assert!(matches!(Error::find(&error), Some(Error::InputWidth { .. })), "{error}");
    Ok(())
}

#[test]
fn x_in_a_wider_dtype_is_not_rounded() -> Result<()> {
    let weight = Tensor::randn(0f32, 1.0, (7, 33), &Device::Cpu)?.to_dtype(DType::BF16)?;
    let layer = Linear::new(weight, None)?;
    let x = Tensor::randn(0f32, 1.0, (3, 33), &Device::Cpu)?;
    let difference =
        (layer.forward_f32(&x)? - layer.forward(&x)?)?.abs()?.max_all()?.to_scalar::<f32>()?;
    assert_eq!(difference, 0.0);
    let error = layer.forward_f32(&Tensor::zeros((1, 33), DType::U32, &Device::Cpu)?).unwrap_err();
    assert!(
        error.to_string().contains("x: expected one of f16, bf16, f32, f64, found U32"),
        "{error}"
    );
    Ok(())
}
