//! Compares the plan with the text of swiglu.metal, and checks its choices.
#![allow(clippy::unwrap_used, clippy::panic)]

use candle_core::Shape;

use super::*;

const SOURCE: &str = include_str!("swiglu.metal");
const PLAN: &str = include_str!("plan.rs");

/// `constant constexpr uint NAME = value;` of the kernels
fn constant(name: &str) -> usize {
    let line = SOURCE
        .lines()
        .find(|line| line.starts_with(&format!("constant constexpr uint {name} =")))
        .unwrap();
    let value: String =
        line.chars().skip_while(|&c| c != '=').filter(char::is_ascii_digit).collect();
    // Comments contain digits too, so only the text before the semicolon is read.
    let digits = line.split(['=', ';']).nth(1).unwrap().trim();
    assert!(value.starts_with(digits), "{line}");
    digits.parse().unwrap()
}

#[test]
fn constants_are_those_of_the_kernels() {
    for (name, value) in [
        ("SIMDGROUPS", SIMDGROUPS),
        ("THREADS", THREADS),
        ("WEIGHT_ROWS", WEIGHT_ROWS),
        ("TILE_COLUMNS", TILE_COLUMNS),
        ("RASTER", RASTER),
        ("ELEMENTS", ELEMENTS),
    ] {
        assert_eq!(constant(name), value, "{name}");
    }
}

#[test]
fn metal_compiles_one_string() {
    let quoted = |text: &str| text.lines().filter(|line| line.starts_with("#include \"")).count();
    assert_eq!((quoted(SOURCE), quoted(&super::super::source())), (1, 0));
    assert!(super::super::source().contains("auto with_activation(int activation"));
}

/// (type, name) of a struct's fields, in order; `uint a, b;` is two of them.
fn fields(text: &str, head: &str) -> Vec<(String, String)> {
    let body = text.split(&format!("struct {head} {{")).nth(1).unwrap().split('}').next().unwrap();
    let mut all = vec![];
    for line in body
        .lines()
        .map(|line| line.split("//").next().unwrap().trim())
        .filter(|line| !line.is_empty())
    {
        match line.split_once(':') {
            Some((name, kind)) => {
                all.push((kind.trim_matches([',', ' ']).to_string(), name.trim().to_string()))
            }
            None => {
                let (kind, names) = line.trim_end_matches(';').split_once(' ').unwrap();
                all.extend(
                    names.split(',').map(|name| (kind.to_string(), name.trim().to_string())),
                );
            }
        }
    }
    all
}

#[test]
fn structs_have_the_same_fields_in_both_languages() {
    for (metal, rust) in [("Product", "ProductParameters"), ("Pair", "PairParameters")] {
        let translated: Vec<_> = fields(SOURCE, metal)
            .into_iter()
            .map(|(kind, name)| {
                let kind = match kind.as_str() {
                    "uint" => "u32",
                    "float" => "f32",
                    "GluParams" => "GluParams",
                    other => panic!("{other}"),
                };
                (kind.to_string(), name)
            })
            .collect();
        assert_eq!(translated, fields(PLAN, rust), "{metal}");
    }
    // Fields of 4 B each: no padding in either.
    assert_eq!(size_of::<ProductParameters>(), (5 + 5) * 4);
    assert_eq!(size_of::<PairParameters>(), (8 + 5) * 4);
}

fn product(rows: usize, gated: bool, has_bias: bool, factor: f32) -> Product {
    let glu = gated.then(|| Glu::new(GluActivation::Silu));
    Product { rows, columns: 100, k: 64, glu, has_bias, factor }
}

/// Every kernel that the plan can choose has been run by the test on the CPU, whose kernels are
/// listed in `kernels.txt`.
#[test]
fn every_choice_is_a_kernel_that_is_tested() {
    let tested: Vec<&str> = include_str!("../../tests/metal_shim/kernels.txt").lines().collect();
    for rows in 1..200 {
        for (gated, has_bias, factor) in
            [(true, false, 1.0), (false, true, 1.0), (false, false, 0.5), (false, false, 1.0)]
        {
            let Choice::Kernel(kernel) = product(rows, gated, has_bias, factor).choice() else {
                assert!(
                    rows > 8 && !gated && !has_bias && factor == 1.0,
                    "candle's only where nothing follows the product"
                );
                continue;
            };
            for dtype in [DType::F32, DType::F16, DType::BF16] {
                assert!(tested.contains(&kernel.name(dtype).as_str()), "{}", kernel.name(dtype));
            }
        }
    }
    for kernel in [Kernel::GateForward, Kernel::GateBackward] {
        assert!(tested.contains(&kernel.name(DType::BF16).as_str()));
    }
}

