//! The names and layouts of every family, through every source that candle has.

use candle_core::{DType, Device, Tensor};
use candle_nn::VarBuilder;
use candle_swiglu::{Checkpoint, Family, FfnConfig, GateUp, Linear, SwiGluFfn, Weights, linear_b};

use super::{H, I, Tensors, block, integers, llama, output, single};

/// The weights, or the biases, of one block in the names and the layout of every family: prefix,
/// tensors, and whether the caller must name the family.
fn families(
    kind: &str,
    [gate, up, down]: [&Tensor; 3],
) -> Vec<(Family, &'static str, Tensors, bool)> {
    let gate_first = &Tensor::cat(&[gate, up], 0).unwrap();
    let up_first = &Tensor::cat(&[up, gate], 0).unwrap();
    let alternating = &Tensor::stack(&[gate, up], 1).unwrap().reshape(gate_first.shape()).unwrap();
    let llama = [("gate_proj", gate), ("up_proj", up), ("down_proj", down)];
    let meta = [("w1", gate), ("w3", up), ("w2", down)];
    let table: [(_, _, &[(&str, &Tensor)], _); 15] = [
        (Family::Llama, "model.layers.0.mlp", &llama, false),
        (Family::Meta, "layers.0.feed_forward", &meta, false),
        (Family::Meta, "block_sparse_moe.experts.3", &meta, false),
        (Family::Meta, "mlp", &meta, true),
        (Family::Xformers, "mlp", &[("w1", gate), ("w2", up), ("w3", down)], true),
        (Family::Qwen1, "h.0.mlp", &[("w2", gate), ("w1", up), ("c_proj", down)], false),
        (Family::Phi3, "mlp", &[("gate_up_proj", gate_first), ("down_proj", down)], false),
        (Family::ChatGlm, "mlp", &[("dense_h_to_4h", gate_first), ("dense_4h_to_h", down)], false),
        (Family::Dinov2, "mlp", &[("w12", gate_first), ("w3", down)], false),
        (Family::Stella, "mlp", &[("up_gate_proj", up_first), ("down_proj", down)], false),
        (Family::FlashAttn, "mlp", &[("fc1", up_first), ("fc2", down)], true),
        (Family::Interleaved, "mlp", &[("gate_up_proj", alternating), ("down_proj", down)], true),
        (Family::Nomic, "mlp", &[("fc12", gate), ("fc11", up), ("fc2", down)], false),
        (
            Family::T5,
            "layer.1.DenseReluDense",
            &[("wi_0", gate), ("wi_1", up), ("wo", down)],
            false,
        ),
        (Family::Gguf, "blk.0", &[("ffn_gate", gate), ("ffn_up", up), ("ffn_down", down)], false),
    ];
    let full = |prefix, names: &[(&str, &Tensor)]| {
        names
            .iter()
            .map(|(name, tensor)| (format!("{prefix}.{name}.{kind}"), (*tensor).clone()))
            .collect()
    };
    table
        .into_iter()
        .map(|(family, prefix, names, named)| (family, prefix, full(prefix, names), named))
        .collect()
}

fn all_weights() -> Vec<(Family, &'static str, Tensors, bool)> {
    let (gate, up, down, _) = block();
    families("weight", [&gate, &up, &down])
}

/// The same tensors through every source of candle and of this crate.
fn sources(tensors: &Tensors) -> Vec<(&'static str, VarBuilder<'static>)> {
    let dir = single(tensors);
    let file = dir.path().join("model.safetensors");
    let (dtype, device) = (DType::F32, &Device::Cpu);
    let buffered =
        VarBuilder::from_buffered_safetensors(std::fs::read(&file).unwrap(), dtype, device)
            .unwrap();
    // SAFETY: no process changes the file while it is mapped. Removing its name below leaves the
    // mapped pages unchanged.
    #[allow(unsafe_code)]
    let mapped = unsafe { VarBuilder::from_mmaped_safetensors(&[&file], dtype, device) }.unwrap();
    vec![
        ("Checkpoint", Checkpoint::open(dir.path()).unwrap().var_builder(dtype, device)),
        ("from_mmaped_safetensors", mapped),
        ("from_buffered_safetensors", buffered),
        (
            "from_tensors",
            VarBuilder::from_tensors(tensors.clone().into_iter().collect(), dtype, device),
        ),
    ]
}

