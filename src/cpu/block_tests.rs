//! The packed block and the linear layer, every kernel the machine has, against the f64 definition
//! and against themselves.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use std::sync::OnceLock;

use candle_core::{CpuStorage, DType, Layout, Shape, WithDType};
use half::{bf16, f16};

use super::tests::{activation_bound, ops};
use super::tuning::CpuFamily;
use super::{BlockLayer, CpuKernels, LinearLayer, available, block, isa, linear, twin};
use crate::gate::activation::{Glu, GluActivation};
use crate::reference;
use crate::which::Which;

/// Unit roundoff of f32, the type of all sums.
const U: f64 = 1.0 / (1 << 24) as f64;
/// What a product with a denormal factor may lose: `vdpbf16ps` and `bfdot` take denormals for 0.
const FLUSHED: f64 = 1.2e-38;

/// The kernels that this machine can run, and those of AVX-512 also with the shapes and tuning of
/// another CPU family.
pub(super) fn every_kernel() -> &'static [CpuKernels] {
    static KERNELS: OnceLock<Vec<CpuKernels>> = OnceLock::new();
    KERNELS.get_or_init(|| {
        let here = CpuFamily::detect();
        let other = match here {
            CpuFamily::SapphireRapids => CpuFamily::Other,
            _ => CpuFamily::SapphireRapids,
        };
        let mut kernels = isa::detect(here);
        kernels.extend(isa::detect(other).into_iter().filter(|k| k.name.starts_with("avx512")));
        kernels
    })
}

/// Unit roundoff, and half the smallest denormal, of the dtype that h and y are rounded to.
fn roundoff(dtype: DType) -> (f64, f64) {
    match dtype {
        DType::BF16 => (2f64.powi(-8), FLUSHED),
        DType::F16 => (2f64.powi(-11), 2f64.powi(-25)),
        _ => (U, 2f64.powi(-150)),
    }
}

/// A matrix (rows, columns) of numbers that are exact in a dtype.
#[derive(Clone)]
struct Matrix {
    rows: usize,
    columns: usize,
    data: Vec<f64>,
}

impl Matrix {
    /// Uniform in ±√3·scale; by way of f32, which some machines' conversions of f64 to f16 go by
    /// anyway.
    fn random<T: WithDType>(rows: usize, columns: usize, scale: f64, seed: u64) -> Self {
        let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) ^ (rows * 31 + columns) as u64;
        let mut next = || {
            state = state.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
            ((state >> 40) as f64 / f64::from(1 << 23) - 1.0) * scale * 3f64.sqrt()
        };
        let data =
            (0..rows * columns).map(|_| T::from_f64(f64::from(next() as f32)).to_f64()).collect();
        Self { rows, columns, data }
    }

    fn row(&self, row: usize) -> &[f64] {
        &self.data[row * self.columns..(row + 1) * self.columns]
    }

    fn storage<T: WithDType>(&self) -> (CpuStorage, Layout) {
        let data: Vec<T> = self.data.iter().map(|&v| T::from_f64(v)).collect();
        (T::to_cpu_storage_owned(data), Layout::contiguous(Shape::from((self.rows, self.columns))))
    }

    fn rows(&self, range: std::ops::Range<usize>) -> Self {
        let data = self.data[range.start * self.columns..range.end * self.columns].to_vec();
        Self { rows: range.len(), columns: self.columns, data }
    }
}

/// A computed number's value and how far from it rounding may lead.
type Near = (f64, f64);

/// Σ a·b + bias, where a carries an error, in f32 in any order.
fn dot(a: &[Near], b: &[f64], bias: f64) -> Near {
    let (mut sum, mut size, mut carried) = (bias, bias.abs(), 0.0);
    for (&(a, error), b) in a.iter().zip(b) {
        sum += a * b;
        size += (a.abs() + error) * b.abs();
        carried += error * b.abs();
    }
    let roundings = (a.len() + 3) as f64;
    (sum, carried + roundings * (U * size + FLUSHED))
}

