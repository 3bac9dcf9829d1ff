//! Every kernel the machine has, against the f64 definition and against each other.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};

use candle_core::{CpuStorage, Layout, Shape};
use half::{bf16, f16};

use super::threads::{self, Phase};
use super::{CpuKernels, available, gate_backward, gate_forward};
use crate::gate::activation::{Glu, GluActivation};
use crate::reference;

/// 2⁻²⁴: half a unit in the last place of an f32 in [1, 2).
const U: f64 = 1.0 / (1 << 24) as f64;

fn activations() -> impl Iterator<Item = GluActivation> {
    GluActivation::ALL.iter().flat_map(|&activation| match activation {
        GluActivation::Swish { .. } => vec![activation, GluActivation::Swish { beta: -0.5 }],
        other => vec![other],
    })
}

pub(super) fn ops() -> Vec<Glu> {
    let plain = activations().map(Glu::new);
    let gpt_oss =
        Glu::new(GluActivation::Swish { beta: 1.702 }).with_limit(7.0).with_up_offset(1.0);
    let falcon = Glu::new(GluActivation::Silu).with_gate_multiplier(0.6875);
    plain.chain([gpt_oss, falcon]).collect()
}

/// The documented relative error of act(g), in units of 2⁻²⁴.
pub(super) fn activation_bound(activation: GluActivation, g: f64) -> f64 {
    match activation {
        GluActivation::Silu | GluActivation::Sigmoid => 6.0,
        GluActivation::Swish { beta } => 6.0 + (f64::from(beta) * g).abs(),
        GluActivation::Relu | GluActivation::Identity => 0.0,
        GluActivation::Relu2 => 1.0,
        GluActivation::Gelu => 12.0,
        GluActivation::GeluTanh => 6.0 + 4.0 * (1.596 * g + 0.07136 * g * g * g).abs(),
    }
}

/// Numbers from every binade that matters, both signs, with ragged mantissas; deterministic.
fn numbers(n: usize, seed: u64, largest_exponent: i32) -> Vec<f32> {
    let mut state = seed;
    let mut next = || {
        state = state.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
        (state >> 33) as u32
    };
    let number = |bits: u32, exponent: i32| {
        (1.0 + (bits & 0xfffff) as f32 / 1048576.0) * 2f32.powi(exponent)
    };
    (0..n)
        .map(|_| {
            let exponent = -20 + (next() % (largest_exponent as u32 + 20)) as i32;
            let sign = if next() % 2 == 0 { 1.0 } else { -1.0 };
            sign * number(next(), exponent)
        })
        .collect()
}

fn contiguous(n: usize) -> Layout {
    Layout::contiguous(Shape::from(n))
}

fn run_f32(kernel: &CpuKernels, op: &Glu, gate: &[f32], up: &[f32]) -> Vec<f32> {
    let layout = contiguous(gate.len());
    let (g, u) = (CpuStorage::F32(gate.to_vec()), CpuStorage::F32(up.to_vec()));
    match gate_forward(kernel, op, (&g, &layout), (&u, &layout)) {
        Ok(CpuStorage::F32(out)) => out,
        other => panic!("{other:?}"),
    }
}

#[test]
fn every_promised_kernel_is_there() {
    let names: Vec<&str> = available().iter().map(|kernel| kernel.name).collect();
    #[cfg(target_arch = "x86_64")]
    {
        let has = |name| names.contains(&name);
        assert_eq!(has("amx"), super::isa::tiles().is_some() && has("avx512"));
        assert_eq!(
            has("avx512bf16"),
            is_x86_feature_detected!("avx512bf16") && is_x86_feature_detected!("avx512bw")
        );
        assert_eq!(
            has("avx512"),
            is_x86_feature_detected!("avx512bw") && is_x86_feature_detected!("avx512dq")
        );
        assert_eq!(
            has("avx2"),
            is_x86_feature_detected!("avx2") && is_x86_feature_detected!("f16c")
        );
    }
    #[cfg(target_arch = "aarch64")]
    {
        let has = |name| names.contains(&name);
        assert_eq!(has("neonbf16"), std::arch::is_aarch64_feature_detected!("bf16"));
        assert_eq!(has("neon"), std::arch::is_aarch64_feature_detected!("neon"));
    }
    assert_eq!(names.last(), Some(&"scalar"));
}

