//! Packed blocks with low-rank addends and dropout, under every kernel and tiles in software.
//! Integers make every sum exact (`tests.rs`).
#![allow(clippy::unwrap_used)]

use candle_core::DType;
use half::{bf16, f16};

use super::tests::{Integers, kernels, operand};
use super::{
    BlockOperands, BlockWanted, Dropout, LowRankGradients, LowRankOperands, Trained, WeightOperand,
};
use crate::cpu::{self, CpuKernels};
use crate::gate::activation::{Glu, GluActivation};
use crate::which::Which;

/// The matrices of a case, and what is expected of it.
struct Case {
    weights: [Integers; 3],
    /// A of gate and up, and of down.
    a: [Integers; 2],
    /// B of gate, up and down.
    b: [Integers; 3],
    x: Integers,
    dy: Integers,
    dropouts: [Option<Dropout>; 2],
    y: Integers,
    dx: Integers,
    da: [Integers; 2],
    db: [Integers; 3],
}

fn plus(a: &Integers, b: &Integers) -> Integers {
    a.zip(b, |a, b| a + b)
}

/// Elements that the mask drops become 0.
fn drop(matrix: &Integers, dropout: Option<Dropout>) -> Integers {
    let mut dropped = matrix.clone();
    for (i, value) in dropped.values.iter_mut().enumerate() {
        let (row, column) = (i / matrix.columns, i % matrix.columns);
        if dropout.is_some_and(|dropout| !dropout.keeps(row, column)) {
            *value = 0;
        }
    }
    dropped
}

impl Case {
    fn new((h, i): (usize, usize), [r, r_down]: [usize; 2], rows: usize, probability: f32) -> Self {
        let mut seed = (h * 1000 + i + rows + r) as u64;
        let mut new = |shape, sparsity| Integers::new(shape, sparsity, &mut seed);
        let sparsity = 12.max(h as u64 / 8);
        let weights = [(i, h), (i, h), (h, i)].map(|shape| new(shape, sparsity));
        let a = [new((r, h), sparsity), new((r_down, i), 3 * sparsity)];
        let b = [new((i, r), 9), new((i, r), 9), new((h, r_down), 9)];
        let (x, dy) = (new((rows, h), 2), new((rows, h), 2));
        let dropout = |seed| (probability > 0.0).then_some(Dropout { seed, probability });
        let dropouts = [dropout(1), dropout(2)];

        let dropped_x = drop(&x, dropouts[0]);
        let u = dropped_x.times(&a[0].transposed());
        let gate = plus(&x.times(&weights[0].transposed()), &u.times(&b[0].transposed()));
        let up = plus(&x.times(&weights[1].transposed()), &u.times(&b[1].transposed()));
        let hidden = gate.zip(&up, |gate, up| gate.max(0) * up);
        let dropped_h = drop(&hidden, dropouts[1]);
        let u_down = dropped_h.times(&a[1].transposed());
        let y = plus(&hidden.times(&weights[2].transposed()), &u_down.times(&b[2].transposed()));
        let du_down = dy.times(&b[2]);
        let dh = plus(&dy.times(&weights[2]), &drop(&du_down.times(&a[1]), dropouts[1]));
        let up_dh = up.zip(&dh, |up, dh| up * dh);
        let dgate = gate.zip(&up_dh, |gate, d| if gate > 0 { d } else { 0 });
        let dup = gate.zip(&dh, |gate, dh| gate.max(0) * dh);
        let du = plus(&dgate.times(&b[0]), &dup.times(&b[1]));
        for (name, matrix) in [
            ("u", &u),
            ("h", &hidden),
            ("u_down", &u_down),
            ("du_down", &du_down),
            ("dgate", &dgate),
            ("dup", &dup),
            ("du", &du),
        ] {
            let largest = matrix.values.iter().map(|value| value.abs()).max().unwrap_or(0);
            assert!(largest <= 256, "{name} {largest}: rounded to 16 bits it would not be exact");
        }
        let of_base = plus(&dgate.times(&weights[0]), &dup.times(&weights[1]));
        Self {
            dx: plus(&of_base, &drop(&du.times(&a[0]), dropouts[0])),
            da: [du.transposed().times(&dropped_x), du_down.transposed().times(&dropped_h)],
            db: [
                dgate.transposed().times(&u),
                dup.transposed().times(&u),
                dy.transposed().times(&u_down),
            ],
            weights,
            a,
            b,
            x,
            dy,
            dropouts,
            y,
        }
    }