/// act(min(m·gate, limit)) · (clamp(up) + c): the activation is nowhere steeper than 1.13.
fn glu_near(op: &Glu, gate: Near, up: Near, dtype: DType) -> Near {
    let m = f64::from(op.gate_multiplier);
    let limit = op.limit.map_or(f64::INFINITY, f64::from);
    let (g, g_error) = ((m * gate.0).min(limit), m.abs() * gate.1 + U * (m * gate.0).abs());
    let (act, _) = reference::activation(op.activation, g);
    let act_error = 1.13 * g_error + U * activation_bound(op.activation, g) * act.abs();
    let u = up.0.clamp(-limit, limit) + f64::from(op.up_offset);
    let u_error = up.1 + U * u.abs();
    let (exact, (half_ulp, smallest)) = (act * u, roundoff(dtype));
    let error = act_error * (u.abs() + u_error) + act.abs() * u_error + U * exact.abs();
    (exact, error + half_ulp * (exact.abs() + error) + smallest)
}

fn rounded((value, error): Near, dtype: DType) -> Near {
    let (half_ulp, smallest) = roundoff(dtype);
    (value, error + half_ulp * (value.abs() + error) + smallest)
}

/// A block's weights and biases, and what it computes.
struct Case {
    op: Glu,
    gate: Matrix,
    up: Matrix,
    down: Matrix,
    biases: Option<[Matrix; 3]>,
    down_multiplier: f32,
}

impl Case {
    fn new<T: WithDType>(op: Glu, h: usize, i: usize, bias: bool) -> Self {
        let scale = |k: usize| 1.0 / (k as f64).sqrt();
        let biases =
            || [(i, 5), (i, 6), (h, 7)].map(|(n, seed)| Matrix::random::<T>(1, n, 0.5, seed));
        Self {
            op,
            gate: Matrix::random::<T>(i, h, scale(h), 1),
            up: Matrix::random::<T>(i, h, scale(h), 2),
            down: Matrix::random::<T>(h, i, scale(i), 3),
            biases: bias.then(biases),
            down_multiplier: 1.0,
        }
    }

    fn layer<T: WithDType>(&self, kernel: &'static CpuKernels) -> Box<dyn BlockLayer> {
        let sizes = (self.down.rows, self.gate.rows);
        let mut layer = block(kernel, T::DTYPE, sizes, self.op, self.down_multiplier).unwrap();
        let weights = [(Which::Gate, &self.gate), (Which::Up, &self.up), (Which::Down, &self.down)];
        for (i, (part, weight)) in weights.into_iter().enumerate() {
            let (storage, layout) = weight.storage::<T>();
            layer.set_weight(part, &storage, &layout).unwrap();
            if let Some(biases) = &self.biases {
                layer.set_bias(part, &biases[i].data.iter().map(|&v| v as f32).collect::<Vec<_>>());
            }
        }
        layer
    }

    fn expected(&self, x: &Matrix, dtype: DType) -> Vec<Near> {
        let bias = |which: usize, at: usize| {
            self.biases.as_ref().map_or(0.0, |biases| biases[which].data[at])
        };
        let mut y = vec![];
        for row in 0..x.rows {
            let x: Vec<Near> = x.row(row).iter().map(|&v| (v, 0.0)).collect();
            let project =
                |w: &Matrix, which, channel| dot(&x, w.row(channel), bias(which, channel));
            let channel =
                |c| glu_near(&self.op, project(&self.gate, 0, c), project(&self.up, 1, c), dtype);
            let h: Vec<Near> = (0..self.gate.rows).map(channel).collect();
            let scaled = |(value, error): Near| {
                let factor = f64::from(self.down_multiplier);
                (value * factor, error * factor.abs() + U * (value * factor).abs())
            };
            y.extend(
                (0..self.down.rows)
                    .map(|c| rounded(scaled(dot(&h, self.down.row(c), bias(2, c))), dtype)),
            );
        }
        y
    }

    /// Every kernel's y within the bound.
    fn check<T: WithDType>(&self, x: &Matrix) {
        self.check_kernels::<T>(x, every_kernel());
    }

