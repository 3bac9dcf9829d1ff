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
        let ([a, a64], [b, b64]) =
            (normal((r, k), 0.2, pair_dtype)?, normal((rows, r), 0.2, pair_dtype)?);
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

/// The gradients of x and of the pairs have at most twice the error of candle's matmuls, with gate
/// and up kept and computed again.
#[test]
fn gradients_of_packed_blocks_with_pairs() -> Result<()> {
    for (dtype, pair_dtype) in [
        (DType::F32, DType::F32),
        (DType::BF16, DType::BF16),
        (DType::BF16, DType::F32),
        (DType::F16, DType::F16),
    ] {
        for (ranks, rows) in RANKS.into_iter().zip([33, 600, 1, 7, 130]) {
            let case = case(dtype, pair_dtype, ranks, 0.0)?;
            let (pairs, vars) = variables(&case.pairs)?;
            let (wide_pairs, wide_vars) = variables(&case.wide_pairs)?;
            let fused = adapted::block(&case.block, &spec(), pairs.clone())?;
            let wide = adapted::block(&case.wide, &spec(), wide_pairs)?;
            let composed = adapted::composed_block(&case.block, &spec(), pairs);
            let ([x, x64], [dy, dy64]) =
                (normal((rows, H), 1.0, dtype)?, normal((rows, H), 1.0, dtype)?);
            let (x, x64) = (Var::from_tensor(&x)?, Var::from_tensor(&x64)?);
            let (inputs, wide_inputs) =
                ([vec![x.clone()], vars].concat(), [vec![x64.clone()], wide_vars].concat());
            let expected = gradients(&*wide, &x64, &dy64, &wide_inputs)?;
            let naive = gradients(&*composed, &x, &dy, &inputs)?;
            for recompute in [false, true] {
                let block = fused.with_recompute(recompute).ok_or_else(no_choice)?;
                let found = gradients(&*block, &x, &dy, &inputs)?;
                for (i, ((found, naive), expected)) in
                    found.iter().zip(&naive).zip(&expected).enumerate()
                {
                    assert_eq!(found.dtype(), inputs[i].dtype());
                    let (found, naive) = (distance(found, expected)?, distance(naive, expected)?);
                    let size = expected.sqr()?.mean_all()?.to_scalar::<f64>()?.sqrt();
                    let bound = if dtype == DType::F32 { 2e-6 * size } else { 2.0 * naive };
                    let what = format!("{dtype:?} {pair_dtype:?} {ranks:?} {rows} input {i}");
                    assert!(found <= bound, "{what}: {found} {naive} {size}");
                }
            }
        }
    }
    Ok(())
}

fn no_choice() -> candle_core::Error {
    candle_core::Error::Msg("no choice".into())
}

/// The pairs as variables.
fn variables(pairs: &Pairs) -> Result<(Pairs, Vec<Var>)> {
    let (mut all, mut vars) = ([None, None, None], vec![]);
    for (to, pair) in all.iter_mut().zip(pairs) {
        let Some(pair) = pair else { continue };
        let (a, b) = (Var::from_tensor(pair.a())?, Var::from_tensor(pair.b())?);
        *to = Some(Lora::new(
            a.as_tensor().clone(),
            b.as_tensor().clone(),
            pair.scale(),
            pair.dropout(),
        )?);
        vars.extend([a, b]);
    }
    Ok((all, vars))
}

fn gradients(block: &dyn Block, x: &Tensor, dy: &Tensor, inputs: &[Var]) -> Result<Vec<Tensor>> {
    let store = super::backward(&(block.forward(x)? * dy)?.sum_all()?)?;
    let gradient = |var: &Var| store.get(var).cloned().ok_or_else(no_choice);
    inputs.iter().map(gradient).collect()
}

/// The base has no gradient, and x has none if nobody asks for it.
#[test]
fn only_pairs_have_gradients() -> Result<()> {
    let case = case(DType::F32, DType::F32, [4, 0, 2], 0.3)?;
    let (pairs, vars) = variables(&case.pairs)?;
    let block = adapted::block(&case.block, &spec(), pairs)?;
    let [x, _] = normal((5, H), 1.0, DType::F32)?;
    let store = super::backward(&block.forward(&x)?.sqr()?.sum_all()?)?;
    assert!(vars.iter().all(|var| store.get(var).is_some()));
    assert!(store.get(&x).is_none());
    Ok(())
}

/// With p = 1 the pairs have no effect and no gradients but zeros.
#[test]
fn everything_is_dropped() -> Result<()> {
    let case = case(DType::F32, DType::F32, [4, 3, 2], 1.0)?;
    let (pairs, vars) = variables(&case.pairs)?;
    let block = adapted::block(&case.block, &spec(), pairs)?;
    let [x, _] = normal((5, H), 1.0, DType::F32)?;
    let y = block.forward(&x)?;
    assert!(distance(&y, &case.block.forward(&x)?)? == 0.0);
    let store = super::backward(&y.sqr()?.sum_all()?)?;
    for var in &vars {
        let gradient = store.get(var).ok_or_else(no_choice)?;
        assert_eq!(gradient.abs()?.max_all()?.to_scalar::<f32>()?, 0.0);
    }
    Ok(())
}

/// The mean over many masks is the result without dropout: y is linear in up, which alone has a
/// pair here.
#[test]
fn dropout_is_unbiased() -> Result<()> {
    let case = case(DType::F32, DType::F32, [0, 3, 0], 0.5)?;
    let (pairs, _) = variables(&case.pairs)?;
    let block = adapted::block(&case.block, &spec(), pairs)?;
    let [x, x64] = normal((3, H), 1.0, DType::F32)?;
    let wide_pairs = case.wide_pairs.map(|pair| pair.map(|p| Lora { dropout: 0.0, ..p }));
    let expected = adapted::block(&case.wide, &spec(), wide_pairs)?.forward(&x64)?;
    let calls = 2000;
    let (mut sum, mut squares) = (expected.zeros_like()?, expected.zeros_like()?);
    for _ in 0..calls {
        let y = (block.forward(&x)?.detach().to_dtype(DType::F64)? - &expected)?;
        (sum, squares) = ((sum + &y)?, (squares + y.sqr()?)?);
    }
    // The mean of the differences is 0 within some standard errors.
    let error = (squares / calls as f64)?.sqrt()?;
    let deviations = ((sum / calls as f64)?.abs()? / (error / f64::from(calls).sqrt())?)?;
    let most = deviations.max_all()?.to_scalar::<f64>()?;
    assert!(most < 5.0, "{most} standard errors");
    Ok(())
}