#[test]
fn grids_cover_every_row_and_column() {
    for rows in [1, 2, 3, 8, 9, 32, 33, 64, 65, 511, 512, 513, 4097] {
        for columns in [1, 7, 8, 9, 16, 17, 32, 33, 64, 65, 14336] {
            for gated in [true, false] {
                let product = Product { columns, ..product(rows, gated, true, 1.0) };
                let Choice::Kernel(kernel) = product.choice() else { panic!("{product:?}") };
                let halves = if gated { 2 } else { 1 };
                let (covered_rows, covered_columns, used) = match (kernel, product.grid(kernel)) {
                    (Kernel::Decode { rows, .. }, [x, y, z]) => {
                        (y * rows, x * SIMDGROUPS * WEIGHT_ROWS / halves, z == 1)
                    }
                    (Kernel::Tile { rows, .. }, [x, y, z]) => {
                        (x * z * rows, y * TILE_COLUMNS / halves, x <= RASTER)
                    }
                    (other, _) => panic!("{other:?}"),
                };
                assert!(
                    used && covered_rows >= rows && covered_columns >= columns,
                    "{product:?} {kernel:?}"
                );
            }
        }
    }
}

#[test]
fn sizes_that_do_not_fit_are_refused() {
    let small = product(3, true, false, 1.0);
    assert!(small.parameters().is_some());
    assert!(Product { k: 1 << 31, ..small }.parameters().is_none());
    assert!(Product { rows: 1 << 31, ..small }.parameters().is_none());
}

#[test]
fn alignment_asks_for_whole_chunks() {
    let with = |k| Product { k, ..product(3, true, false, 1.0) };
    assert!(with(8).is_aligned(DType::F16, [0, 4]) && with(4).is_aligned(DType::F32, [8, 0]));
    assert!(!with(4).is_aligned(DType::BF16, [0, 0]) && !with(6).is_aligned(DType::F32, [0, 0]));
    assert!(!with(8).is_aligned(DType::F16, [2, 0]) && !with(8).is_aligned(DType::F16, [0, 1]));
}

fn pair<const N: usize>(layouts: [Layout; N]) -> Option<Pair<N>> {
    Pair::new(layouts.each_ref())
}

fn layout(dims: (usize, usize), strides: (usize, usize)) -> Layout {
    Layout::new(Shape::from(dims), vec![strides.0, strides.1], 0)
}

#[test]
fn four_elements_at_a_time_need_whole_vectors_in_every_operand() {
    let contiguous = || Layout::contiguous(Shape::from((2, 3, 4)));
    let one_row = pair([contiguous(), contiguous()]).unwrap();
    assert!(one_row.is_aligned([0, 8]) && !one_row.is_aligned([0, 2]));
    // The distance of rows does not matter, because there is only one.
    assert!(pair([layout((1, 8), (3, 1))]).unwrap().is_aligned([4]));
    let halves = Layout::new(Shape::from((2, 3, 4)), vec![24, 8, 1], 4);
    assert!(pair([halves, contiguous()]).unwrap().is_aligned([4, 0]));
    assert!(!pair([layout((3, 4), (6, 1))]).unwrap().is_aligned([0]), "rows 6 elements apart");
    assert!(
        !pair([layout((3, 4), (1, 3)), layout((3, 4), (4, 1))]).unwrap().is_aligned([0, 0]),
        "transposed"
    );
    assert!(!pair([layout((3, 5), (8, 1))]).unwrap().is_aligned([0]), "five columns");
}

#[test]
fn groups_cover_every_column() {
    for (columns, groups) in [(512, 1), (513, 2)] {
        assert_eq!(pair([layout((3, columns), (4096, 1))]).unwrap().grid(), [groups, 3, 1]);
    }
}

#[test]
fn pairs_that_do_not_fit_are_refused() {
    assert!(pair([layout((3, 1 << 31), (1 << 31, 1))]).is_none(), "columns");
    assert!(pair([layout((3, 4), (1 << 32, 1))]).is_none(), "a stride");
    let permuted = Layout::new(Shape::from((2, 3, 4)), vec![4, 8, 1], 0);
    assert!(
        pair([permuted, Layout::contiguous(Shape::from((2, 3, 4)))]).is_none(),
        "three dimensions"
    );
}

#[test]
fn strides_reach_the_kernel() {
    let op = Glu::new(GluActivation::Swish { beta: 1.5 }).with_limit(7.0);
    let found = pair([(9, 2), (8, 1), (4, 1)].map(|strides| layout((3, 4), strides)))
        .unwrap()
        .parameters(&op);
    assert_eq!((found.rows, found.columns, found.glu), (3, 4, GluParams::from(&op)));
    assert_eq!((found.gate_row, found.gate_column, found.up_row, found.up_column), (9, 2, 8, 1));
    assert_eq!((found.dy_row, found.dy_column), (4, 1));
}
