//! Every kernel, with the tuning of both CPU families, and tiles in software. Small integers make
//! every sum exact, so each result is compared bit by bit with integer arithmetic, rounded once.
#![allow(clippy::unwrap_used)]

use candle_core::{CpuStorage, Layout, Shape, WithDType};
use half::{bf16, f16};

use super::{BlockOperands, BlockWanted, LinearWanted, Operand, Trained, WeightOperand};
use crate::cpu::block_tests::every_kernel;
use crate::cpu::kernels::CpuKernels;
use crate::cpu::twin;
use crate::gate::activation::{Glu, GluActivation};

/// A matrix (rows, columns) of integers.
#[derive(Clone)]
pub(super) struct Integers {
    pub(super) rows: usize,
    pub(super) columns: usize,
    pub(super) values: Vec<i64>,
}

impl Integers {
    /// -1, 0 and 1, of which one in `sparsity` is not 0.
    pub(super) fn new((rows, columns): (usize, usize), sparsity: u64, seed: &mut u64) -> Self {
        let mut value = || {
            *seed = seed.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
            let bits = *seed >> 33;
            if bits.is_multiple_of(sparsity) { [-1, 1][(bits >> 20) as usize % 2] } else { 0 }
        };
        let values = (0..rows * columns).map(|_| value()).collect();
        Self { rows, columns, values }
    }

    pub(super) fn at(&self, row: usize, column: usize) -> i64 {
        self.values[row * self.columns + column]
    }

    pub(super) fn transposed(&self) -> Self {
        let at = |i| self.at(i % self.rows, i / self.rows);
        let values = (0..self.values.len()).map(at).collect();
        Self { rows: self.columns, columns: self.rows, values }
    }

    /// self · other
    pub(super) fn times(&self, other: &Self) -> Self {
        let mut values = vec![0; self.rows * other.columns];
        for (row, sums) in values.chunks_exact_mut(other.columns).enumerate() {
            for k in (0..self.columns).filter(|&k| self.at(row, k) != 0) {
                let factor = self.at(row, k);
                sums.iter_mut().enumerate().for_each(|(c, sum)| *sum += factor * other.at(k, c));
            }
        }
        Self { rows: self.rows, columns: other.columns, values }
    }

    pub(super) fn zip(&self, other: &Self, f: impl Fn(i64, i64) -> i64) -> Self {
        let values = self.values.iter().zip(&other.values).map(|(&a, &b)| f(a, b)).collect();
        Self { values, ..*self }
    }

    pub(super) fn storage<T: WithDType>(&self) -> (CpuStorage, Layout) {
        let shape = Shape::from((self.rows, self.columns));
        (T::to_cpu_storage_owned(self.rounded::<T>()), Layout::contiguous(shape))
    }

    pub(super) fn rounded<T: WithDType>(&self) -> Vec<T> {
        self.values.iter().map(|&value| T::from_f64(value as f64)).collect()
    }

    fn column_sums(&self) -> Vec<f32> {
        let sum = |column| (0..self.rows).map(|row| self.at(row, column)).sum::<i64>() as f32;
        (0..self.columns).map(sum).collect()
    }
}

pub(super) fn operand((storage, layout): &(CpuStorage, Layout)) -> Operand<'_> {
    (storage, layout)
}

pub(super) fn kernels() -> impl Iterator<Item = &'static CpuKernels> {
    every_kernel().iter().chain([twin::kernels()])
}

