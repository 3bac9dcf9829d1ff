//! Tensors, names and inputs that do not match.

use candle_core::{DType, Device};
use candle_nn::{Module, VarBuilder};
use candle_swiglu::{
    Checkpoint, Error, Family, FfnConfig, GateUp, Linear, SwiGluFfn, Weights, glu_mul, linear_b,
    silu_mul,
};

use super::*;

#[test]
fn missing_tensor() {
    let gate_down = tensors(&[
        ("a.mlp.gate_proj.weight", "F32", &[I, H]),
        ("a.mlp.down_proj.weight", "F32", &[H, I]),
    ]);
    let dir = directory(&[("model.safetensors", &gate_down)]);
    let place = dir.path().to_str().unwrap();
    let cfg = FfnConfig::new(H, I);
    let parts =
        ["no tensor up_proj.weight under \"a.mlp\"", "down_proj.weight, gate_proj.weight", place];
    assert_error!(load(&dir, &cfg, "a.mlp"), Error::MissingTensor { .. }, parts);
    // No known name: the error lists the present tensors and the first name of every family.
    let parts = [
        "under \"a\"",
        "mlp.gate_proj.weight",
        "gate_proj.weight or w1.weight",
        "gate_up_proj.weight",
        "wi_0.weight",
        place,
    ];
    assert_error!(load(&dir, &cfg, "a"), Error::MissingTensor { .. }, parts);
    assert_error!(
        load(&dir, &cfg, "b"),
        Error::MissingTensor { .. },
        ["under \"b\"; present there: none", place]
    );
    // Only the names of the requested family are tried.
    let named = cfg.clone().with_family(Family::Xformers);
    assert_error!(
        load(&dir, &named, "a.mlp"),
        Error::MissingTensor { .. },
        ["no tensor w1.weight under", "gate_proj.weight", place]
    );
    let biased = cfg.clone().with_bias(true);
    assert_error!(
        load(&dir, &biased, "a.mlp"),
        Error::MissingTensor { .. },
        ["gate_proj.bias", "gate_proj.weight", place]
    );
    // The same for one tensor and for one projection.
    let checkpoint = Checkpoint::open(dir.path()).unwrap();
    let one = checkpoint.tensor("a.mlp.up_proj.weight", DType::F32, &Device::Cpu);
    assert_error!(
        one,
        Error::MissingTensor { .. },
        ["up_proj.weight", "a.mlp", "gate_proj.weight", place]
    );
    let vb = checkpoint.var_builder(DType::F32, &Device::Cpu);
    assert_error!(
        vb.get((I, H), "a.mlp.up_proj.weight"),
        Error::MissingTensor { .. },
        ["up_proj.weight", "a.mlp", place]
    );
    let linear = Linear::load(H, I, vb.pp("a.mlp.up_proj"));
    assert_error!(
        linear,
        Error::MissingTensor { .. },
        ["up_proj.weight", "a.mlp", "gate_proj.weight", place]
    );

    // candle's own sources cannot be listed, so the names of all families are tried.
    let buffered =
        VarBuilder::from_buffered_safetensors(gate_down, DType::F32, &Device::Cpu).unwrap();
    let map = [("a.mlp.gate_proj.weight", [I, H]), ("a.mlp.down_proj.weight", [H, I])];
    let map = map.map(|(name, shape)| (name.to_string(), zeros(&shape, DType::F32)));
    for vb in [buffered, VarBuilder::from_tensors(map.into(), DType::F32, &Device::Cpu)] {
        let parts =
            ["no tensor up_proj.weight under \"a.mlp\"", "down_proj.weight, gate_proj.weight"];
        assert_error!(SwiGluFfn::new(&cfg, vb.pp("a.mlp")), Error::MissingTensor { .. }, parts);
        assert_error!(
            SwiGluFfn::new(&cfg, vb.pp("b")),
            Error::MissingTensor { .. },
            ["under \"b\"; present there: none"]
        );
        assert_error!(
            Linear::load(H, I, vb.pp("a.mlp.up_proj")),
            Error::MissingTensor { .. },
            ["weight", "a.mlp.up_proj"]
        );
    }
}

