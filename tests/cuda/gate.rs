//! `glu_mul` and its gradient on CUDA: every dtype and activation, every layout.

use anyhow::{Context, Result};
use candle_core::{DType, Device, IndexOp, Tensor, Var};
use candle_swiglu::{Glu, GluActivation, glu_mul, reference, silu_mul};

use super::common::{
    ACTIVATIONS, FLOATS, Numbers, bits, check_within, glu_units, slope_size, unit_roundoff, values,
};
use super::{cuda, on_model};

/// The gate without modifiers, and with all of them.
fn operations(activation: GluActivation) -> [Glu; 2] {
    let plain = Glu::new(activation);
    [plain, plain.with_gate_multiplier(-0.5).with_limit(2.0).with_up_offset(1.0)]
}

/// The unit roundoff of the kernels' arithmetic: that of f64 for f64, else that of f32.
fn arithmetic(dtype: DType) -> f64 {
    unit_roundoff(if dtype == DType::F64 { dtype } else { DType::F32 })
}

/// The absolute error where numbers are denormal. A rounding to a denormal f16 has an error of
/// 2⁻²⁵. An exponential that is denormal in f32 may be replaced by 0; times |gate| <= 12 and |up +
/// c| <= 5 that is less than 2⁻¹²⁰.
fn tiny(dtype: DType) -> f64 {
    match dtype {
        DType::F16 => 2f64.powi(-25),
        DType::F64 => 0.0,
        _ => 2f64.powi(-120),
    }
}

/// The documented units. In f64 the definition has the same error, and on both sides the rounding
/// of erfc's argument x/√2 adds x² units.
fn units(dtype: DType, activation: GluActivation, gate: f64) -> f64 {
    let units = glu_units(activation, gate);
    match (dtype, activation) {
        (DType::F64, GluActivation::Gelu) => 2.0 * (units + gate * gate),
        (DType::F64, _) => 2.0 * units,
        _ => units,
    }
}

/// The bound: the documented units of f32 (f64), one rounding to the dtype, and the errors of m·g
/// and u + c.
#[test]
fn values_follow_the_definition() -> Result<()> {
    let Some(device) = cuda()? else { return Ok(()) };
    for (dtype, op) in FLOATS
        .into_iter()
        .flat_map(|dtype| ACTIVATIONS.into_iter().flat_map(operations).map(move |op| (dtype, op)))
    {
        // Sizes at the edges of 16-byte vectors and of a block of 256 threads.
        for n in [1, 7, 8, 9, 255, 2048, 2049, 100_003] {
            let mut numbers = Numbers::new(21);
            let (gate, up) =
                (numbers.tensor(&[n], 12.0, dtype)?, numbers.tensor(&[n], 4.0, dtype)?);
            let out = op.mul(&gate.to_device(&device)?, &up.to_device(&device)?)?;
            let (mut exact, mut bounds) = (vec![], vec![]);
            for (g, u) in values(&gate)?.into_iter().zip(values(&up)?) {
                let y = reference::glu(&op, g, u);
                // u + c may cancel: this bounds an error of one unit of its terms, times act <= 12.
                let offset = if op.up_offset == 0.0 { 0.0 } else { 12.0 * (u.abs() + 1.0) };
                let bounded = (g * f64::from(op.gate_multiplier))
                    .min(op.limit.map_or(f64::INFINITY, f64::from));
                let error = arithmetic(dtype)
                    * ((units(dtype, op.activation, bounded) + 2.0) * y.abs() + offset);
                exact.push(y);
                bounds.push(1.01 * (error + unit_roundoff(dtype) * y.abs()) + tiny(dtype));
            }
            check_within(&format!("{dtype:?} {op:?} n = {n}"), &out, &exact, &bounds)?;
        }
    }
    Ok(())
}