    /// These kernels' y within the bound.
    fn check_kernels<T: WithDType>(
        &self,
        x: &Matrix,
        kernels: impl IntoIterator<Item = &'static CpuKernels>,
    ) {
        let expected = self.expected(x, T::DTYPE);
        for kernel in kernels {
            let y = run::<T>(&*self.layer::<T>(kernel), x);
            assert_eq!(y.len(), expected.len());
            for (at, (&y, &(exact, error))) in y.iter().zip(&expected).enumerate() {
                let case = format!("{} {:?} {:?}", kernel.name, T::DTYPE, self.op);
                let sizes = (x.rows, self.down.rows, self.gate.rows);
                assert!(
                    (y - exact).abs() <= error,
                    "{case} (M, H, I) = {sizes:?} at {at}: {y}, exact {exact} ± {error}"
                );
            }
        }
    }
}

/// Either kind of layer.
trait Forward {
    fn y(&self, storage: &CpuStorage, layout: &Layout) -> CpuStorage;
}

impl Forward for dyn BlockLayer {
    fn y(&self, storage: &CpuStorage, layout: &Layout) -> CpuStorage {
        self.forward((storage, layout), [None; 2]).unwrap()
    }
}

impl Forward for dyn LinearLayer {
    fn y(&self, storage: &CpuStorage, layout: &Layout) -> CpuStorage {
        self.forward((storage, layout), None).unwrap()
    }
}

fn run<T: WithDType>(layer: &(impl Forward + ?Sized), x: &Matrix) -> Vec<f64> {
    let (storage, layout) = x.storage::<T>();
    values::<T>(layer.y(&storage, &layout))
}

fn values<T: WithDType>(storage: CpuStorage) -> Vec<f64> {
    T::cpu_storage_as_slice(&storage).unwrap().iter().map(|v| v.to_f64()).collect()
}

fn silu() -> Glu {
    Glu::new(GluActivation::Silu)
}

/// M: around the heights of microkernels (6, 12), the limit of the smaller k-block (24) and the
/// length of a chunk (512). H and I: around the widths of vectors and panels, odd, and longer than
/// a k-block, which has 128 to 1024 values with few rows and up to 8192 with many. With up to 6
/// rows, H and I are also large enough for units of adjacent panels on up to 8 threads, and leave
/// one panel over.
fn sizes() -> Vec<(usize, usize, usize)> {
    let small = [(1, 1), (7, 5), (33, 65), (64, 32), (67, 129)];
    let mut sizes: Vec<_> = (1..=13).flat_map(|m| small.map(|(h, i)| (m, h, i))).collect();
    sizes.extend([23, 24, 25, 47, 48, 49].map(|m| (m, 67, 70)));
    sizes.extend([127, 128, 129, 511, 512, 513].map(|m| (m, 35, 37)));
    sizes.extend((1..=6).flat_map(|m| [(m, 2051, 33), (m, 33, 2051)]));
    sizes.extend([
        (11, 521, 35),
        (15, 1051, 35),
        (20, 33, 1051),
        (26, 2051, 33),
        (26, 33, 4099),
        (26, 8195, 3),
        (1030, 5, 6),
    ]);
    sizes
}