/// Where σ or Φ is denormal its error is absolute, about one 2⁻¹⁴⁹, which the products with g and
/// up then scale.
fn denormal(gate: f64, up: f64) -> f64 {
    2f64.powi(-149) * (2.0 + gate.abs()) * (1.0 + up.abs())
}

/// act(g) alone: up = 1, so that the product adds nothing.
#[test]
fn activations_meet_their_bounds_in_f32() {
    let gate: Vec<f32> =
        numbers(40_000, 1, 6).into_iter().chain((-4000..4000).map(|i| i as f32 / 37.0)).collect();
    let up = vec![1.0; gate.len()];
    for kernel in available() {
        for activation in activations() {
            let out = run_f32(kernel, &Glu::new(activation), &gate, &up);
            let mut worst = 0f64;
            for (&g, &y) in gate.iter().zip(&out) {
                let exact = reference::activation(activation, f64::from(g)).0;
                let bound = activation_bound(activation, f64::from(g)) * U * exact.abs()
                    + denormal(f64::from(g), 1.0);
                let error = (f64::from(y) - exact).abs();
                worst = worst.max(error / bound);
                assert!(
                    error <= bound,
                    "{} {activation}({g}) = {y}, exact {exact}, {} u",
                    kernel.name,
                    error / exact.abs() / U
                );
            }
            eprintln!("{} {activation}: {worst:.2} of the bound", kernel.name);
        }
    }
}

/// The documented error: the activation's, and one rounding of the product. The modifiers round
/// m·gate and up + c before.
fn product_bound(op: &Glu, gate: f64, exact: f64, half_ulp: f64) -> f64 {
    let g = gate * f64::from(op.gate_multiplier);
    let modifiers = if op.is_plain() { 0.0 } else { 3.0 + 2.0 * g.abs() };
    exact.abs() * (half_ulp + (activation_bound(op.activation, g) + modifiers) * U)
}

macro_rules! product_test {
    ($name:ident, $dtype:ty, $variant:ident, $half_ulp:expr, $smallest:expr) => {
        #[test]
        fn $name() {
            for n in [0, 1, 2, 7, 8, 9, 15, 16, 17, 31, 32, 33, 100, 4096, 70_001] {
                let (gate, up) = (numbers(n, 3, 5), numbers(n, 4, 4));
                let [gate, up]: [Vec<$dtype>; 2] = [gate, up].map(|v| {
                    v.into_iter().map(|x| <$dtype as num_like::From32>::from32(x)).collect()
                });
                let layout = contiguous(n);
                let (g, u) = (CpuStorage::$variant(gate.clone()), CpuStorage::$variant(up.clone()));
                for kernel in available() {
                    for op in ops() {
                        let Ok(CpuStorage::$variant(out)) =
                            gate_forward(kernel, &op, (&g, &layout), (&u, &layout))
                        else {
                            panic!("{}", kernel.name)
                        };
                        assert_eq!(out.len(), n);
                        for i in 0..n {
                            let exact = reference::glu(&op, f64::from(gate[i]), f64::from(up[i]));
                            let bound = product_bound(&op, f64::from(gate[i]), exact, $half_ulp)
                                + $smallest
                                + denormal(f64::from(gate[i]), f64::from(up[i]));
                            let error = (f64::from(out[i]) - exact).abs();
                            assert!(
                                error <= bound,
                                "{} {op:?} {} {}: {} for {exact}",
                                kernel.name,
                                gate[i],
                                up[i],
                                out[i]
                            );
                        }
                    }
                }
            }
        }
    };
}

mod num_like {
    pub(super) trait From32 {
        fn from32(x: f32) -> Self;
    }
    impl From32 for f32 {
        fn from32(x: f32) -> Self {
            x
        }
    }
    impl From32 for f64 {
        fn from32(x: f32) -> Self {
            f64::from(x) + 1e-9
        }
    }
    impl From32 for half::bf16 {
        fn from32(x: f32) -> Self {
            half::bf16::from_f32(x)
        }
    }
    impl From32 for half::f16 {
        fn from32(x: f32) -> Self {
            half::f16::from_f32(x)
        }
    }
}

