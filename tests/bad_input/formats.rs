//! Checkpoints in unsupported formats, and JSON as Python writes it.

use std::fs;

use candle_swiglu::{FfnConfig, read_json};

use super::*;

#[test]
fn a_git_lfs_pointer() {
    let pointer = b"version https://git-lfs.github.com/spec/v1\noid sha256:00ff\nsize 4976698672\n";
    let dir = directory(&[("model.safetensors", pointer)]);
    let parts = ["model.safetensors", "Git LFS pointer", "4976698672 bytes", "git lfs pull"];
    assert_error!(
        Checkpoint::open(dir.path()),
        Error::LfsPointer { size: Some(4976698672), .. },
        parts
    );
    // Without a size, and in a shard.
    let index = br#"{"weight_map": {"mlp.up_proj.weight": "a.safetensors"}}"#;
    let dir = directory(&[
        ("model.safetensors.index.json", index),
        ("a.safetensors", b"version https://git-lfs\n"),
    ]);
    assert_error!(
        Checkpoint::open(dir.path()),
        Error::LfsPointer { size: None, .. },
        ["a.safetensors", "git lfs pull"]
    );
}

#[test]
fn quantized_weights_are_called_so_before_their_shapes() {
    let list: [(&str, &str, &[usize]); 4] = [
        ("mlp.gate_proj.weight", "U32", &[I, 1]),
        ("mlp.gate_proj.scales", "F16", &[I, 1]),
        ("mlp.up_proj.weight", "U32", &[I, 1]),
        ("mlp.down_proj.weight", "U32", &[H, 1]),
    ];
    for (key, value) in
        [("quantization", r#"{"bits": 4}"#), ("quantization_config", r#"{"quant_method": "x"}"#)]
    {
        let dir = directory(&[("model.safetensors", &tensors(&list))]);
        let config = format!(r#"{{"hidden_size": 4, "intermediate_size": 6, "{key}": {value}}}"#);
        fs::write(dir.path().join("config.json"), config).unwrap();
        let parts = ["mlp.gate_proj.weight", "U32", "[6, 1]", "quantized", key];
        assert_error!(
            load(&dir, &FfnConfig::new(H, I), "mlp"),
            Error::QuantizedTensor { .. },
            parts
        );
    }
    let dir = directory(&[("model.safetensors", &tensors(&list))]);
    assert_error!(
        load(&dir, &FfnConfig::new(H, I), "mlp"),
        Error::DTypeUnsupported { .. },
        ["mlp.gate_proj.weight", "U32"]
    );
}

#[cfg(unix)]
#[test]
fn links_to_nothing() {
    for name in ["config.json", "model.safetensors", "model.safetensors.index.json"] {
        let dir = TempDir::new().unwrap();
        if name != "config.json" {
            fs::write(dir.path().join("config.json"), CONFIG).unwrap();
        }
        std::os::unix::fs::symlink("../../blobs/00ff", dir.path().join(name)).unwrap();
        assert_error!(
            Checkpoint::open(dir.path()),
            Error::DanglingLink { .. },
            [name, "../../blobs/00ff", "not there"]
        );
    }
    let index = br#"{"weight_map": {"mlp.up_proj.weight": "a.safetensors"}}"#;
    let dir = directory(&[("model.safetensors.index.json", index)]);
    std::os::unix::fs::symlink("nowhere", dir.path().join("a.safetensors")).unwrap();
    assert_error!(
        Checkpoint::open(dir.path()),
        Error::DanglingLink { .. },
        ["a.safetensors", "nowhere"]
    );
}

#[test]
fn what_is_there_instead() {
    for (file, advice) in [
        ("pytorch_model.bin", "convert them to safetensors"),
        ("consolidated.00.pth", "convert them to safetensors"),
        ("model-q4_k_m.gguf", "GGUF file, which is not supported yet"),
        ("adapter_model.safetensors", "LoraAdapter::open reads"),
        ("tokenizer.model", "a tokenizer alone"),
        ("weights.safetensors", "rename it to model.safetensors"),
    ] {
        let dir = directory(&[(file, b"x")]);
        assert_error!(Checkpoint::open(dir.path()), Error::NoWeights { .. }, [file, advice]);
        fs::remove_file(dir.path().join("config.json")).unwrap();
        assert_error!(Checkpoint::open(dir.path()), Error::NoConfig { .. }, [file, advice]);
    }
}

#[test]
fn numbers_that_only_python_writes() {
    let dir = directory(&[("model.safetensors", &block())]);
    let config = r#"{"hidden_size": 4, "intermediate_size": 6, "a": NaN, "b": [Infinity, -Infinity], "c": "NaN, \" Infinity",
                     "time_step_limit": [0.0, Infinity]}"#;
    fs::write(dir.path().join("config.json"), config).unwrap();
    let checkpoint = Checkpoint::open(dir.path()).unwrap();
    assert_eq!(checkpoint.config()["c"], "NaN, \" Infinity");
    let cfg = FfnConfig::from_json(checkpoint.config()).unwrap();
    assert!(load(&dir, &cfg, "mlp").is_ok());
    // An error about such a number shows it.
    fs::write(dir.path().join("config.json"), r#"{"hidden_size": NaN, "intermediate_size": 6}"#)
        .unwrap();
    let cfg = FfnConfig::from_json(Checkpoint::open(dir.path()).unwrap().config());
    assert_error!(cfg, Error::InvalidField { .. }, ["hidden_size", "NaN"]);
    // Words that are similar to them are still invalid JSON.
    for broken in ["{\"a\": NaNs}", "{\"a\": Infinity", "{\"a\": nan}"] {
        fs::write(dir.path().join("config.json"), broken).unwrap();
        assert_error!(
            Checkpoint::open(dir.path()),
            Error::Json { .. },
            ["config.json", "not valid JSON"]
        );
    }
}

#[cfg(unix)]
#[test]
fn a_pipe_is_not_read() {
    let dir = TempDir::new().unwrap();
    let pipe = dir.path().join("generation_config.json");
    assert!(std::process::Command::new("mkfifo").arg(&pipe).status().unwrap().success());
    assert_error!(
        read_json(&pipe),
        Error::NotAFile { .. },
        ["generation_config.json", "a special file"]
    );
}

#[test]
fn which_tensors_have_been_read() {
    let dir = directory(&[("model.safetensors", &{
        let (ih, hi): (&[usize], &[usize]) = (&[I, H], &[H, I]);
        tensors(&[
            ("a.gate_proj.weight", "F32", ih),
            ("a.up_proj.weight", "F32", ih),
            ("a.down_proj.weight", "F32", hi),
            ("b.weight", "BF16", ih),
            ("c.weight", "BF16", ih),
            ("c.rotary_emb.inv_freq", "F32", &[2]),
        ])
    })]);
    let checkpoint = Checkpoint::open(dir.path()).unwrap();
    assert_eq!(checkpoint.unread().len(), 5);
    assert_eq!(checkpoint.dtype(), Some(DType::F32));
    assert_eq!(checkpoint.shape("b.weight"), Some(&[I, H][..]));
    let vb = checkpoint.clone().var_builder(DType::F32, &Device::Cpu);
    assert!(SwiGluFfn::new(&FfnConfig::new(H, I), vb.pp("a")).is_ok());
    assert_eq!(checkpoint.unread(), ["b.weight", "c.weight"]);
    assert!(checkpoint.same_data("b.weight", "c.weight").unwrap());
    assert!(!checkpoint.same_data("b.weight", "a.up_proj.weight").unwrap());
    assert_error!(checkpoint.same_data("b.weight", "d"), Error::MissingTensor { .. }, ["d"]);
    assert_eq!(checkpoint.unread(), ["b.weight", "c.weight"]);
    checkpoint.mark_read("c.weight");
    assert_eq!(checkpoint.unread(), ["b.weight"]);
    checkpoint.hide("b.weight");
    assert!(checkpoint.unread().is_empty() && !checkpoint.contains("b.weight"));
    assert!(!checkpoint.names().any(|name| name == "b.weight"));
    assert_error!(
        checkpoint.tensor("b.weight", DType::F32, &Device::Cpu),
        Error::MissingTensor { .. },
        ["weight", "b"]
    );
}