macro_rules! per_dtype {
    ($module:ident, $dtype:ty) => {
        mod $module {
            use super::*;
            type T = $dtype;

            #[test]
            fn every_size_meets_the_definition() {
                for (m, h, i) in sizes() {
                    Case::new::<T>(silu(), h, i, false)
                        .check::<T>(&Matrix::random::<T>(m, h, 1.0, 4));
                }
            }

            #[test]
            fn every_activation_meets_the_definition() {
                for op in ops() {
                    for (bias, m) in [(false, 2), (true, 1), (true, 9)] {
                        let mut case = Case::new::<T>(op, 45, 53, bias);
                        case.down_multiplier = if bias { 0.375 } else { 1.0 };
                        case.check::<T>(&Matrix::random::<T>(m, 45, 1.5, 4));
                    }
                }
            }

            #[test]
            fn linear_meets_the_definition() {
                let columns = [1, 7, 8, 15, 16, 17, 31, 32, 33, 63, 64, 65, 130];
                for (n, k, m) in
                    columns.into_iter().flat_map(|n| [(n, 77, 1), (n, 130, 7), (n, 9, 40)])
                {
                    let (weight, bias) =
                        (Matrix::random::<T>(n, k, 0.3, 1), Matrix::random::<T>(1, n, 0.3, 2));
                    let x = Matrix::random::<T>(m, k, 1.0, 4);
                    for (kernel, with_bias) in
                        every_kernel().iter().flat_map(|kernel| [(kernel, false), (kernel, true)])
                    {
                        let mut layer = linear(kernel, T::DTYPE, n, k).unwrap();
                        let (storage, layout) = weight.storage::<T>();
                        layer.set_weight(&storage, &layout).unwrap();
                        if with_bias {
                            layer
                                .set_bias(&bias.data.iter().map(|&v| v as f32).collect::<Vec<_>>());
                        }
                        let y = run::<T>(&*layer, &x);
                        for (at, y) in y.into_iter().enumerate() {
                            let a: Vec<Near> = x.row(at / n).iter().map(|&v| (v, 0.0)).collect();
                            let bias = if with_bias { bias.data[at % n] } else { 0.0 };
                            let (exact, error) =
                                rounded(dot(&a, weight.row(at % n), bias), T::DTYPE);
                            assert!(
                                (y - exact).abs() <= error,
                                "{} ({m}, {k}, {n}) at {at}: {y} {exact}",
                                kernel.name
                            );
                        }
                    }
                }
            }

            /// A product over no k is its bias, whatever the scratch held before.
            #[test]
            fn no_k_gives_the_bias() {
                let (n, bias) = (2051, Matrix::random::<T>(1, 2051, 0.3, 2));
                for kernel in every_kernel() {
                    let mut used = linear(kernel, T::DTYPE, n, 3).unwrap();
                    let (storage, layout) = Matrix::random::<T>(n, 3, 1.0, 1).storage::<T>();
                    used.set_weight(&storage, &layout).unwrap();
                    let mut layer = linear(kernel, T::DTYPE, n, 0).unwrap();
                    layer.set_bias(&bias.data.iter().map(|&v| v as f32).collect::<Vec<_>>());
                    for m in [1, 2, 3, 9, 30] {
                        run::<T>(&*used, &Matrix::random::<T>(m, 3, 1.0, 4));
                        let y = run::<T>(&*layer, &Matrix { rows: m, columns: 0, data: vec![] });
                        assert_eq!(y, bias.data.repeat(m), "{} {m} rows", kernel.name);
                    }
                }
            }

            /// Decode and prefill agree to the bit, whatever the cuts in rows and in k.
            #[test]
            fn a_row_does_not_depend_on_its_company() {
                let (h, i) = (2051, 67);
                let case = Case::new::<T>(silu(), h, i, true);
                let x = Matrix::random::<T>(530, h, 1.0, 4);
                for kernel in every_kernel() {
                    let layer = case.layer::<T>(kernel);
                    let all = run::<T>(&*layer, &x);
                    for range in
                        [0..1, 1..3, 3..9, 9..16, 16..41, 41..54, 60..77, 100..160, 511..530]
                    {
                        let part = run::<T>(&*layer, &x.rows(range.clone()));
                        assert_eq!(
                            part,
                            all[range.start * h..range.end * h],
                            "{} rows {range:?}",
                            kernel.name
                        );
                    }
                }
            }

            #[test]
            fn any_layout_gives_what_a_copy_gives() {
                let (m, h, i) = (9, 35, 41);
                let case = Case::new::<T>(silu(), h, i, false);
                let data = Matrix::random::<T>(1, 2 * m * h + 9, 1.0, 4);
                let (storage, _) = data.storage::<T>();
                let shape = Shape::from((m, h));
                let layouts = [
                    Layout::contiguous_with_offset((m, h), 5),
                    Layout::new(shape.clone(), vec![2 * h, 1], 3),
                    Layout::new(shape.clone(), vec![2 * h, 2], 1),
                    Layout::new(shape.clone(), vec![1, m], 3),
                    Layout::new(shape.clone(), vec![0, 1], 9),
                    Layout::new(shape.clone(), vec![1, 0], 9),
                    Layout::new(shape, vec![0, 0], 2),
                ];
                for (kernel, layout) in every_kernel()
                    .iter()
                    .flat_map(|kernel| layouts.iter().map(move |layout| (kernel, layout)))
                {
                    let (s, o) = (layout.stride(), layout.start_offset());
                    let copy =
                        (0..m * h).map(|at| data.data[o + at / h * s[0] + at % h * s[1]]).collect();
                    let layer = case.layer::<T>(kernel);
                    let copied = run::<T>(&*layer, &Matrix { rows: m, columns: h, data: copy });
                    let strided =
                        values::<T>(layer.forward((&storage, layout), [None; 2]).unwrap());
                    assert_eq!(strided, copied, "{} {layout:?}", kernel.name);
                }
            }

            /// Weights as transposed or strided views pack to the same; and come back as they were.
            #[test]
            fn packing_keeps_every_weight() {
                let (n, k) = (70, 37);
                let matrix = Matrix::random::<T>(n, k, 1.0, 1);
                let transposed: Vec<T> =
                    (0..k * n).map(|at| T::from_f64(matrix.data[at % n * k + at / n])).collect();
                let transposed = (
                    T::to_cpu_storage_owned(transposed),
                    Layout::new(Shape::from((n, k)), vec![1, n], 0),
                );
                for kernel in every_kernel() {
                    for (storage, layout) in [&matrix.storage::<T>(), &transposed] {
                        let mut layer = linear(kernel, T::DTYPE, n, k).unwrap();
                        layer.set_weight(storage, layout).unwrap();
                        assert_eq!(
                            values::<T>(layer.rows(&mut (0..n))),
                            matrix.data,
                            "{}",
                            kernel.name
                        );
                        let some = values::<T>(layer.rows(&mut [69, 0, 32].into_iter()));
                        assert_eq!(
                            some,
                            [matrix.row(69), matrix.row(0), matrix.row(32)].concat(),
                            "{}",
                            kernel.name
                        );
                    }
                }
            }

            /// NaN and ∞ stay in their row, and padding makes none.
            #[test]
            fn what_is_not_finite_stays_in_its_row() {
                let (m, h, i) = (40, 35, 41);
                let case = Case::new::<T>(silu(), h, i, false);
                let clean = Matrix::random::<T>(m, h, 1.0, 4);
                let mut x = clean.clone();
                (x.data[3 * h + 34], x.data[7 * h], x.data[39 * h + 1]) =
                    (f64::NAN, f64::INFINITY, f64::NEG_INFINITY);
                for kernel in every_kernel() {
                    let layer = case.layer::<T>(kernel);
                    let (expected, y) = (run::<T>(&*layer, &clean), run::<T>(&*layer, &x));
                    for row in 0..m {
                        let (y, expected) =
                            (&y[row * h..(row + 1) * h], &expected[row * h..(row + 1) * h]);
                        match row {
                            // Every channel holds NaN, or ∞ of both signs on its way: NaN.
                            3 | 7 | 39 => assert!(
                                y.iter().all(|v| v.is_nan()),
                                "{} row {row}: {y:?}",
                                kernel.name
                            ),
                            _ => assert_eq!(y, expected, "{} row {row}", kernel.name),
                        }
                    }
                }
            }

            /// Sums that fit are not lost on the way; denormals count unless the instruction takes
            /// them for 0.
            #[test]
            fn the_ends_of_the_range() {
                // 2⁷·2⁸ = 2¹⁵ and so on: the largest power of two of the dtype, by one product.
                let (top, tiny) = match T::DTYPE {
                    DType::F16 => (15, -24),
                    DType::BF16 => (127, -133),
                    _ => (127, -149),
                };
                for kernel in every_kernel() {
                    let mut layer = linear(kernel, T::DTYPE, 1, 2).unwrap();
                    let weight =
                        Matrix { rows: 1, columns: 2, data: vec![2f64.powi(top - 7), 1.0] };
                    let (storage, layout) = weight.storage::<T>();
                    layer.set_weight(&storage, &layout).unwrap();
                    let y = |a: f64, b: f64| {
                        run::<T>(&*layer, &Matrix { rows: 1, columns: 2, data: vec![a, b] })[0]
                    };
                    assert_eq!(y(128.0, 0.0), 2f64.powi(top), "{}", kernel.name);
                    assert_eq!(y(-128.0, 0.0), -(2f64.powi(top)), "{}", kernel.name);
                    assert_eq!(y(256.0, 0.0), f64::INFINITY, "{}", kernel.name);
                    let flushes = ["amx", "avx512bf16", "neonbf16"].contains(&kernel.name)
                        && T::DTYPE == DType::BF16;
                    let smallest = 2f64.powi(tiny);
                    assert_eq!(
                        y(0.0, smallest),
                        if flushes { 0.0 } else { smallest },
                        "{}",
                        kernel.name
                    );
                    assert_eq!(y(-0.0, 0.0), 0.0, "{}", kernel.name);
                    let whole = 3.0; // 2 and 1, of many
                    assert_eq!(
                        run::<T>(
                            &*layer,
                            &Matrix {
                                rows: 3,
                                columns: 2,
                                data: vec![0.0, whole, 0.0, -whole, 0.0, 0.0]
                            }
                        ),
                        [3.0, -3.0, 0.0]
                    );
                }
            }
        }
    };
}