product_test!(products_in_f32, f32, F32, U, 2f64.powi(-148));
product_test!(products_in_bf16, bf16, BF16, 2f64.powi(-8), 2f64.powi(-134));
product_test!(products_in_f16, f16, F16, 2f64.powi(-11), 2f64.powi(-25));
product_test!(products_in_f64, f64, F64, 0.0, 0.0);

#[test]
fn all_kernels_give_the_same_bits() {
    let special = [
        0.0,
        -0.0,
        f32::INFINITY,
        f32::NEG_INFINITY,
        f32::NAN,
        f32::MAX,
        f32::MIN,
        1e-40,
        -1e-40,
        -88.8,
        -104.0,
    ];
    let mut gate = numbers(5000, 7, 8);
    let mut up = numbers(5000, 8, 8);
    for g in special {
        for u in special {
            gate.push(g);
            up.push(u);
        }
    }
    let dy = numbers(gate.len(), 9, 3);
    let bits = |kernel: &CpuKernels, op: &Glu| {
        let layout = contiguous(gate.len());
        let storage = |v: &[f32]| CpuStorage::F32(v.to_vec());
        let (g, u, d) = (storage(&gate), storage(&up), storage(&dy));
        let mut all = run_f32(kernel, op, &gate, &up);
        let Ok(CpuStorage::F32(gradients)) =
            gate_backward(kernel, op, [(&g, &layout), (&u, &layout), (&d, &layout)])
        else {
            panic!("{}", kernel.name)
        };
        all.extend(gradients);
        // Which NaN it is may differ.
        all.into_iter()
            .map(|x| if x.is_nan() { f32::NAN.to_bits() } else { x.to_bits() })
            .collect::<Vec<_>>()
    };
    // FNV-1a over all of them, the same on every machine: every operation is a correctly rounded
    // one. An activation that is added later has a digest of its own.
    let mut digests = [0xcbf2_9ce4_8422_2325u64; 2];
    for op in ops() {
        let first = bits(&available()[0], &op);
        let digest = &mut digests[usize::from(op.activation == GluActivation::Relu2)];
        *digest = first
            .iter()
            .fold(*digest, |hash, &word| (hash ^ u64::from(word)).wrapping_mul(0x100_0000_01b3));
        for kernel in &available()[1..] {
            let other = bits(kernel, &op);
            let n = gate.len();
            for i in 0..first.len() {
                let at =
                    (gate[i % n], up[i % n], f32::from_bits(first[i]), f32::from_bits(other[i]));
                assert_eq!(first[i], other[i], "{} {op:?} at {i}: {at:?}", kernel.name);
            }
        }
    }
    assert_eq!(
        digests,
        [0xf6c9_253a_567a_be82, 0xb303_36f8_ebcd_2d54],
        "not the bits of other machines: {digests:#x?}"
    );
}

/// Products of two halves are exact in f32, so the store's rounding alone is tested: ties,
/// overflow, denormals, NaN.
macro_rules! rounding_test {
    ($name:ident, $dtype:ty, $variant:ident) => {
        #[test]
        fn $name() {
            let gate: Vec<$dtype> = (0..=u16::MAX).map(<$dtype>::from_bits).collect();
            let layout = contiguous(gate.len());
            let op = Glu::new(GluActivation::Identity);
            for factor in [1.0, 3.0, -0.7, 1e-3, 300.0] {
                let factor = <$dtype>::from_f32(factor);
                let (g, u) = (
                    CpuStorage::$variant(gate.clone()),
                    CpuStorage::$variant(vec![factor; gate.len()]),
                );
                for kernel in available() {
                    let Ok(CpuStorage::$variant(out)) =
                        gate_forward(kernel, &op, (&g, &layout), (&u, &layout))
                    else {
                        panic!("{}", kernel.name)
                    };
                    for (x, y) in gate.iter().zip(&out) {
                        let exact = <$dtype>::from_f32(x.to_f32() * factor.to_f32());
                        let same = y.to_bits() == exact.to_bits() || (y.is_nan() && exact.is_nan());
                        assert!(same, "{} {x} * {factor} = {y}, expected {exact}", kernel.name);
                    }
                }
            }
        }
    };
}