#[test]
fn wrong_shape_in_the_file() {
    let names = ["mlp.gate_proj.weight", "mlp.up_proj.weight", "mlp.down_proj.weight"];
    let right: [&[usize]; 3] = [&[I, H], &[I, H], &[H, I]];
    let wrong: [&[usize]; 6] = [&[I + 1, H + 1], &[I * H], &[1, I, H], &[], &[0, H], &[3, 8]];
    for (k, name) in names.iter().enumerate() {
        for shape in wrong {
            let list: Vec<_> =
                (0..3).map(|j| (names[j], "F32", if j == k { shape } else { right[j] })).collect();
            let parts = [
                *name,
                &format!("expected shape {:?}", right[k]),
                &format!("found {shape:?}"),
                "model.safetensors",
            ];
            assert_error!(load_file(&tensors(&list)), Error::Shape { .. }, parts);
        }
    }
    let fused = tensors(&[
        ("mlp.gate_up_proj.weight", "F32", &[I, H]),
        ("mlp.down_proj.weight", "F32", &[H, I]),
    ]);
    assert_error!(
        load_file(&fused),
        Error::Shape { .. },
        ["mlp.gate_up_proj.weight", "[12, 4]", "[6, 4]", "model.safetensors"]
    );
    // The same through candle's own source.
    let map = names.map(|name| (name.to_string(), zeros(&[I, H], DType::F32)));
    let vb = VarBuilder::from_tensors(map.into(), DType::F32, &Device::Cpu);
    let parts = ["mlp.down_proj.weight: expected shape [4, 6], found [6, 4]"];
    assert_error!(SwiGluFfn::new(&FfnConfig::new(H, I), vb.pp("mlp")), Error::Shape { .. }, parts);
}

#[test]
fn wrong_tensors_in_memory() {
    let make = |gate: &[usize], up: &[usize], down: &[usize]| {
        SwiGluFfn::from_tensors(
            zeros(gate, DType::F32),
            zeros(up, DType::F32),
            zeros(down, DType::F32),
        )
    };
    assert_error!(
        make(&[I], &[I, H], &[H, I]),
        Error::Rank { .. },
        ["gate_proj", "rank 2", "found rank 1", "[6]"]
    );
    assert_error!(
        make(&[I, H], &[1, I, H], &[H, I]),
        Error::Rank { .. },
        ["up_proj", "found rank 3", "[1, 6, 4]"]
    );
    assert_error!(
        make(&[I, H], &[I, H], &[]),
        Error::Rank { .. },
        ["down_proj", "found rank 0", "[]"]
    );
    assert_error!(
        make(&[I, H], &[H, I], &[H, I]),
        Error::Shape { .. },
        ["up_proj: expected shape [6, 4], found [4, 6]"]
    );
    assert_error!(
        make(&[I, H], &[I, H], &[I, H]),
        Error::Shape { .. },
        ["down_proj: expected shape [4, 6], found [6, 4]"]
    );
    assert_error!(
        make(&[0, H], &[0, H], &[H, 0]),
        Error::ZeroSize { .. },
        ["intermediate_size: expected at least 1, found 0"]
    );
    assert_error!(make(&[I, 0], &[I, 0], &[0, I]), Error::ZeroSize { .. }, ["hidden_size"]);
    for (h, i, name) in [(0, I, "hidden_size"), (H, 0, "intermediate_size")] {
        let vb = VarBuilder::zeros(DType::F32, &Device::Cpu);
        assert_error!(SwiGluFfn::new(&FfnConfig::new(h, i), vb), Error::ZeroSize { .. }, [name]);
    }
    let linear = Linear::new(zeros(&[I], DType::F32), None);
    assert_error!(linear, Error::Rank { .. }, ["weight: expected rank 2 (out, in)", "[6]"]);
    let linear = Linear::new(zeros(&[I, H], DType::F32), Some(zeros(&[H], DType::F32)));
    assert_error!(linear, Error::Shape { .. }, ["bias: expected shape [6], found [4]"]);
    let pair = silu_mul(&zeros(&[2, 3], DType::F32), &zeros(&[3, 2], DType::F32));
    assert_error!(pair, Error::Shape { .. }, ["up: expected shape [2, 3], found [3, 2]"]);
}