per_dtype!(in_f32, f32);
per_dtype!(in_bf16, bf16);
per_dtype!(in_f16, f16);

/// One fused multiply-add per product, in the order of k, on every instruction set that has it: the
/// same bits, those of the first machine.
#[test]
fn vector_kernels_of_one_arithmetic_give_the_same_bits() {
    const F32: u64 = 0xbdcd_bfb4_7a85_f4c6;
    const F16: u64 = 0x17fb_75f1_5015_e7c1;
    const BF16: u64 = 0x977a_13f2_06c7_62fa;
    fn digest<T: WithDType>(kernel: &'static CpuKernels) -> u64 {
        let case = Case::new::<T>(silu(), 131, 67, true);
        let y = run::<T>(&*case.layer::<T>(kernel), &Matrix::random::<T>(33, 131, 1.0, 4));
        y.iter().fold(0, |hash: u64, y| {
            (hash ^ y.to_bits()).wrapping_mul(0x9e37_79b9_7f4a_7c15).rotate_left(32)
        })
    }
    for kernel in every_kernel() {
        let fuses = match kernel.name {
            "scalar" => cfg!(any(target_feature = "fma", target_arch = "aarch64")),
            name => name != "simd128",
        };
        if !fuses {
            continue;
        }
        let native = ["amx", "avx512bf16", "neonbf16"].contains(&kernel.name);
        let found = [
            digest::<f32>(kernel),
            digest::<f16>(kernel),
            if native { BF16 } else { digest::<bf16>(kernel) },
        ];
        assert_eq!(found, [F32, F16, BF16], "{}: {found:#x?}", kernel.name);
    }
}