rounding_test!(bf16_rounds_to_nearest_even, bf16, BF16);
rounding_test!(f16_rounds_to_nearest_even, f16, F16);

#[test]
fn special_values_follow_the_definition() {
    let special = [
        0.0,
        -0.0,
        f32::INFINITY,
        f32::NEG_INFINITY,
        f32::NAN,
        f32::MAX,
        f32::MIN,
        -100.0,
        -89.0,
        89.0,
        1e-30,
        -1e-30,
    ];
    let pairs: Vec<(f32, f32)> = special
        .iter()
        .flat_map(|&g| [1.0, -2.0, 0.0, f32::INFINITY, f32::NAN].map(|u| (g, u)))
        .collect();
    let (gate, up): (Vec<f32>, Vec<f32>) = pairs.into_iter().unzip();
    for kernel in available() {
        for op in ops() {
            for (i, &y) in run_f32(kernel, &op, &gate, &up).iter().enumerate() {
                let exact = reference::glu(&op, f64::from(gate[i]), f64::from(up[i])) as f32;
                let same = y == exact
                    || (y.is_nan() && exact.is_nan())
                    || (y - exact).abs() <= exact.abs() * 1e-4 + denormal(100.0, 2.0) as f32;
                // In f32, act(g) has vanished where in f64 it has not: 0·∞ is then NaN here and ∞
                // there.
                let vanished = up[i].is_infinite() && y.is_nan() && gate[i] < -88.0;
                // Likewise a square that is below or above the numbers of f32.
                let act = reference::activation(op.activation, f64::from(gate[i])).0;
                let beyond = act.is_finite()
                    && act != 0.0
                    && (act as f32 == 0.0 || (act as f32).is_infinite());
                let vanished =
                    vanished || (beyond && y.is_nan() && (up[i] == 0.0 || up[i].is_infinite()));
                assert!(
                    same || vanished,
                    "{} {op:?} {} {}: {y}, expected {exact}",
                    kernel.name,
                    gate[i],
                    up[i]
                );
            }
        }
        let tail = run_f32(kernel, &Glu::new(GluActivation::Silu), &[f32::NEG_INFINITY], &[1.0]);
        assert!(tail[0] == 0.0 && tail[0].is_sign_negative());
    }
}

#[test]
fn gradients_meet_the_definition() {
    let n = 3001;
    let [gate, up, dy] =
        [(11, 4), (12, 3), (13, 3)].map(|(seed, exponent)| numbers(n, seed, exponent));
    let layout = contiguous(n);
    let storages = [&gate, &up, &dy].map(|v| CpuStorage::F32(v.clone()));
    for kernel in available() {
        for op in ops() {
            let inputs = [0, 1, 2].map(|i| (&storages[i], &layout));
            let Ok(CpuStorage::F32(out)) = gate_backward(kernel, &op, inputs) else {
                panic!("{}", kernel.name)
            };
            for i in 0..n {
                let [g, u, d] = [gate[i], up[i], dy[i]].map(f64::from);
                let (dgate, dup) = reference::glu_grad(&op, g, u, d);
                // act' is a sum of terms of size up to 1 + |g|, each within the activation's error:
                // absolute, not relative.
                let bound = (activation_bound(op.activation, g.clamp(-12.0, 12.0)) + 8.0) * U;
                let steepest = reference::activation(op.activation, g).1.abs().max(1.2);
                let gate_scale = d.abs() * (u.abs() + f64::from(op.up_offset)) * steepest;
                assert!(
                    (f64::from(out[i]) - dgate).abs() <= 2.0 * bound * gate_scale,
                    "{} {op:?} dgate {g} {u} {d}: {} {dgate}",
                    kernel.name,
                    out[i]
                );
                let up_bound = product_bound(&op, g, dup, U) + denormal(g, d);
                assert!(
                    (f64::from(out[n + i]) - dup).abs() <= up_bound,
                    "{} {op:?} dup {g} {d}",
                    kernel.name
                );
            }
        }
    }
}