    fn check<T: Trained + PartialEq>(&self, kernel: &'static CpuKernels, save: bool) {
        let (h, i, rows) = (self.x.columns, self.weights[0].rows, self.x.rows);
        let dropped = self.dropouts[0].is_some();
        let case = format!(
            "{} {:?} ({h}, {i}) {rows} rows, rank {}, saved {save}, dropped {dropped}",
            kernel.name,
            T::DTYPE,
            self.a[0].rows
        );
        let glu = Glu::new(GluActivation::Relu);
        let mut layer = cpu::block(kernel, T::DTYPE, (h, i), glu, 1.0).unwrap();
        for (which, weight) in Which::ALL.into_iter().zip(&self.weights) {
            let (storage, layout) = weight.storage::<T>();
            layer.set_weight(which, &storage, &layout).unwrap();
        }
        let a = self.a.each_ref().map(Integers::storage::<T>);
        let b = self.b.each_ref().map(Integers::storage::<T>);
        let b = b.each_ref().map(operand);
        let (x, dy) = (self.x.storage::<T>(), self.dy.storage::<T>());
        let addend = |which: usize, b| {
            let (a, dropout) = (operand(&a[which]), self.dropouts[which]);
            Some(LowRankOperands { a, b, dropout })
        };
        let block = BlockOperands {
            glu,
            down_multiplier: 1.0,
            weights: layer.matrices().map(WeightOperand::Packed),
            biases: [None; 3],
            low_rank: [addend(0, &b[..2]), addend(1, &b[2..])],
        };
        let wanted = BlockWanted { x: true, low_rank: [true; 2], ..BlockWanted::default() };
        let (found, saved) = T::block_forward(kernel, block, operand(&x), save).unwrap();
        assert!(found == self.y.rounded::<T>(), "{case}: y");
        let both = [operand(&x), operand(&dy)];
        let found = T::block_backward(kernel, block, both, &saved, &wanted).unwrap();
        assert!(found.x.unwrap() == self.dx.rounded::<T>(), "{case}: dx");
        let [gate_up, down] = found.low_rank.map(Option::unwrap);
        let same = |found: LowRankGradients, da: &Integers, db: &[Integers]| {
            assert!(found.a == da.rounded::<f32>(), "{case}: dA");
            for (found, expected) in found.b.iter().zip(db) {
                assert!(*found == expected.rounded::<f32>(), "{case}: dB");
            }
        };
        same(gate_up, &self.da[0], &self.db[..2]);
        same(down, &self.da[1], &self.db[2..]);
        if !dropped {
            let low_rank =
                [layer.low_rank(operand(&a[0]), &b[..2]), layer.low_rank(operand(&a[1]), &b[2..])];
            let low_rank = low_rank.map(Result::unwrap);
            let found = layer.forward(operand(&x), low_rank.each_ref().map(Some)).unwrap();
            let found = T::cpu_storage_as_slice(&found).unwrap();
            assert!(found == self.y.rounded::<T>(), "{case}: y of the packed pass");
        }
    }
}

#[test]
fn low_rank_blocks_are_exact_on_integers() {
    let dtypes = [DType::F32, DType::BF16, DType::F16];
    for (sizes, ranks, rows) in [
        ((1, 1), [1, 1], 1),
        ((64, 128), [32, 16], 32),
        ((33, 65), [3, 5], 2),
        ((31, 97), [40, 33], 47),
        ((7, 530), [2, 130], 5),
        ((300, 40), [70, 1], 3),
        ((20, 70), [6, 7], 1030),
    ] {
        for probability in [0.0, 0.5] {
            let case = Case::new(sizes, ranks, rows, probability);
            for (kernel, save) in kernels().flat_map(|kernel| [(kernel, false), (kernel, true)]) {
                for dtype in dtypes {
                    match dtype {
                        DType::F32 => case.check::<f32>(kernel, save),
                        DType::BF16 => case.check::<bf16>(kernel, save),
                        _ => case.check::<f16>(kernel, save),
                    }
                }
            }
        }
    }
}