#[test]
fn special_values_propagate() -> Result<()> {
    let Some(device) = cuda()? else { return Ok(()) };
    let special = [f32::NAN, f32::INFINITY, f32::NEG_INFINITY, 0.0, -0.0, 1.0, -50.0, 88.0, 3e38];
    let pairs: Vec<(f32, f32)> =
        special.into_iter().flat_map(|g| special.map(|u| (g, u))).collect();
    let column = |f: fn(&(f32, f32)) -> f32| {
        Tensor::new(pairs.iter().map(f).collect::<Vec<_>>(), &Device::Cpu)
    };
    let (gate, up) = (column(|pair| pair.0)?, column(|pair| pair.1)?);
    for op in ACTIVATIONS.into_iter().flat_map(operations) {
        let on_cpu = op.mul(&gate, &up)?.to_vec1::<f32>()?;
        let found = op.mul(&gate.to_device(&device)?, &up.to_device(&device)?)?.to_vec1::<f32>()?;
        for ((pair, a), b) in pairs.iter().zip(on_cpu).zip(found) {
            // The driver model computes in f64, where this square is finite.
            if on_model() && op.activation == GluActivation::Relu2 && pair.0 > 1e19 {
                continue;
            }
            let same = (a.is_nan() && b.is_nan()) || a == b || (a - b).abs() <= 1e-5 * a.abs();
            assert!(same, "{op:?} of {pair:?}: {b}, on the CPU {a}");
        }
    }
    Ok(())
}

#[test]
fn gradients_follow_the_definition() -> Result<()> {
    let Some(device) = cuda()? else { return Ok(()) };
    for (dtype, op) in FLOATS
        .into_iter()
        .flat_map(|dtype| ACTIVATIONS.into_iter().flat_map(operations).map(move |op| (dtype, op)))
    {
        let mut numbers = Numbers::new(22);
        let [gate, up, dy] = [6.0, 4.0, 2.0].map(|scale| numbers.tensor(&[9, 115], scale, dtype));
        let (gate, up, dy) = (gate?, up?, dy?);
        let (g, u) = (
            Var::from_tensor(&gate.to_device(&device)?)?,
            Var::from_tensor(&up.to_device(&device)?)?,
        );
        let store = (op.mul(&g, &u)? * dy.to_device(&device)?)?.sum_all()?.backward()?;
        let (mut exact, mut bounds) = ([vec![], vec![]], [vec![], vec![]]);
        for ((g, u), dy) in values(&gate)?.into_iter().zip(values(&up)?).zip(values(&dy)?) {
            let m = f64::from(op.gate_multiplier);
            let bounded = (g * m).min(op.limit.map_or(f64::INFINITY, f64::from));
            let units = arithmetic(dtype) * (units(dtype, op.activation, bounded) + 8.0);
            let (dgate, dup) = reference::glu_grad(&op, g, u, dy);
            let slope =
                dy.abs() * (u.abs() + 1.0) * slope_size(op.activation, bounded) * m.abs().max(1.0);
            exact[0].push(dgate);
            bounds[0]
                .push(1.01 * (units * slope + unit_roundoff(dtype) * dgate.abs()) + tiny(dtype));
            exact[1].push(dup);
            bounds[1]
                .push(1.01 * (units * dup.abs() + unit_roundoff(dtype) * dup.abs()) + tiny(dtype));
        }
        for (n, var) in [&g, &u].into_iter().enumerate() {
            let what = format!("{dtype:?} {op:?} {}", ["dgate", "dup"][n]);
            check_within(&what, store.get(var).context("no gradient")?, &exact[n], &bounds[n])?;
        }
    }
    Ok(())
}