/// Operands as candle lays them out: transposed, interleaved, halves of a packed row, broadcast
/// along either dimension.
#[test]
fn any_layout_gives_what_a_copy_gives() {
    let (m, i) = (37, 130);
    let data = numbers(2 * m * i, 21, 3);
    let storage = CpuStorage::F32(data.clone());
    let shape = Shape::from((m, i));
    let layouts = [
        Layout::contiguous_with_offset((m, i), 5),
        Layout::new(shape.clone(), vec![2 * i, 1], i),
        Layout::new(shape.clone(), vec![2 * i, 2], 1),
        Layout::new(shape.clone(), vec![1, m], 3),
        Layout::new(shape.clone(), vec![0, 1], 9),
        Layout::new(shape.clone(), vec![1, 0], 9),
        Layout::new(shape, vec![0, 0], 2),
    ];
    let copy = |layout: &Layout| -> Vec<f32> {
        let (s, o) = (layout.stride(), layout.start_offset());
        (0..m * i).map(|k| data[o + k / i * s[0] + k % i * s[1]]).collect()
    };
    for kernel in available() {
        for gate in &layouts {
            for up in &layouts {
                let op = Glu::new(GluActivation::Silu);
                let Ok(CpuStorage::F32(out)) =
                    gate_forward(kernel, &op, (&storage, gate), (&storage, up))
                else {
                    panic!()
                };
                assert_eq!(
                    out,
                    run_f32(kernel, &op, &copy(gate), &copy(up)),
                    "{} {gate:?} {up:?}",
                    kernel.name
                );
            }
        }
    }
}

#[test]
fn threads_claim_every_unit_once_and_in_order() {
    for units in [0, 1, 2, 7, 8, 100, 1025] {
        let (phase, claimed) = (Phase::new(units), Mutex::new(vec![0; units]));
        threads::run(|_| {
            let mut at = 0;
            phase.work(|unit, next| {
                assert!(unit >= at && next > unit, "{unit} after {at}, then {next}");
                at = unit + 1;
                claimed.lock().unwrap()[unit] += 1;
            });
            phase.wait();
            assert_eq!(claimed.lock().unwrap().iter().sum::<usize>(), units);
        });
        assert!(claimed.into_inner().unwrap().iter().all(|&n| n == 1));
    }
}

#[test]
fn a_panic_within_a_unit_reaches_the_caller_and_the_next_call_works() {
    for _ in 0..20 {
        let phase = Phase::new(100);
        let panics = || {
            threads::run(|_| phase.work(|unit, _| assert!(unit != 50, "unit 50")));
        };
        let payload = std::panic::catch_unwind(std::panic::AssertUnwindSafe(panics)).unwrap_err();
        assert!(payload.downcast_ref::<&str>() == Some(&"unit 50"));
        let (phase, done) = (Phase::new(100), AtomicUsize::new(0));
        threads::run(|_| phase.work(|_, _| _ = done.fetch_add(1, Ordering::Relaxed)));
        assert_eq!(done.into_inner(), 100);
    }
}

/// A call within a call, and calls at the same time, complete without the workers.
#[test]
fn calls_need_no_worker() {
    let done = AtomicUsize::new(0);
    let call = || {
        let phase = Phase::new(10);
        threads::run(|_| phase.work(|_, _| _ = done.fetch_add(1, Ordering::Relaxed)));
    };
    let outer = Phase::new(7);
    threads::run(|_| outer.work(|_, _| call()));
    assert_eq!(done.load(Ordering::Relaxed), 70);
    std::thread::scope(|scope| {
        for _ in 0..8 {
            scope.spawn(|| (0..100).for_each(|_| call()));
        }
    });
    assert_eq!(done.into_inner(), 8070);
}

#[test]
fn chunks_partition_the_range() {
    for n in [0, 1, 2, 15, 16, 17, 1000] {
        let hits: Vec<AtomicUsize> = (0..n).map(|_| AtomicUsize::new(0)).collect();
        threads::run_chunked(n, |range| {
            for hit in &hits[range] {
                hit.fetch_add(1, Ordering::Relaxed);
            }
        });
        assert!(hits.into_iter().all(|hit| hit.into_inner() == 1), "{n}");
    }
}
