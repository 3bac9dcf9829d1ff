//! Checkpoints read through [`Checkpoint`] and through candle's own loaders: files, dtypes,
//! families.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, missing_docs)]

use std::collections::{BTreeMap, HashMap};
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use candle_core::{DType, Device, Tensor};
use candle_nn::Module;
use candle_swiglu::{Checkpoint, FfnConfig, SwiGluFfn};
use serde_json::json;
use tempfile::TempDir;

mod dtypes;
mod families;

const H: usize = 6;
const I: usize = 10;
const FLOATS: [DType; 4] = [DType::F16, DType::BF16, DType::F32, DType::F64];

type Tensors = BTreeMap<String, Tensor>;

/// Small integers: gate and up are exact in f32, so every layout must give the same bits.
fn integers(shape: &[usize], seed: u64) -> Tensor {
    let n: usize = shape.iter().product();
    let values = (0..n as u64).map(|i| ((i * 7 + seed * 13 + i * i % 11) % 9) as f32 - 4.0);
    Tensor::from_iter(values, &Device::Cpu).unwrap().reshape(shape).unwrap()
}

fn named(prefix: &str, tensors: &[(&str, &Tensor)]) -> Tensors {
    tensors.iter().map(|(name, tensor)| (format!("{prefix}.{name}"), (*tensor).clone())).collect()
}

fn save(path: impl AsRef<Path>, tensors: &Tensors) {
    let tensors: HashMap<String, Tensor> = tensors.clone().into_iter().collect();
    candle_core::safetensors::save(&tensors, path).unwrap();
}

/// A directory with a config of this block.
fn directory() -> TempDir {
    let dir = TempDir::new().unwrap();
    let config = json!({"hidden_size": H, "intermediate_size": I, "vocab_size": 256});
    std::fs::write(dir.path().join("config.json"), config.to_string()).unwrap();
    dir
}

fn single(tensors: &Tensors) -> TempDir {
    let dir = directory();
    save(dir.path().join("model.safetensors"), tensors);
    dir
}

/// gate_proj (I,H), up_proj (I,H), down_proj (H,I), and a block made of them
fn block() -> (Tensor, Tensor, Tensor, SwiGluFfn) {
    let (gate, up, down) = (integers(&[I, H], 1), integers(&[I, H], 2), integers(&[H, I], 3));
    let ffn = SwiGluFfn::from_tensors(gate.clone(), up.clone(), down.clone()).unwrap();
    (gate, up, down, ffn)
}

fn llama(prefix: &str) -> Tensors {
    let (gate, up, down, _) = block();
    named(
        prefix,
        &[("gate_proj.weight", &gate), ("up_proj.weight", &up), ("down_proj.weight", &down)],
    )
}

/// The outputs of one block for a few rows.
fn output(ffn: &SwiGluFfn) -> Vec<f32> {
    let x = integers(&[3, H], 4);
    ffn.forward(&x).unwrap().to_dtype(DType::F32).unwrap().flatten_all().unwrap().to_vec1().unwrap()
}

fn bytes(tensors: &Tensors) -> u64 {
    tensors.values().map(|t| (t.elem_count() * t.dtype().size_in_bytes()) as u64).sum()
}

fn assert_same(checkpoint: &Checkpoint, tensors: &Tensors) {
    assert!(checkpoint.names().eq(tensors.keys()));
    assert_eq!(checkpoint.data_bytes(), bytes(tensors));
    for (name, tensor) in tensors {
        let loaded = checkpoint.tensor(name, tensor.dtype(), &Device::Cpu).unwrap();
        assert_eq!(loaded.dims(), tensor.dims(), "{name}");
        let values = |t: &Tensor| {
            t.flatten_all().unwrap().to_dtype(DType::F64).unwrap().to_vec1::<f64>().unwrap()
        };
        assert_eq!(values(&loaded), values(tensor), "{name}");
    }
}

fn index(dir: &TempDir, map: &[(&str, &str)]) {
    let map: serde_json::Map<_, _> =
        map.iter().map(|(tensor, file)| (tensor.to_string(), json!(file))).collect();
    let json = json!({"metadata": {"total_size": 0}, "weight_map": map}).to_string();
    std::fs::write(dir.path().join("model.safetensors.index.json"), json).unwrap();
}

#[test]
fn a_single_file() {
    let mut tensors = llama("model.layers.0.mlp");
    tensors.insert("model.norm.weight".into(), integers(&[H], 5).to_dtype(DType::BF16).unwrap());
    tensors.insert("counts".into(), Tensor::new(&[1u32, 2, 3], &Device::Cpu).unwrap()); // only floats can be loaded
    let dir = single(&tensors);
    let checkpoint = Checkpoint::open(dir.path()).unwrap();
    assert_eq!(checkpoint.dir(), dir.path());
    assert_eq!(checkpoint.config()["vocab_size"], 256);
    assert!(checkpoint.names().eq(tensors.keys()));
    assert_eq!(checkpoint.data_bytes(), bytes(&tensors));
    assert!(checkpoint.contains("model.norm.weight"));
    assert!(
        !checkpoint.contains("model.norm")
            && !checkpoint.contains("norm.weight")
            && !checkpoint.contains("")
    );
    let described = format!("{checkpoint:?}");
    assert!(described.contains("files: 1") && described.contains("tensors: 5"), "{described}");

    let cfg = FfnConfig::from_json(checkpoint.config()).unwrap();
    let vb = checkpoint.var_builder(DType::F32, &Device::Cpu);
    assert!(
        vb.contains_tensor("model.norm.weight") && vb.pp("model").contains_tensor("norm.weight")
    );
    assert_eq!(vb.to_dtype(DType::F64).get(H, "model.norm.weight").unwrap().dtype(), DType::F64);
    assert_eq!(vb.get_unchecked("model.norm.weight").unwrap().dims(), [H]);
    let ffn = SwiGluFfn::new(&cfg, vb.pp("model.layers.0.mlp")).unwrap();
    assert_eq!(output(&ffn), output(&block().3));
}