/// The benchmark's floor reads every weight: the words of the packed memory have the same sum, to
/// which padding adds nothing.
#[test]
fn the_packed_memory_holds_all_weights() {
    let case = Case::new::<f32>(silu(), 70, 33, false);
    let weights = [&case.gate, &case.up, &case.down].into_iter().flat_map(|matrix| &matrix.data);
    let expected = weights.map(|value| (*value as f32).to_bits()).fold(0, u32::wrapping_add);
    for kernel in every_kernel() {
        let layer = case.layer::<f32>(kernel);
        let words = layer.bytes().into_iter().flat_map(|bytes| bytes.chunks_exact(4));
        let sum = words
            .map(|word| u32::from_ne_bytes(word.try_into().unwrap()))
            .fold(0, u32::wrapping_add);
        assert_eq!(sum, expected, "{}", kernel.name);
    }
}

#[test]
fn dtypes_without_a_kernel_are_left_to_the_plain_path() {
    for kernel in every_kernel() {
        for dtype in [DType::F64, DType::U8, DType::I64] {
            assert!(
                linear(kernel, dtype, 3, 4).is_none()
                    && block(kernel, dtype, (3, 4), silu(), 1.0).is_none()
            );
        }
    }
}

/// Rows are cut only where panels leave threads idle, and never into blocks too small to pay.
#[test]
fn rows_are_cut_where_panels_do_not_come_out_even() {
    use super::partition::Partition;
    for (rows, panels, threads, units, last) in [
        (512, 448, 2, 448, 512), // even
        (512, 447, 2, 447, 512), // one in 447 idle
        (512, 43, 2, 44, 256),   // the last one of 43
        (16, 43, 2, 44, 8),
        (7, 43, 2, 43, 7), // half of it would be below the least
        (150, 43, 2, 44, 75),
        (300, 8, 3, 24, 100), // the last two are too many for three threads, so all are cut
        (300, 7, 3, 9, 100),
        (512, 8, 16, 16, 256),
        (512, 43, 16, 172, 128), // the last eleven as well
        (1, 1, 64, 1, 1),
        (512, 1, 64, 64, 8),
    ] {
        let cut = Partition::new(rows, panels, threads, 1);
        assert_eq!(cut.units(), units, "{rows} rows, {panels} panels, {threads} threads");
        assert_eq!(
            cut.unit(units - 1).1.len(),
            last,
            "{rows} rows, {panels} panels, {threads} threads"
        );
    }
    assert_eq!(Partition::new(1, 43, 2, 2).units(), 22);
    assert_eq!(Partition::new(1, 43, 6, 2).units(), 43); // too few for two at once
}