/// (gate, up) as views of one tensor on `device`. Some of them are rows with strides, others are
/// not.
fn pairs(dtype: DType, device: &Device) -> Result<Vec<(&'static str, Tensor, Tensor)>> {
    let mut numbers = Numbers::new(23);
    let mut t = |dims: &[usize]| anyhow::Ok(numbers.tensor(dims, 3.0, dtype)?.to_device(device)?);
    let (halves, odd, pairs) = (t(&[6, 64])?, t(&[6, 66])?, t(&[6, 33, 2])?);
    let (turned, batches, rows) = (t(&[66, 6])?, t(&[2, 3, 64])?, t(&[2, 33])?);
    let (columns, offset, scalar) = (t(&[6, 2])?, t(&[6 * 33 + 1])?, t(&[])?);
    let offset = offset.narrow(0, 1, 6 * 33)?.reshape((6, 33))?;
    Ok(vec![
        ("halves of rows", halves.narrow(1, 0, 32)?, halves.narrow(1, 32, 32)?),
        ("halves off 16 bytes", odd.narrow(1, 0, 33)?, odd.narrow(1, 33, 33)?),
        ("interleaved", pairs.i((.., .., 0))?, pairs.i((.., .., 1))?),
        ("transposed", turned.narrow(0, 0, 33)?.t()?, turned.narrow(0, 33, 33)?.t()?),
        ("halves in batches", batches.narrow(2, 0, 32)?, batches.narrow(2, 32, 32)?),
        (
            "rows broadcast",
            rows.i(0..1)?.broadcast_as((6, 33))?,
            rows.i(1..2)?.broadcast_as((6, 33))?,
        ),
        (
            "columns broadcast",
            columns.narrow(1, 0, 1)?.broadcast_as((6, 33))?,
            columns.narrow(1, 1, 1)?.broadcast_as((6, 33))?,
        ),
        ("one off 16 bytes, the same twice", offset.clone(), offset),
        ("scalars", scalar.clone(), scalar),
    ])
}

/// Views give the same bits as their copies, forward and backward, with dy contiguous, transposed
/// or broadcast.
#[test]
fn any_layout() -> Result<()> {
    let Some(device) = cuda()? else { return Ok(()) };
    let copy = |t: &Tensor| t.to_device(&Device::Cpu)?.contiguous()?.to_device(&device);
    for dtype in FLOATS {
        for (layout, gate, up) in pairs(dtype, &device)? {
            let expected = bits(&silu_mul(&copy(&gate)?, &copy(&up)?)?)?;
            assert_eq!(bits(&silu_mul(&gate, &up)?)?, expected, "{dtype:?} {layout}");
            assert_eq!(
                bits(&silu_mul(&gate, &copy(&up)?)?)?,
                expected,
                "{dtype:?} {layout}, up a copy"
            );
            if gate.rank() != 2 {
                continue;
            }
            let (rows, columns) = gate.dims2()?;
            let dys = [
                Numbers::new(24).tensor(&[rows, columns], 1.0, dtype)?.to_device(&device)?,
                Numbers::new(25).tensor(&[columns, rows], 1.0, dtype)?.to_device(&device)?.t()?,
                Tensor::ones((1, 1), dtype, &device)?.broadcast_as((rows, columns))?,
            ];
            for dy in dys {
                let gradients = |gate: Tensor, up: Tensor, dy: &Tensor| -> Result<[Vec<u64>; 2]> {
                    let (gate, up) = (Var::from_tensor(&gate)?, Var::from_tensor(&up)?);
                    // The multiplication passes dy on in its layout.
                    let store =
                        (glu_mul(GluActivation::Silu, &gate, &up)? * dy)?.sum_all()?.backward()?;
                    let of = |var: &Var| bits(store.get(var).context("no gradient")?);
                    Ok([of(&gate)?, of(&up)?])
                };
                assert_eq!(
                    gradients(gate.clone(), up.clone(), &dy)?,
                    gradients(copy(&gate)?, copy(&up)?, &copy(&dy)?)?,
                    "{layout}"
                );
            }
        }
        let none = Tensor::zeros((0, 5), dtype, &device)?;
        assert_eq!(silu_mul(&none, &none)?.dims(), [0, 5]);
    }
    Ok(())
}

#[test]
fn a_second_derivative_is_an_error() -> Result<()> {
    let Some(device) = cuda()? else { return Ok(()) };
    let gate = Var::from_tensor(&Tensor::new(&[1f32, 2.0], &device)?)?;
    let store = silu_mul(&gate, &gate)?.sum_all()?.backward()?;
    let message = match store.get(&gate).context("no gradient")?.sqr()?.sum_all()?.backward() {
        Ok(_) => "a second derivative".to_string(),
        Err(error) => error.to_string(),
    };
    assert!(message.contains("glu_mul gradient"), "{message}");
    Ok(())
}
