//! Every float dtype in a file, loaded as every float dtype.

use candle_core::{DType, Device, Tensor};
use candle_swiglu::Checkpoint;
use half::{bf16, f16};

use super::{FLOATS, Tensors, single};

/// A dtype of 16 bits: its finite values from 0 up, and the power of two above them. Values from
/// the middle of this last step on are rounded to infinity.
struct Short {
    values: Vec<f64>,
    beyond: f64,
}

impl Short {
    fn new(dtype: DType) -> Self {
        let value = |bits| {
            if dtype == DType::F16 {
                f16::from_bits(bits).to_f64()
            } else {
                bf16::from_bits(bits).to_f64()
            }
        };
        let values: Vec<f64> = (0..0x8000).map(value).take_while(|v| v.is_finite()).collect();
        let beyond = if dtype == DType::F16 { 2f64.powi(16) } else { 2f64.powi(128) };
        Self { values, beyond }
    }

    /// The nearest value; of two equally near ones that with the even bit pattern.
    fn nearest(&self, v: f64) -> f64 {
        let size = v.abs();
        if v.is_nan() || size >= self.beyond {
            return v * f64::INFINITY;
        }
        let below = self.values.partition_point(|value| *value <= size) - 1;
        let last = below + 1 == self.values.len();
        let above = if last { self.beyond } else { self.values[below + 1] };
        let (down, up) = (size - self.values[below], above - size);
        match (down < up || down == up && below % 2 == 0, last) {
            (true, _) => self.values[below].copysign(v),
            (false, true) => f64::INFINITY.copysign(v),
            (false, false) => above.copysign(v),
        }
    }
}

/// The values after one rounding to the dtype.
fn rounded(dtype: DType, values: &[f64]) -> Vec<f64> {
    match dtype {
        DType::F64 => values.to_vec(),
        DType::F32 => values.iter().map(|v| f64::from(*v as f32)).collect(),
        _ => {
            let short = Short::new(dtype);
            values.iter().map(|v| short.nearest(*v)).collect()
        }
    }
}

/// Special values; values at and beside the ties of all dtypes; then random ones. Together they
/// fill more than a chunk of 1 MiB in every dtype.
fn values() -> Vec<f64> {
    let mut values = vec![
        0.0,
        f64::INFINITY,
        f64::NAN,
        f64::MAX,
        f64::MIN_POSITIVE,
        5e-324,
        f64::from(f32::MAX),
        65504.0,
        65520.0,
    ];
    for exponent in (-160..=140).map(|e| 2f64.powi(e)) {
        for last in [11, 12, 8, 9, 24, 25].map(|bit| 2f64.powi(-bit)) {
            values.extend(
                [
                    1.0,
                    1.0 + last,
                    1.0 + 3.0 * last,
                    1.0 + last + 2f64.powi(-45),
                    1.0 + last - 2f64.powi(-45),
                ]
                .map(|m| m * exponent),
            );
        }
    }
    let mut state = 1u64;
    while values.len() < 300_001 {
        state = state.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
        values.push(
            (1.0 + (state >> 12) as f64 * 2f64.powi(-52)) * 2f64.powi((state >> 7) as i32 % 32),
        );
    }
    let negative: Vec<f64> = values.iter().map(|v| -v).collect();
    [values, negative].concat()
}

#[test]
fn any_dtype_of_the_file_in_any_dtype_with_one_rounding() {
    let values = values();
    let make = |dtype| {
        let stored = rounded(dtype, &values);
        // Exact, because these are values of the dtype.
        let tensor = Tensor::from_slice(&stored, stored.len(), &Device::Cpu)
            .unwrap()
            .to_dtype(dtype)
            .unwrap();
        (stored, tensor)
    };
    let (stored, tensors): (Vec<_>, Vec<_>) = FLOATS.map(make).into_iter().unzip();
    let dir = single(&tensors.into_iter().map(|t| (t.dtype().as_str().to_string(), t)).collect());
    let checkpoint = Checkpoint::open(dir.path()).unwrap();
    for (source, stored) in FLOATS.iter().zip(&stored) {
        for target in FLOATS {
            let vb = checkpoint.var_builder(target, &Device::Cpu);
            let loaded = vb.get(stored.len(), source.as_str()).unwrap();
            assert_eq!(loaded.dtype(), target);
            let loaded = loaded.to_dtype(DType::F64).unwrap().to_vec1::<f64>().unwrap();
            for ((found, expected), v) in loaded.iter().zip(rounded(target, stored)).zip(stored) {
                let same =
                    found.to_bits() == expected.to_bits() || found.is_nan() && expected.is_nan();
                assert!(
                    same,
                    "{source:?} {v:e} as {target:?}: expected {expected:e}, found {found:e}"
                );
            }
        }
    }
}

#[test]
fn values_and_their_places_survive_every_chunk() {
    // 9 M elements: 18 MB of bf16, more than one chunk of a read without conversion.
    let n = 9_000_001;
    let bits = |i: usize| bf16::from_bits((i % 0x7f00) as u16);
    let tensors =
        Tensors::from([("w".into(), Tensor::from_iter((0..n).map(bits), &Device::Cpu).unwrap())]);
    let dir = single(&tensors);
    let vb = Checkpoint::open(dir.path()).unwrap().var_builder(DType::BF16, &Device::Cpu);
    let loaded = vb.get(n, "w").unwrap().to_vec1::<bf16>().unwrap();
    assert!(loaded.into_iter().enumerate().all(|(i, v)| v == bits(i)));
}

#[test]
fn scalars_and_empty_tensors() {
    let tensors = Tensors::from([
        ("empty".into(), Tensor::zeros((0, 5), DType::F32, &Device::Cpu).unwrap()),
        ("scalar".into(), Tensor::new(2.5f32, &Device::Cpu).unwrap()),
    ]);
    let dir = single(&tensors);
    for dtype in FLOATS {
        let vb = Checkpoint::open(dir.path()).unwrap().var_builder(dtype, &Device::Cpu);
        assert_eq!(vb.get((0, 5), "empty").unwrap().dims(), [0, 5]);
        let scalar = vb.get((), "scalar").unwrap().to_dtype(DType::F64).unwrap();
        assert_eq!(scalar.to_scalar::<f64>().unwrap(), 2.5);
    }
}