/// Every panel meets every row in one unit.
#[test]
fn units_are_all_panels_and_rows_once() {
    use super::partition::Partition;
    for (rows, panels, threads) in
        (1..520).step_by(7).flat_map(|rows| (1..50).map(move |n| (rows, n, 1 + (rows + n) % 17)))
    {
        for adjacent in [1, 2, 8] {
            let cut = Partition::new(rows, panels, threads, adjacent);
            let (mut seen, mut small) = (vec![0; rows * panels], 0);
            for unit in 0..cut.units() {
                let (unit_panels, unit_rows) = cut.unit(unit);
                assert!(!unit_rows.is_empty() && (1..=cut.adjacent()).contains(&unit_panels.len()));
                assert!(unit_rows.len() >= 4.min(rows));
                small += usize::from(unit_rows.len() < 86.min(rows));
                unit_panels.for_each(|panel| {
                    unit_rows.clone().for_each(|row| seen[panel * rows + row] += 1)
                });
            }
            // Blocks that hardly pay are of the last round only.
            assert!(
                small <= threads,
                "{rows} rows, {panels} panels, {threads} threads: {small} small units"
            );
            assert!(
                seen.iter().all(|&n| n == 1),
                "{rows} rows, {panels} panels, {threads} threads, {adjacent} adjacent"
            );
        }
    }
}

/// Tiles of 1 to 16 rows, pairs of them and one left over; k within a tile, of several tiles, of
/// several k-blocks and odd; panels in groups, alone and left over; gate's bias and any activation.
#[test]
fn products_on_tiles_meet_the_definition_and_the_instructions() {
    let small = [(1, 1), (33, 65), (64, 32), (67, 129)];
    let mut sizes: Vec<_> = [1, 2, 15, 16, 17, 31, 33, 49]
        .into_iter()
        .flat_map(|m| small.map(|(h, i)| (m, h, i)))
        .collect();
    sizes.extend([(1, 33, 700), (3, 700, 33), (40, 33, 700), (97, 130, 150), (513, 5, 6)]);
    let amx = available().iter().find(|kernel| kernel.name == "amx");
    for (m, h, i) in sizes {
        let case = Case::new::<bf16>(ops()[m % ops().len()], h, i, m % 2 == 0);
        let x = Matrix::random::<bf16>(m, h, 1.0, 4);
        case.check_kernels::<bf16>(&x, [twin::kernels()]);
        if let Some(amx) = amx {
            let [soft, hard] =
                [twin::kernels(), amx].map(|kernel| run::<bf16>(&*case.layer::<bf16>(kernel), &x));
            assert_eq!(soft, hard, "(M, H, I) = ({m}, {h}, {i})");
        }
    }
}

