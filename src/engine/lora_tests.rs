//! Low-rank pairs on the CPU kernels against f64.

use candle_core::{DType, Device, Result, Tensor, Var};

use super::adapted::{self, Pairs};
use super::{Block, BlockSpec, build_block};
use crate::gate::activation::{Glu, GluActivation};
use crate::load::{GateUp, Weights};
use crate::lora::Lora;
use std::sync::Arc;

const CPU: &Device = &Device::Cpu;
const H: usize = 41;
const I: usize = 75;

fn spec() -> BlockSpec {
    let glu = Glu::new(GluActivation::Silu);
    BlockSpec { hidden_size: H, intermediate_size: I, glu, down_multiplier: 0.75 }
}

/// Normal numbers times `scale`, rounded to `dtype`, and the same in f64.
fn normal(shape: (usize, usize), scale: f64, dtype: DType) -> Result<[Tensor; 2]> {
    let rounded = (Tensor::randn(0f32, 1.0, shape, CPU)? * scale)?.to_dtype(dtype)?;
    Ok([rounded.clone(), rounded.to_dtype(DType::F64)?])
}

struct Case {
    block: Arc<dyn Block>,
    /// The same weights in f64.
    wide: Arc<dyn Block>,
    pairs: Pairs,
    wide_pairs: Pairs,
}

fn case(dtype: DType, pair_dtype: DType, ranks: [usize; 3], dropout: f32) -> Result<Case> {
    let [gate, gate64] = normal((I, H), 0.2, dtype)?;
    let [up, up64] = normal((I, H), 0.2, dtype)?;
    let [down, down64] = normal((H, I), 0.2, dtype)?;
    let weights = |gate, up, down| Weights::new(GateUp::separate(gate, up, None, None), down, None);
    let block = build_block(&spec(), weights(gate, up, down))?;
    let wide = build_block(&spec(), weights(gate64, up64, down64))?;
    let (mut pairs, mut wide_pairs) = ([None, None, None], [None, None, None]);
    for (i, r) in ranks.into_iter().enumerate().filter(|(_, r)| *r > 0) {
        let (rows, k) = if i == 2 { (H, I) } else { (I, H) };
        let ([a, a64], [b, b64]) = (normal((r, k), 0.2, pair_dtype)?, normal((rows, r), 0.2, pair_dtype)?);
        let scale = [0.5, 1.7, 2.0][i];
        pairs[i] = Some(Lora::new(a, b, scale, dropout)?);
        wide_pairs[i] = Some(Lora::new(a64, b64, scale, dropout)?);
    }
    Ok(Case { block, wide, pairs, wide_pairs })
}

/// The root of the mean square of a - b.
fn distance(a: &Tensor, b: &Tensor) -> Result<f64> {
    let difference = (a.to_dtype(DType::F64)? - b.to_dtype(DType::F64)?)?;
    Ok(difference.sqr()?.mean_all()?.to_scalar::<f64>()?.sqrt())
}

const RANKS: [[usize; 3]; 5] = [[16, 16, 16], [1, 3, 33], [4, 0, 0], [0, 7, 0], [0, 0, 65]];

/// The packed block with pairs has at most twice the error of candle's matmuls.
#[test]
fn pairs_of_packed_blocks() -> Result<()> {
    for (dtype, pair_dtype) in [
        (DType::F32, DType::F32),
        (DType::BF16, DType::BF16),
        (DType::BF16, DType::F32),
        (DType::F16, DType::F16),
    ] {
        for ranks in RANKS {
            let case = case(dtype, pair_dtype, ranks, 0.0)?;
            let fused = adapted::block(&case.block, &spec(), case.pairs.clone())?;
            assert_eq!(fused.kernel(), case.block.kernel());
            let wide = adapted::block(&case.wide, &spec(), case.wide_pairs)?;
            let composed = adapted::composed_block(&case.block, &spec(), case.pairs);
            for rows in [1, 2, 5, 16, 33, 130, 600] {
                let [x, x64] = normal((rows, H), 1.0, dtype)?;
                let (expected, y) = (wide.forward(&x64)?, fused.forward(&x)?);
                let (found, naive) =
                    (distance(&y, &expected)?, distance(&composed.forward(&x)?, &expected)?);
                let what = format!("{dtype:?} {pair_dtype:?} {ranks:?} {rows}: {found} {naive}");
                let size = expected.sqr()?.mean_all()?.to_scalar::<f64>()?.sqrt();
                let bound = if dtype == DType::F32 { 1e-6 * size } else { 2.0 * naive };
                assert!(found <= bound, "{what}");
            }
        }
    }
    Ok(())
}
