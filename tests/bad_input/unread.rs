//! Tensors under a layer's prefix that the layer does not read.

use std::collections::HashMap;

use candle_nn::{VarBuilder, VarMap};
use candle_swiglu::{Linear, embedding, linear_no_bias, swiglu_ffn};

use super::*;

/// A block under `model.layers.0.mlp`, a projection outside of it, and the tensor `name`.
fn with(name: &str, shape: &[usize]) -> HashMap<String, Tensor> {
    let of =
        |name: &str, shape: &[usize]| (format!("model.layers.0.{name}"), zeros(shape, DType::F32));
    HashMap::from([
        of("mlp.gate_proj.weight", &[I, H]),
        of("mlp.up_proj.weight", &[I, H]),
        of("mlp.down_proj.weight", &[H, I]),
        of("self_attn.q_proj.weight", &[H, H]),
        of(name, shape),
    ])
}

/// A checkpoint, which lists its tensors, and candle's own sources, which cannot.
fn sources(tensors: &HashMap<String, Tensor>) -> Vec<(&'static str, VarBuilder<'static>)> {
    let dir = directory(&[]);
    let file = dir.path().join("model.safetensors");
    candle_core::safetensors::save(tensors, &file).unwrap();
    let (dtype, device) = (DType::F32, &Device::Cpu);
    let bytes = std::fs::read(&file).unwrap();
    let vars = VarMap::new();
    for (name, tensor) in tensors {
        vars.data()
            .lock()
            .unwrap()
            .insert(name.clone(), candle_core::Var::from_tensor(tensor).unwrap());
    }
    vec![
        ("Checkpoint", Checkpoint::open(dir.path()).unwrap().var_builder(dtype, device)),
        ("buffered", VarBuilder::from_buffered_safetensors(bytes, dtype, device).unwrap()),
        ("tensors", VarBuilder::from_tensors(tensors.clone(), dtype, device)),
        ("VarMap", VarBuilder::from_varmap(&vars, dtype, device)),
    ]
}

#[test]
fn what_the_block_does_not_read_is_named() {
    for (name, shape) in [
        ("mlp.ffn_layernorm.weight", &[I][..]),
        ("mlp.ffn_sub_norm.weight", &[I]),
        ("mlp.norm.weight", &[I]),
        ("mlp.gate_proj.lora_A.default.weight", &[2, H]),
        ("mlp.gate_proj.lora_B.default.weight", &[I, 2]),
        ("mlp.up_proj.lora_A.weight", &[2, H]),
        ("mlp.down_proj.weight_scale", &[1]),
        ("mlp.gate_proj.weight_scale_inv", &[1, 1]),
        ("mlp.up_proj.scales", &[I, 1]),
        ("mlp.up_proj.biases", &[I, 1]),
        ("mlp.up_proj.lora_a", &[I, 1]),
        ("mlp.dwconv.weight", &[I]),
    ] {
        for (source, vb) in sources(&with(name, shape)) {
            let block = swiglu_ffn(&FfnConfig::new(H, I), vb.pp("model.layers.0.mlp"));
            let full = format!("model.layers.0.{name}");
            println!("{source} {name}");
            assert_error!(
                block,
                Error::UnreadTensors { layer: "block", .. },
                [full.as_str(), "would not be read"]
            );
        }
    }
    // Only a checkpoint can list a name that is not known. Names like those of attention do not
    // turn the prefix of a block into that of a whole layer.
    for name in ["something_new", "conv.weight", "attn_ln.weight", "mixer_norm.weight"] {
        let full = format!("model.layers.0.mlp.{name}");
        let (_, vb) = sources(&with(&format!("mlp.{name}"), &[3])).remove(0);
        let block = swiglu_ffn(&FfnConfig::new(H, I), vb.pp("model.layers.0.mlp"));
        assert_error!(block, Error::UnreadTensors { .. }, [full.as_str()]);
    }
}

#[test]
fn what_is_beside_the_block_is_not_its_own() {
    for name in [
        "input_layernorm.weight",
        "self_attn.q_norm.weight",
        "mlp_norm.weight",
        "mlp.rotary_emb.inv_freq",
    ] {
        for (source, vb) in sources(&with(name, &[I])) {
            let block = swiglu_ffn(&FfnConfig::new(H, I), vb.pp("model.layers.0.mlp"));
            assert!(block.is_ok(), "{source} {name}: {block:?}");
        }
    }
    // A tensor that the caller has read before belongs to another layer.
    let (_, vb) = sources(&with("mlp.router.weight", &[I])).remove(0);
    assert!(vb.get(I, "model.layers.0.mlp.router.weight").is_ok());
    assert!(swiglu_ffn(&FfnConfig::new(H, I), vb.pp("model.layers.0.mlp")).is_ok());
    // Under the prefix of a whole layer (GGUF's names), attention and norms belong to other layers.
    let names = [
        ("ffn_gate", [I, H]),
        ("ffn_up", [I, H]),
        ("ffn_down", [H, I]),
        ("attn_q", [H, H]),
        ("attn_norm", [H, 1]),
    ];
    let layer =
        names.map(|(name, shape)| (format!("blk.0.{name}.weight"), zeros(&shape, DType::F32)));
    for (source, vb) in sources(&layer.into_iter().collect()) {
        let block = swiglu_ffn(&FfnConfig::new(H, I), vb.pp("blk.0"));
        assert!(block.is_ok(), "{source}: {block:?}");
    }
}