/// Whatever a unit's padding rows hold, they reach no result; nor does a row's company.
#[test]
fn a_row_on_tiles_does_not_depend_on_its_company() {
    let (h, i) = (131, 67);
    let case = Case::new::<bf16>(silu(), h, i, true);
    let mut x = Matrix::random::<bf16>(70, h, 1.0, 4);
    let layer = case.layer::<bf16>(twin::kernels());
    let all = run::<bf16>(&*layer, &x);
    for range in [0..1, 1..18, 18..34, 34..70, 69..70] {
        let part = run::<bf16>(&*layer, &x.rows(range.clone()));
        assert_eq!(part, all[range.start * h..range.end * h], "rows {range:?}");
    }
    x.data[40 * h..41 * h].fill(f64::NAN);
    let with_nan = run::<bf16>(&*layer, &x);
    assert!(with_nan[40 * h..41 * h].iter().all(|y| y.is_nan()));
    assert_eq!(with_nan[..40 * h], all[..40 * h]);
    assert_eq!(with_nan[41 * h..], all[41 * h..]);
}

/// Bit for bit, also where the sum of products is not a normal number.
#[cfg(target_arch = "x86_64")]
#[test]
fn the_twin_computes_as_the_instructions() {
    use super::tiles::{NR, ROW_PANELS, TileArgs};
    let Some(hard) = super::isa::tiles() else { return };
    let soft = twin::tiles();
    let mut state = 7u64;
    let mut random = move || {
        state = state.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
        (state >> 33) as u32
    };
    // Any pattern; normal numbers of like size; products around the smallest normal number.
    let kinds: [fn(u32) -> u16; 4] = [
        |r| r as u16,
        |r| (r as u16 & 0x83ff) | 0x3c00,
        |r| (r as u16 & 0x81ff) | 0x1f80,
        |r| {
            if r % 97 == 0 {
                [0x7f80, 0xff80, 0x7fc1, 1, 0x8001][r as usize % 5]
            } else {
                (r as u16 & 0x83ff) | 0x3c00
            }
        },
    ];
    let (steps, panels, k) = (3, ROW_PANELS, 96);
    for case in 0..400 {
        let kind = kinds[case % kinds.len()];
        let height = 1 + case / 4 % 16;
        let a: Vec<u16> = (0..32 * k).map(|_| kind(random())).collect();
        let b: Vec<u16> = (0..panels * k * NR).map(|_| kind(random())).collect();
        let start: Vec<f32> = (0..panels * 32 * NR)
            .map(|_| if case % 3 == 0 { f32::from_bits(random() << 1) } else { 1.0 })
            .collect();
        let micros = [(soft.pair, hard.pair, 2, 1)]
            .into_iter()
            .chain([(soft.single, hard.single, 1, 1)])
            .chain((0..2).map(|i| (soft.sweep[i], hard.sweep[i], 1, i + 1)))
            .chain((height == 1).then_some((soft.row, hard.row, 1, ROW_PANELS)));
        for (soft, hard_micro, tiles, panels) in micros {
            let results = [(soft, false), (hard_micro, true)].map(|(micro, is_hard)| {
                let mut sums = start.clone();
                let args = TileArgs {
                    a: a.as_ptr().cast(),
                    a_stride: 2 * k,
                    b: b.as_ptr().cast(),
                    panel_stride: 2 * k * NR,
                    steps,
                    sums: sums.as_mut_ptr(),
                    sums_stride: 4 * height * NR,
                    height,
                    accumulate: case % 2 == 0,
                    prefetch: b.as_ptr().cast(),
                    lines: 2,
                    next_a: a.as_ptr().cast(),
                    next_sums: start.as_ptr(),
                };
                // SAFETY: the CPU has the instructions; A has 32 rows of k, B the panels, and the
                // sums have room for 2 tiles or 2 panels of 16 rows.
                unsafe {
                    let saved = is_hard.then(|| (hard.configure)(height));
                    micro(&args);
                    if let Some(saved) = saved {
                        (hard.restore)(&saved);
                    }
                }
                sums.into_iter().map(f32::to_bits).collect::<Vec<_>>()
            });
            assert_eq!(results[0], results[1], "case {case}, {tiles} tiles, {panels} panels");
        }
    }
}