#[test]
fn every_family_from_every_source() {
    let expected = output(&block().3);
    assert!(expected.iter().any(|y| y.abs() > 1.0));
    for (family, prefix, tensors, must_be_named) in all_weights() {
        let cfg = FfnConfig::new(H, I);
        for (source, vb) in sources(&tensors) {
            let case = format!("{family:?} at {prefix} from {source}");
            let ffn = SwiGluFfn::new(&cfg.clone().with_family(family), vb.pp(prefix)).expect(&case);
            assert_eq!(output(&ffn), expected, "{case}, named");
            match SwiGluFfn::new(&cfg, vb.pp(prefix)) {
                Ok(ffn) if !must_be_named => assert_eq!(output(&ffn), expected, "{case}, detected"),
                Ok(ffn) => {
                    assert_ne!(output(&ffn), expected, "{case}: another layout has these names")
                }
                Err(error) => assert!(must_be_named, "{case}: {error}"),
            }
        }
    }
}

#[test]
fn biases_of_every_family() {
    let cfg = FfnConfig::new(H, I).with_bias(true);
    let [gate, up, down] = [(I, 5), (I, 6), (H, 7)].map(|(n, seed)| integers(&[n], seed));
    let (gate_proj, up_proj, down_proj, without) = block();
    let gate_up = GateUp::separate(gate_proj, up_proj, Some(gate.clone()), Some(up.clone()));
    let weights = Weights::new(gate_up, down_proj, Some(down.clone()));
    let expected = output(&SwiGluFfn::from_weights(&cfg, weights).unwrap());
    assert_ne!(expected, output(&without));
    let biases = families("bias", [&gate, &up, &down]);
    for (family, prefix, mut tensors, _) in all_weights() {
        let same = biases.iter().find(|other| (other.0, other.1) == (family, prefix)).unwrap();
        tensors.extend(same.2.clone());
        for (source, vb) in sources(&tensors) {
            let ffn = SwiGluFfn::new(&cfg.clone().with_family(family), vb.pp(prefix)).unwrap();
            assert_eq!(output(&ffn), expected, "{family:?} at {prefix} from {source}");
        }
    }
}

#[test]
fn linear_takes_a_bias_where_there_is_one() {
    let bias = integers(&[I], 5);
    let mut tensors = llama("mlp");
    tensors.insert("mlp.gate_proj.bias".into(), bias.clone());
    for (source, vb) in sources(&tensors) {
        let with = Linear::load(H, I, vb.pp("mlp.gate_proj")).unwrap();
        assert_eq!(
            with.bias().unwrap().unwrap().to_vec1::<f32>().unwrap(),
            bias.to_vec1::<f32>().unwrap(),
            "{source}"
        );
        assert!(
            linear_b(H, I, true, vb.pp("mlp.gate_proj")).unwrap().bias().unwrap().is_some(),
            "{source}"
        );
        assert!(
            Linear::load(H, I, vb.pp("mlp.up_proj")).unwrap().bias().unwrap().is_none(),
            "{source}"
        );
        assert!(
            linear_b(H, I, false, vb.pp("mlp.up_proj")).unwrap().bias().unwrap().is_none(),
            "{source}"
        );
    }
}

#[test]
fn zeros() {
    let vb = VarBuilder::zeros(DType::F32, &Device::Cpu);
    let all =
        all_weights().into_iter().map(|(family, ..)| FfnConfig::new(H, I).with_family(family));
    for cfg in all.chain([FfnConfig::new(H, I), FfnConfig::new(H, I).with_bias(true)]) {
        let ffn = SwiGluFfn::new(&cfg, vb.pp("mlp")).unwrap();
        assert_eq!(output(&ffn), vec![0.0; 3 * H], "{cfg:?}");
    }
}