#[test]
fn a_dtype_that_is_not_a_float() {
    for dtype in ["I8", "U8", "I16", "U16", "I32", "U32", "I64", "U64"] {
        let list = ["mlp.gate_proj.weight", "mlp.up_proj.weight", "mlp.down_proj.weight"];
        let shapes: [&[usize]; 3] = [&[I, H], &[I, H], &[H, I]];
        let list: Vec<_> =
            (0..3).map(|k| (list[k], if k == 1 { dtype } else { "F32" }, shapes[k])).collect();
        let parts = [
            "mlp.up_proj.weight",
            "expected one of f16, bf16, f32, f64",
            dtype,
            "model.safetensors",
        ];
        assert_error!(load_file(&tensors(&list)), Error::DTypeUnsupported { .. }, parts);
    }
    let fp8 = file(r#"{"w":{"dtype":"F8_E4M3","shape":[2],"data_offsets":[0,2]}}"#, 2);
    let one = open_file(&fp8).unwrap().tensor("w", DType::F32, &Device::Cpu);
    assert_error!(one, Error::DTypeUnsupported { .. }, ["w: ", "F8_E4M3", "model.safetensors"]);
    // a dtype in memory
    let checkpoint = open_file(&block()).unwrap();
    for dtype in [DType::U8, DType::U32, DType::I64] {
        let vb = checkpoint.var_builder(dtype, &Device::Cpu);
        let parts = ["mlp.gate_proj.weight in memory", &format!("{dtype:?}")];
        assert_error!(
            SwiGluFfn::new(&FfnConfig::new(H, I), vb.pp("mlp")),
            Error::DTypeUnsupported { .. },
            parts
        );
    }
    // tensors from the caller
    let int = |shape: &[usize]| zeros(shape, DType::U32);
    assert_error!(
        SwiGluFfn::from_tensors(int(&[I, H]), int(&[I, H]), int(&[H, I])),
        Error::DTypeUnsupported { .. },
        ["U32"]
    );
    assert_error!(
        Linear::new(int(&[I, H]), None),
        Error::DTypeUnsupported { .. },
        ["weight", "U32"]
    );
    assert_error!(
        silu_mul(&int(&[3]), &int(&[3])),
        Error::DTypeUnsupported { .. },
        ["gate", "U32"]
    );
    let x = load_file(&block()).unwrap().forward(&zeros(&[1, H], DType::U32));
    assert_error!(
        x,
        Error::DTypeUnsupported { .. },
        ["x: expected one of f16, bf16, f32, f64, found U32"]
    );
}

#[test]
fn mixed_dtypes() {
    let of = |dtypes: [DType; 3]| {
        let [gate, up, down] =
            [(&[I, H], 0), (&[I, H], 1), (&[H, I], 2)].map(|(shape, k)| zeros(shape, dtypes[k]));
        SwiGluFfn::from_tensors(gate, up, down)
    };
    let (f, b) = (DType::F32, DType::BF16);
    assert_error!(
        of([b, f, f]),
        Error::DTypeMismatch { .. },
        ["gate_proj: expected dtype F32 as down_proj, found BF16"]
    );
    assert_error!(of([f, b, f]), Error::DTypeMismatch { .. }, ["up_proj", "F32", "BF16"]);
    assert_error!(of([f, f, b]), Error::DTypeMismatch { .. }, ["down_proj", "F32", "BF16"]);
    let linear = Linear::new(zeros(&[I, H], f), Some(zeros(&[I], b)));
    assert_error!(
        linear,
        Error::DTypeMismatch { .. },
        ["bias: expected dtype F32 as weight, found BF16"]
    );
    let pair = glu_mul(candle_swiglu::GluActivation::Relu, &zeros(&[3], f), &zeros(&[3], b));
    assert_error!(
        pair,
        Error::DTypeMismatch { .. },
        ["up: expected dtype F32 as gate, found BF16"]
    );
}

#[test]
fn wrong_x() {
    let ffn = load_file(&block()).unwrap();
    let linear = Linear::new(zeros(&[I, H], DType::F32), None).unwrap();
    for layer in [&ffn as &dyn Module, &linear] {
        assert_error!(
            layer.forward(&zeros(&[], DType::F32)),
            Error::Rank { .. },
            ["x: expected rank 1 or more, found rank 0"]
        );
        for shape in [&[H + 1][..], &[2, H - 1], &[H, 2], &[0], &[2, 0], &[0, H + 1], &[1, 1, 1, 1]]
        {
            let parts = [&format!("x: expected last dimension {H}, found shape {shape:?}")];
            assert_error!(
                layer.forward(&zeros(shape, DType::F32)),
                Error::InputWidth { .. },
                parts.map(|part| part.as_str())
            );
        }
    }
}

#[test]
fn biases_against_the_config() {
    let mut list: Vec<(&str, &str, &[usize])> = vec![
        ("mlp.gate_proj.weight", "F32", &[I, H]),
        ("mlp.up_proj.weight", "F32", &[I, H]),
        ("mlp.down_proj.weight", "F32", &[H, I]),
    ];
    list.push(("mlp.down_proj.bias", "F32", &[H]));
    let dir = directory(&[("model.safetensors", &tensors(&list))]);
    let cfg = FfnConfig::new(H, I);
    assert_error!(
        load(&dir, &cfg, "mlp"),
        Error::UnexpectedBias { .. },
        ["mlp.down_proj.bias", "mlp_bias"]
    );
    let biased = cfg.clone().with_bias(true);
    assert_error!(
        load(&dir, &biased, "mlp"),
        Error::MissingTensor { .. },
        ["no tensor gate_proj.bias under \"mlp\"", "down_proj.bias"]
    );
    let vb = Checkpoint::open(dir.path()).unwrap().var_builder(DType::F32, &Device::Cpu);
    let linear = linear_b(I, H, false, vb.pp("mlp.down_proj"));
    assert_error!(linear, Error::UnexpectedBias { .. }, ["mlp.down_proj.bias"]);
    let linear = linear_b(H, I, true, vb.pp("mlp.up_proj"));
    assert_error!(linear, Error::MissingTensor { .. }, ["up_proj", "bias"]);

    let given = |bias: Option<usize>| {
        let gate_up = GateUp::separate(
            zeros(&[I, H], DType::F32),
            zeros(&[I, H], DType::F32),
            None,
            bias.map(|n| zeros(&[n], DType::F32)),
        );
        Weights::new(gate_up, zeros(&[H, I], DType::F32), None)
    };
    assert_error!(
        SwiGluFfn::from_weights(&cfg, given(Some(I))),
        Error::UnexpectedBias { .. },
        ["up_proj.bias"]
    );
    assert_error!(
        SwiGluFfn::from_weights(&biased, given(Some(I))),
        Error::MissingTensor { .. },
        ["gate_proj.bias"]
    );
    let parts = ["up_proj bias: expected shape [6], found [4]"];
    assert_error!(SwiGluFfn::from_weights(&biased, given(Some(H))), Error::Shape { .. }, parts);
}

#[test]
fn names_that_fit_several_families() {
    type Names<'a> = Vec<(&'a str, &'a [usize])>;
    let [pair, fused]: [&[usize]; 2] = [&[H, H], &[2 * H, H]];
    let w123 = [("w1", pair), ("w2", pair), ("w3", pair)];
    let cases: [(&str, Names, [&str; 2]); 4] = [
        ("mlp", w123.to_vec(), ["Meta", "Xformers"]),
        ("mlp", [&w123[..], &[("c_proj", pair)]].concat(), ["Meta", "Qwen1"]),
        (
            "mlp",
            vec![
                ("gate_proj", pair),
                ("up_proj", pair),
                ("gate_up_proj", fused),
                ("down_proj", pair),
            ],
            ["Llama", "Phi3"],
        ),
        ("feed_forward", [&w123[..], &[("w12", fused)]].concat(), ["Meta", "Dinov2"]),
    ];
    for (prefix, names, families) in cases {
        let list: Vec<_> =
            names.iter().map(|(name, shape)| (format!("{prefix}.{name}.weight"), *shape)).collect();
        let list: Vec<_> =
            list.iter().map(|(name, shape)| (name.as_str(), "F32", *shape)).collect();
        let dir = directory(&[("model.safetensors", &tensors(&list))]);
        let parts = [prefix, families[0], families[1], "with_family"];
        assert_error!(
            load(&dir, &FfnConfig::new(H, H), prefix),
            Error::AmbiguousNames { .. },
            parts
        );
    }
}

#[test]
fn projections_of_no_size() {
    // A matrix with a size of zero needs no bytes for any number of rows, and packing it would
    // never end.
    let one = zeros(&[1, 0], DType::F32).broadcast_as((1 << 40, 0)).unwrap();
    assert_error!(
        Linear::new(one, None),
        Error::ZeroSize { .. },
        ["in_dim: expected at least 1, found 0"]
    );
    let none = zeros(&[0, H], DType::F32);
    assert_error!(
        Linear::new(none, None),
        Error::ZeroSize { .. },
        ["out_dim: expected at least 1, found 0"]
    );
    let file = tensors(&[("head.weight", "F32", &[1 << 40, 0])]);
    let dir = directory(&[("model.safetensors", &file)]);
    let vb = Checkpoint::open(dir.path()).unwrap().var_builder(DType::F32, &Device::Cpu);
    assert_error!(Linear::load(0, 1 << 40, vb.pp("head")), Error::ZeroSize { .. }, ["in_dim"]);
}

#[test]
fn more_than_memory_can_address() {
    let cfg = FfnConfig::new(H, usize::MAX / 2 + 1);
    let parts = ["gate_up_proj: 9223372036854775808 x 4 elements are more than memory can address"];
    assert_error!(
        SwiGluFfn::new(&cfg, VarBuilder::zeros(DType::F32, &Device::Cpu)),
        Error::TooLarge { .. },
        parts
    );
    // Views of one element can have this size.
    let (one, n) = (zeros(&[1, 1], DType::F32), 1 << 31);
    let huge = one.broadcast_as((n, n)).unwrap();
    let block = SwiGluFfn::from_tensors(huge.clone(), huge.clone(), huge.clone());
    assert_error!(
        block,
        Error::TooLarge { .. },
        ["gate_proj and up_proj: 4294967296 x 2147483648 elements"]
    );
    assert_error!(
        Linear::new(huge, None),
        Error::TooLarge { .. },
        ["weight: 2147483648 x 2147483648 elements"]
    );
    let linear = Linear::new(one.clone(), None).unwrap();
    let y = linear.forward(&one.broadcast_as((1 << 62, 1)).unwrap());
    assert_error!(y, Error::TooLarge { .. }, ["y: 4611686018427387904 x 1 elements"]);
}