/// ReGLU: gate and up are integers, and so is every gradient.
fn block<T: Trained + PartialEq>((h, i): (usize, usize), rows: usize) {
    let mut seed = (h * 1000 + i + rows) as u64;
    let mut new = |shape, sparsity| Integers::new(shape, sparsity, &mut seed);
    let sparsity = 9.max(h as u64 / 10);
    let weights = [(i, h), (i, h), (h, i)].map(|shape| new(shape, sparsity));
    let (x, dy) = (new((rows, h), 2), new((rows, h), 2));
    let [gate_weight, up_weight, down_weight] = &weights;
    let (gate, up) = (x.times(&gate_weight.transposed()), x.times(&up_weight.transposed()));
    let dh = dy.times(down_weight);
    let relu = |gate: i64| gate.max(0);
    let hidden = gate.zip(&up, |gate, up| relu(gate) * up);
    let dgate = gate.zip(&up.zip(&dh, |up, dh| up * dh), |gate, d| if gate > 0 { d } else { 0 });
    let dup = gate.zip(&dh, |gate, dh| relu(gate) * dh);
    assert!(
        [&hidden, &dgate, &dup].iter().all(|m| m.values.iter().all(|value| value.abs() <= 256)),
        "rounded to 16 bits they would not be exact"
    );
    let dx = dgate.times(gate_weight).zip(&dup.times(up_weight), |a, b| a + b);
    let y = hidden.times(&down_weight.transposed());
    let expected =
        [dgate.transposed().times(&x), dup.transposed().times(&x), dy.transposed().times(&hidden)];

    let storages = weights.each_ref().map(Integers::storage::<T>);
    let (x, dy_storage) = (x.storage::<T>(), dy.storage::<T>());
    let operands = BlockOperands {
        glu: Glu::new(GluActivation::Relu),
        down_multiplier: 1.0,
        weights: storages.each_ref().map(|storage| WeightOperand::Tensor(operand(storage))),
        biases: [None; 3],
        low_rank: [None; 2],
    };
    let wanted =
        BlockWanted { x: true, weights: [true; 3], biases: [true; 3], ..BlockWanted::default() };
    for (kernel, save) in kernels().flat_map(|kernel| [(kernel, false), (kernel, true)]) {
        let case = format!("{} {:?} ({h}, {i}) {rows} rows, saved {save}", kernel.name, T::DTYPE);
        let (found, saved) = T::block_forward(kernel, operands, operand(&x), save).unwrap();
        assert!(found == y.rounded::<T>(), "{case}: y");
        let both = [operand(&x), operand(&dy_storage)];
        let found = T::block_backward(kernel, operands, both, &saved, &wanted).unwrap();
        assert!(found.x.unwrap() == dx.rounded::<T>(), "{case}: dx");
        for (which, (found, expected)) in found.weights.into_iter().zip(&expected).enumerate() {
            assert!(found.unwrap().data == expected.rounded::<T>(), "{case}: weight {which}");
        }
        let biases = [&dgate, &dup, &dy].map(|d| Some(d.column_sums()));
        assert!(found.biases == biases, "{case}: biases");
    }
}

fn linear<T: Trained + PartialEq>((out, k): (usize, usize), rows: usize) {
    let mut seed = (out * 1000 + k + rows) as u64;
    let mut new = |shape| Integers::new(shape, 3, &mut seed);
    let (weight, x, dy) = (new((out, k)), new((rows, k)), new((rows, out)));
    let y = x.times(&weight.transposed());
    let (dx, dw) = (dy.times(&weight), dy.transposed().times(&x));
    let [weight, x_storage, dy_storage] = [&weight, &x, &dy].map(Integers::storage::<T>);
    let wanted = LinearWanted { x: true, weight: true, bias: true };
    let weight = WeightOperand::Tensor(operand(&weight));
    for kernel in kernels() {
        let case = format!("{} {:?} ({out}, {k}) {rows} rows", kernel.name, T::DTYPE);
        let found = T::linear_forward(kernel, weight, None, operand(&x_storage)).unwrap();
        assert!(found == y.rounded::<T>(), "{case}: y");
        let both = [operand(&x_storage), operand(&dy_storage)];
        let found = T::linear_backward(kernel, weight, both, wanted).unwrap();
        assert!(found.x.unwrap() == dx.rounded::<T>(), "{case}: dx");
        assert!(found.weight.unwrap() == dw.rounded::<T>(), "{case}: dW");
        assert!(found.bias.unwrap() == dy.column_sums(), "{case}: db");
    }
}

/// Sizes of one element, of whole panels, and beside the edges of panels, of units' row blocks and
/// of packed k-blocks; rows within a unit, within a chunk and in several chunks.
const CASES: [((usize, usize), usize); 7] = [
    ((1, 1), 1),
    ((64, 128), 32),
    ((33, 65), 2),
    ((31, 97), 47),
    ((7, 530), 5),
    ((1100, 40), 3),
    ((20, 70), 1030),
];

#[test]
fn blocks_are_exact_on_integers() {
    for (sizes, rows) in CASES {
        block::<f32>(sizes, rows);
        block::<bf16>(sizes, rows);
        block::<f16>(sizes, rows);
    }
}

#[test]
fn linear_layers_are_exact_on_integers() {
    for (sizes, rows) in CASES {
        linear::<f32>(sizes, rows);
        linear::<bf16>(sizes, rows);
        linear::<f16>(sizes, rows);
    }
}
