//! The products that blocks and linear layers of variables launch, counted by the driver model. On
//! a card only the presence of gradients is checked.

use anyhow::{Context, Result, ensure};
use candle_core::{DType, Module, Tensor, Var};
use candle_swiglu::{FfnConfig, FusedOrder, GateUp, Linear, SwiGluFfn, Weights};

use super::common::{Numbers, weights};
use super::cuda;
use super::training::{build, vars};

/// Rows, columns and length of the sums of a product.
type Product = [usize; 3];

/// The products that the driver model has been asked for; none on a card.
fn products() -> Result<Option<Vec<Product>>> {
    let Some(path) = std::env::var_os("CUDA_MODEL_PRODUCTS") else { return Ok(None) };
    let text = std::fs::read_to_string(path).unwrap_or_default();
    let numbers: Vec<usize> = text.split_whitespace().map(str::parse).collect::<Result<_, _>>()?;
    Ok(Some(numbers.chunks_exact(3).map(|p| [p[0], p[1], p[2]]).collect()))
}

/// Fails if `work` launches other products than these, in any order.
fn expect_products(
    what: &str,
    expected: &[Product],
    work: impl FnOnce() -> Result<()>,
) -> Result<()> {
    let Some(before) = products()? else { return work() };
    work()?;
    let mut found = products()?.context("no products")?.split_off(before.len());
    let mut expected = expected.to_vec();
    found.sort_unstable();
    expected.sort_unstable();
    ensure!(found == expected, "{what}: found {found:?}, expected {expected:?}");
    Ok(())
}

const M: usize = 6;
const H: usize = 24;
const I: usize = 40;
const FORWARD: [Product; 3] = [[M, I, H], [M, I, H], [M, H, I]];
const DH: Product = [M, I, H];
const DX: Product = [M, H, I];
/// Of gate and of up.
const DW: Product = [I, H, M];
const DW_DOWN: Product = [H, I, M];

/// The backward pass launches the products of the wanted gradients and no others.
#[test]
fn frozen_weights_cost_no_product() -> Result<()> {
    let Some(device) = cuda()? else { return Ok(()) };
    let cases: [(&[&str], &[Product]); 8] = [
        (
            &["x", "gate_proj.weight", "up_proj.weight", "down_proj.weight"],
            &[DH, DX, DX, DW, DW, DW_DOWN],
        ),
        (&["gate_proj.weight", "up_proj.weight", "down_proj.weight"], &[DH, DW, DW, DW_DOWN]),
        (&["gate_proj.weight"], &[DH, DW]),
        (&["up_proj.weight", "x"], &[DH, DW, DX, DX]),
        (&["down_proj.weight"], &[DW_DOWN]),
        (&["down_proj.weight", "x"], &[DW_DOWN, DH, DX, DX]),
        (&["down_proj.bias"], &[[1, H, M]]),
        (&["gate_proj.bias"], &[DH, [1, I, M]]),
    ];
    let (cfg, mut numbers) = (FfnConfig::new(H, I).with_bias(true), Numbers::new(56));
    let mut vars = vars(&weights(&cfg, &mut numbers, DType::F32)?, &device)?;
    vars.insert(
        "x".into(),
        Var::from_tensor(&numbers.tensor(&[M, H], 1.0, DType::F32)?.to_device(&device)?)?,
    );
    for ((variables, expected), recompute) in
        cases.into_iter().flat_map(|case| [(case, false), (case, true)])
    {
        let take = |name: &str| {
            let var = vars.get(name)?;
            Some(if variables.contains(&name) {
                var.as_tensor().clone()
            } else {
                var.as_detached_tensor()
            })
        };
        let ffn = build(&cfg, None, take)?.with_recompute(recompute);
        let (what, mut loss) = (format!("{variables:?}, recompute {recompute}"), None);
        expect_products(&what, &FORWARD, || {
            let x = take("x").context("x")?;
            loss = Some(ffn.forward(&x)?.sum_all()?);
            Ok(())
        })?;
        let mut expected = expected.to_vec();
        if recompute && variables != ["down_proj.bias"] {
            expected.extend(&FORWARD[..2]);
        }
        expect_products(&what, &expected, || {
            let store = loss.context("no loss")?.backward()?;
            for (name, var) in &vars {
                let wanted = variables.contains(&name.as_str());
                ensure!(store.get(var).is_some() == wanted, "{what}: gradient of {name}");
            }
            Ok(())
        })?;
    }
    Ok(())
}

/// Gate and up in one tensor have one product for each gradient. A linear layer has those of its
/// own.
#[test]
fn products_of_fused_and_linear_layers() -> Result<()> {
    let Some(device) = cuda()? else { return Ok(()) };
    let mut numbers = Numbers::new(57);
    let mut var = |dims: &[usize]| -> Result<Var> {
        Ok(Var::from_tensor(&numbers.tensor(dims, 1.0, DType::F32)?.to_device(&device)?)?)
    };
    let (both, down, x) = (var(&[2 * I, H])?, var(&[H, I])?, var(&[M, H])?);
    let gate_up = GateUp::fused(both.as_tensor().clone(), None, FusedOrder::GateFirst);
    let weights = Weights::new(gate_up, down.as_detached_tensor(), None);
    let ffn = SwiGluFfn::from_weights(&FfnConfig::new(H, I), weights)?;
    let expected = [[M, 2 * I, H], [M, H, I], DH, [M, H, 2 * I], [2 * I, H, M]];
    let run = |y: Tensor| -> Result<()> { Ok(y.sum_all()?.backward().map(drop)?) };
    expect_products("fused", &expected, || run(ffn.forward(&x)?))?;
    let linear = Linear::new(down.as_tensor().clone(), None)?;
    let h = var(&[M, I])?;
    let all = [[M, H, I], [M, I, H], [H, I, M]];
    expect_products("linear", &all, || run(linear.forward(&h)?))?;
    let frozen = h.as_detached_tensor();
    expect_products("linear, x frozen", &[all[0], all[2]], || run(linear.forward(&frozen)?))
}
