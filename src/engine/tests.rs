#![allow(clippy::unwrap_used)]

use candle_core::{DType, Device, Tensor, Var};

use super::*;
use crate::gate::activation::GluActivation;
use crate::load::Biases;

const H: usize = 5;
const I: usize = 7;

fn spec() -> BlockSpec {
    let glu = Glu::new(GluActivation::Silu);
    BlockSpec { hidden_size: H, intermediate_size: I, glu, down_multiplier: 0.5 }
}

/// A builder of each kind. The weights of `gpu` are on the CPU here, where its kernels are not.
fn builders() -> [(&'static str, Box<dyn Builder>); 3] {
    [
        ("unpacked", Box::new(unpacked::BlockBuilder::new(&spec()))),
        ("cpu", Box::new(cpu::BlockBuilder::new(&spec(), DType::F32).unwrap())),
        ("gpu", Box::new(gpu::BlockBuilder::new(&spec(), DType::F32, &Device::Cpu))),
    ]
}

/// Different small numbers for each `seed`.
fn numbers(seed: usize, shape: &[usize]) -> Tensor {
    let len = shape.iter().product::<usize>();
    let data: Vec<f32> =
        (0..len).map(|at| ((at * 7 + seed * 5) % 23) as f32 / 8.0 - 1.25).collect();
    Tensor::from_vec(data, shape, &Device::Cpu).unwrap()
}

fn weight(which: Which) -> Tensor {
    let (rows, k) = spec().shape(which);
    numbers(which as usize, &[rows, k])
}

fn bias(which: Which, biases: Biases) -> Option<Tensor> {
    let there = [biases.gate, biases.up, biases.down][which as usize];
    there.then(|| numbers(3 + which as usize, &[spec().shape(which).0]))
}

fn all_biases() -> impl Iterator<Item = Biases> {
    (0..8).map(|n| Biases::new(n & 1 > 0, n & 2 > 0, n & 4 > 0))
}

fn build(mut builder: Box<dyn Builder>, biases: Biases) -> Arc<dyn Block> {
    for which in Which::ALL {
        builder.set(which, &weight(which), bias(which, biases).as_ref()).unwrap();
    }
    builder.finish().unwrap()
}

fn assert_holds(block: &dyn Block, biases: Biases, case: &str) {
    for which in Which::ALL {
        let values = |tensor: Tensor| {
            let tensor = tensor.to_dtype(DType::F32).unwrap();
            tensor.flatten_all().unwrap().to_vec1::<f32>().unwrap()
        };
        assert_eq!(values(block.weight(which).unwrap()), values(weight(which)), "{case} {which:?}");
        let found = block.bias(which).unwrap().map(values);
        assert_eq!(found, bias(which, biases).map(values), "{case} {which:?} {biases:?}");
    }
}

#[test]
fn a_block_returns_the_weights_it_was_built_from() {
    for biases in all_biases() {
        for (kind, builder) in builders() {
            assert_holds(&*build(builder, biases), biases, kind);
        }
    }
}

#[test]
fn a_block_returns_the_halves_of_a_fused_tensor() {
    let interleave =
        |gate: &Tensor, up: &Tensor| Tensor::stack(&[gate, up], 1).unwrap().flatten(0, 1).unwrap();
    for (order, biases) in [FusedOrder::GateFirst, FusedOrder::UpFirst, FusedOrder::Interleaved]
        .into_iter()
        .flat_map(|order| [(order, Biases::NONE), (order, Biases::ALL)])
    {
        let fuse = |gate: &Tensor, up: &Tensor| match order {
            FusedOrder::GateFirst => Tensor::cat(&[gate, up], 0).unwrap(),
            FusedOrder::UpFirst => Tensor::cat(&[up, gate], 0).unwrap(),
            FusedOrder::Interleaved => interleave(gate, up),
        };
        let both = bias(Which::Gate, biases)
            .zip(bias(Which::Up, biases))
            .map(|(gate, up)| fuse(&gate, &up));
        for (kind, mut builder) in builders() {
            builder
                .set_gate_up(&fuse(&weight(Which::Gate), &weight(Which::Up)), both.as_ref(), order)
                .unwrap();
            builder
                .set(Which::Down, &weight(Which::Down), bias(Which::Down, biases).as_ref())
                .unwrap();
            assert_holds(&*builder.finish().unwrap(), biases, &format!("{kind} {order:?}"));
        }
    }
}

#[test]
fn a_missing_matrix_is_an_error_that_names_it() {
    for missing in Which::ALL {
        for (kind, mut builder) in builders() {
            for which in Which::ALL.into_iter().filter(|which| *which != missing) {
                builder.set(which, &weight(which), None).unwrap();
            }
            let error = builder.finish().unwrap_err().to_string();
            assert!(error.contains(&format!("{}.weight", missing.name())), "{kind}: {error}");
        }
    }
}

/// The shared backward function of packed layers against candle's own gradient of the plain form.
#[test]
fn the_gradient_of_x_is_that_of_the_plain_form() {
    let (x, dy) = (Var::from_tensor(&numbers(6, &[3, H])).unwrap(), numbers(7, &[3, H]));
    for biases in all_biases() {
        let blocks = builders().map(|(_, builder)| build(builder, biases));
        let y = blocks[0].forward(&x).unwrap();
        let expected =
            (y * &dy).unwrap().sum_all().unwrap().backward().unwrap().get(&x).unwrap().clone();
        let y = blocks[1].forward(&x).unwrap();
        let packed =
            (y * &dy).unwrap().sum_all().unwrap().backward().unwrap().get(&x).unwrap().clone();
        for block in &blocks {
            let found = backward::block(&**block, &spec(), &x, &dy).unwrap();
            let difference = |other: &Tensor| {
                (&found - other)
                    .unwrap()
                    .abs()
                    .unwrap()
                    .max_all()
                    .unwrap()
                    .to_scalar::<f32>()
                    .unwrap()
            };
            assert!(difference(&expected) < 1e-5, "{block:?}: {found} {expected}");
            assert!(difference(&packed) == 0.0, "{block:?}: {found} {packed}");
        }
    }
}

/// A source of which some pieces are constants is read again for a block that packs nothing. In f64
/// nothing is ever packed. A block with a variable has a choice of what it keeps.
#[test]
fn constants_and_variables_are_not_packed() {
    let variables = Which::ALL.into_iter().map(Some).chain([None]);
    for (variable, dtype) in variables.flat_map(|v| [DType::F32, DType::F64].map(|t| (v, t))) {
        let reads = std::cell::Cell::new(0);
        let block = load_block(&spec(), |take| {
            reads.set(reads.get() + 1);
            Which::ALL.into_iter().try_for_each(|which| {
                let weight = weight(which).to_dtype(dtype)?;
                let weight = match variable == Some(which) {
                    true => Var::from_tensor(&weight)?.into_inner(),
                    false => weight,
                };
                take(Piece::One { which, weight, bias: None })
            })
        });
        let (block, packs) = (block.unwrap(), dtype == DType::F32);
        assert_holds(&*block, Biases::NONE, "loaded");
        assert_eq!(block.is_packed(), packs && variable.is_none(), "{variable:?}");
        assert_eq!(block.with_recompute(true).is_some(), variable.is_some(), "{variable:?}");
        // The first piece decides: if it is a variable, nothing has been packed yet.
        let once = !packs || matches!(variable, None | Some(Which::Gate));
        assert_eq!(reads.get(), if once { 1 } else { 2 }, "{variable:?}");
    }
}

#[test]
fn a_source_without_pieces_is_an_error() {
    let error = load_block(&spec(), |_| Ok(())).unwrap_err().to_string();
    assert!(error.contains("gate_proj.weight"), "{error}");
}

/// y = Σ nx for inputs x = 1, 2, .., whose gradients are n = 1, 2, .. Both kinds of values.
#[test]
fn functions_of_any_number_of_inputs() {
    use super::function::{Value, function};
    let storage = || Value::Cpu(candle_core::CpuStorage::F32(vec![1.0, 2.0]), 2.into());
    let tensor = || Value::Tensor(Tensor::new(&[1f32, 2.0], &Device::Cpu).unwrap());
    let zeros = |count| vec![Var::zeros(2, DType::F32, &Device::Cpu).unwrap(); count];
    let tensors = |vars: &[Var]| vars.iter().map(|var| var.as_tensor().clone()).collect::<Vec<_>>();
    let kinds: [&dyn Fn() -> Value; 2] = [&storage, &tensor];
    for (count, value) in (0..=9usize).flat_map(|count| kinds.map(|value| (count, value))) {
        let inputs: Vec<Var> = (0..count).flat_map(|_| zeros(1)).collect();
        let gradients =
            move |dy: &Tensor| (1..=count).map(|n| dy * n as f64).collect::<Result<Vec<_>, _>>();
        let y = function("sum", value(), &tensors(&inputs), gradients).unwrap();
        assert_eq!(y.to_vec1::<f32>().unwrap(), [1.0, 2.0], "{count}");
        assert_eq!(y.track_op(), count > 0, "{count}");
        let store = y.backward().unwrap();
        for (n, input) in (1..).zip(&inputs) {
            let found = store.get(input).unwrap().to_vec1::<f32>().unwrap();
            assert_eq!(found, [n as f32; 2], "input {n} of {count}");
        }
    }
    let error = function("sum", storage(), &tensors(&zeros(10)), |_| Ok(vec![])).unwrap_err();
    assert!(error.to_string().contains("10 inputs, expected at most 9"), "{error}");
}