#[test]
fn what_a_linear_layer_does_not_read_is_named() {
    for (name, shape) in
        [("lora_A.weight", &[2, H][..]), ("weight_scale", &[1]), ("qweight", &[1, I])]
    {
        let tensors = HashMap::from([
            ("q_proj.weight".to_string(), zeros(&[I, H], DType::F32)),
            (format!("q_proj.{name}"), zeros(shape, DType::F32)),
        ]);
        let full = format!("q_proj.{name}");
        for (_, vb) in sources(&tensors) {
            let parts = [full.as_str(), "the linear layer would compute"];
            assert_error!(
                linear_no_bias(H, I, vb.pp("q_proj")),
                Error::UnreadTensors { .. },
                parts
            );
            assert_error!(Linear::load(H, I, vb.pp("q_proj")), Error::UnreadTensors { .. }, parts);
        }
    }
    let tensors = HashMap::from([("embed.weight".to_string(), zeros(&[I, H], DType::F32))]);
    for (_, vb) in sources(&tensors) {
        assert!(embedding(I, H, vb.pp("embed")).is_ok());
    }
    for name in ["weight_scale", "lora_embedding_A.default"] {
        let full = format!("embed.{name}");
        let mut tensors = tensors.clone();
        tensors.insert(full.clone(), zeros(&[1], DType::F32));
        for (_, vb) in sources(&tensors) {
            let parts = [full.as_str(), "the embedding would compute"];
            assert_error!(embedding(I, H, vb.pp("embed")), Error::UnreadTensors { .. }, parts);
        }
    }
}

#[test]
fn the_prefix_that_was_meant() {
    let tensors = with("mlp_norm.weight", &[I]);
    for (source, vb) in sources(&tensors) {
        for wrong in ["", "mlp", "layers.0.mlp", "model.layers.0", "model.layers.7.mlp"] {
            // Other sources cannot list other layers, and a VarMap creates missing tensors.
            if source == "VarMap" || (source != "Checkpoint" && wrong.contains('7')) {
                continue;
            }
            let vb = if wrong.is_empty() { vb.clone() } else { vb.pp(wrong) };
            let block = swiglu_ffn(&FfnConfig::new(H, I), vb);
            println!("{source} {wrong:?}");
            if source != "Checkpoint" && !wrong.contains('0') {
                assert_error!(block, Error::MissingTensor { .. }, ["gate_proj.weight"]);
            } else {
                assert_error!(
                    block,
                    Error::MissingTensor { .. },
                    ["did you mean \"model.layers.0.mlp\"?"]
                );
            }
        }
    }
    // The error lists only some of many names, and the number of the others.
    let many = (0..30).map(|n| (format!("layers.{n:02}.norm.weight"), zeros(&[H], DType::F32)));
    let (_, vb) = sources(&many.collect()).remove(0);
    let block = swiglu_ffn(&FfnConfig::new(H, I), vb);
    assert_error!(block, Error::MissingTensor { .. }, ["layers.19.norm.weight and 10 more"]);
}

#[test]
fn an_mlp_without_a_gate_is_called_one() {
    for (up, down) in [
        ("c_fc", "c_proj"),
        ("fc1", "fc2"),
        ("up_proj", "down_proj"),
        ("dense_h_to_4h", "dense_4h_to_h"),
    ] {
        let of =
            |name: &str, shape: &[usize]| (format!("mlp.{name}.weight"), zeros(shape, DType::F32));
        // dense_h_to_4h with 2I rows is ChatGLM's gate and up.
        for (source, vb) in sources(&HashMap::from([of(up, &[I, H]), of(down, &[H, I])])) {
            if source == "VarMap" {
                continue; // a VarMap creates missing tensors
            }
            let block = swiglu_ffn(&FfnConfig::new(H, I), vb.pp("mlp"));
            match up {
                "dense_h_to_4h" => assert_error!(
                    block,
                    Error::Shape { .. },
                    ["dense_h_to_4h", "[12, 4]", "[6, 4]"]
                ),
                _ => assert_error!(block, Error::PlainMlp { .. }, [up, down, "without a gate"]),
            }
        }
    }
}

#[test]
fn a_bias_without_a_prefix() {
    let tensors = HashMap::from([
        ("weight".to_string(), zeros(&[I, H], DType::F32)),
        ("bias".to_string(), zeros(&[I], DType::F32)),
    ]);
    for (_, vb) in sources(&tensors) {
        let error = linear_no_bias(H, I, vb).unwrap_err();
        assert!(
            matches!(error, Error::UnexpectedBias { .. })
                && error.to_string().starts_with("bias is"),
            "{error}"
        );
    }
}