#[test]
fn shards_and_their_index() {
    let tensors = llama("mlp");
    let part = |names: &[&str]| {
        names.iter().map(|n| (n.to_string(), tensors[*n].clone())).collect::<Tensors>()
    };
    let dir = directory();
    let [a, b] = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"];
    save(dir.path().join(a), &part(&["mlp.down_proj.weight", "mlp.up_proj.weight"]));
    save(dir.path().join(b), &part(&["mlp.gate_proj.weight"]));
    index(
        &dir,
        &[("mlp.down_proj.weight", a), ("mlp.up_proj.weight", a), ("mlp.gate_proj.weight", b)],
    );
    assert_same(&Checkpoint::open(dir.path()).unwrap(), &tensors);

    // A tensor that the index does not name is found too.
    index(&dir, &[("mlp.down_proj.weight", a), ("mlp.gate_proj.weight", b)]);
    assert_same(&Checkpoint::open(dir.path()).unwrap(), &tensors);

    // If two shards contain a tensor, the index decides.
    let mut stale = part(&["mlp.gate_proj.weight"]);
    stale.insert("mlp.up_proj.weight".into(), integers(&[1, 1], 9));
    save(dir.path().join(b), &stale);
    index(
        &dir,
        &[("mlp.down_proj.weight", a), ("mlp.up_proj.weight", a), ("mlp.gate_proj.weight", b)],
    );
    assert_same(&Checkpoint::open(dir.path()).unwrap(), &tensors);

    // A single file takes precedence over an index, as in transformers.
    let other = named("mlp", &[("router.weight", &integers(&[2, H], 1))]);
    save(dir.path().join("model.safetensors"), &other);
    assert_same(&Checkpoint::open(dir.path()).unwrap(), &other);
}

#[test]
fn metas_own_files() {
    let (gate, up, down, ffn) = block();
    let tensors = named(
        "layers.0.feed_forward",
        &[("w1.weight", &gate), ("w3.weight", &up), ("w2.weight", &down)],
    );
    for file in ["consolidated.safetensors", "consolidated.00.safetensors"] {
        let dir = TempDir::new().unwrap();
        std::fs::write(
            dir.path().join("params.json"),
            r#"{"dim": 6, "multiple_of": 10, "ffn_dim_multiplier": 0.5}"#,
        )
        .unwrap();
        save(dir.path().join(file), &tensors);
        let checkpoint = Checkpoint::open(dir.path()).unwrap();
        assert_same(&checkpoint, &tensors);
        let cfg = FfnConfig::from_json(checkpoint.config()).unwrap();
        let vb = checkpoint.var_builder(DType::F32, &Device::Cpu);
        let loaded = SwiGluFfn::new(&cfg, vb.pp("layers").pp(0).pp("feed_forward")).unwrap();
        assert_eq!(output(&loaded), output(&ffn), "{file}");
    }
}

#[test]
fn progress_counts_every_byte_once() {
    let tensors = llama("mlp");
    let dir = single(&tensors);
    for dtype in FLOATS {
        let read = Arc::new(AtomicU64::new(0));
        let counter = read.clone();
        let checkpoint = Checkpoint::open(dir.path()).unwrap();
        let checkpoint = checkpoint.with_progress(move |n| {
            counter.fetch_add(n, Ordering::Relaxed);
        });
        assert_eq!(read.load(Ordering::Relaxed), 0, "opening reads headers only");
        SwiGluFfn::new(
            &FfnConfig::new(H, I),
            checkpoint.var_builder(dtype, &Device::Cpu).pp("mlp"),
        )
        .unwrap();
        assert_eq!(read.load(Ordering::Relaxed), checkpoint.data_bytes(), "{dtype:?}");
    }
}

#[test]
fn what_is_loaded_does_not_need_the_files() {
    let dir = single(&llama("mlp"));
    let checkpoint = Checkpoint::open(dir.path()).unwrap();
    let ffn = SwiGluFfn::new(
        &FfnConfig::new(H, I),
        checkpoint.var_builder(DType::F32, &Device::Cpu).pp("mlp"),
    )
    .unwrap();
    let file = dir.path().join("model.safetensors");
    let length = std::fs::metadata(&file).unwrap().len();
    std::fs::write(&file, vec![0xff; length as usize]).unwrap();
    assert_eq!(output(&ffn), output(&block().3), "overwritten in place");
    drop((checkpoint, dir));
    assert_eq!(output(&ffn), output(&block().3), "removed");
}

#[test]
fn threads_share_one_checkpoint() {
    let dir = single(&llama("mlp"));
    let checkpoint = Checkpoint::open(dir.path()).unwrap();
    let expected = output(&block().3);
    std::thread::scope(|scope| {
        for _ in 0..4 {
            let (checkpoint, expected) = (checkpoint.clone(), &expected);
            scope.spawn(move || {
                for _ in 0..20 {
                    let vb = checkpoint.var_builder(DType::F32, &Device::Cpu);
                    let ffn = SwiGluFfn::new(&FfnConfig::new(H, I), vb.pp("mlp")).unwrap();
                    assert_eq!(&output(&ffn), expected);
                }
            });
        }
    });
}
