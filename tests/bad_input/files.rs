//! Broken directories and files.

use std::fs;
use std::io::Write;

use super::*;

#[test]
fn not_a_directory() {
    let dir = directory(&[("model.safetensors", &block())]);
    let file = dir.path().join("model.safetensors");
    assert_error!(
        Checkpoint::open(&file),
        Error::NotADirectory { .. },
        [file.to_str().unwrap(), "directory", "found a file"]
    );
    let nowhere = dir.path().join("nowhere");
    assert_error!(Checkpoint::open(&nowhere), Error::Io { .. }, [nowhere.to_str().unwrap()]);
    assert_error!(Checkpoint::open(file.join("below")), Error::Io { .. }, ["below"]);
    assert_error!(Checkpoint::open(""), Error::Io { .. }, [""; 0]);
}

#[test]
fn files_that_are_not_there() {
    let empty = TempDir::new().unwrap();
    let place = empty.path().to_str().unwrap();
    assert_error!(
        Checkpoint::open(place),
        Error::NoConfig { .. },
        [place, "config.json", "params.json"]
    );
    fs::write(empty.path().join("model.safetensors"), block()).unwrap();
    assert_error!(Checkpoint::open(place), Error::NoConfig { .. }, [place]);
    for other in
        ["pytorch_model.bin", "model.gguf", "adapter_model.safetensors", "consolidated.00.pth"]
    {
        let dir = directory(&[(other, b"")]);
        let parts = [
            dir.path().to_str().unwrap(),
            "model.safetensors",
            "model.safetensors.index.json",
            "consolidated",
        ];
        assert_error!(Checkpoint::open(dir.path()), Error::NoWeights { .. }, parts);
    }
}

#[test]
fn directories_instead_of_files() {
    for (name, others) in [
        ("config.json", &["model.safetensors"][..]),
        ("model.safetensors", &["config.json"]),
        ("model.safetensors.index.json", &["config.json"]),
        ("consolidated.safetensors", &["config.json"]),
        ("a.safetensors", &["config.json", "model.safetensors.index.json"]),
    ] {
        let dir = TempDir::new().unwrap();
        fs::create_dir(dir.path().join(name)).unwrap();
        for other in others {
            let index = r#"{"weight_map": {"mlp.up_proj.weight": "a.safetensors"}}"#;
            let bytes = match *other {
                "config.json" => CONFIG.as_bytes().to_vec(),
                "model.safetensors" => block(),
                _ => index.as_bytes().to_vec(),
            };
            fs::write(dir.path().join(other), bytes).unwrap();
        }
        let place = dir.path().join(name);
        assert_error!(
            Checkpoint::open(dir.path()),
            Error::NotAFile { .. },
            [place.to_str().unwrap(), "found a directory"]
        );
    }
}

/// Opening a pipe would block, because no process writes to it.
#[cfg(unix)]
#[test]
fn a_pipe_instead_of_a_file() {
    let dir = directory(&[]);
    let pipe = dir.path().join("model.safetensors");
    assert!(std::process::Command::new("mkfifo").arg(&pipe).status().unwrap().success());
    assert_error!(Checkpoint::open(dir.path()), Error::NotAFile { .. }, [pipe.to_str().unwrap()]);
}

#[cfg(unix)]
#[test]
fn files_that_may_not_be_read() {
    use std::os::unix::fs::PermissionsExt;
    for name in ["config.json", "model.safetensors"] {
        let dir = directory(&[("model.safetensors", &block())]);
        let path = dir.path().join(name);
        fs::set_permissions(&path, fs::Permissions::from_mode(0o000)).unwrap();
        if fs::read(&path).is_ok() {
            return eprintln!("skipped: this user may read every file");
        }
        assert_error!(
            Checkpoint::open(dir.path()),
            Error::Io { .. },
            [path.to_str().unwrap(), "denied"]
        );
    }
}

#[test]
fn configs_that_are_not_json() {
    for bytes in [
        &b""[..],
        b"{",
        b"{\"hidden_size\": }",
        b"\xff\xfe",
        b"{} {}",
        b"{\"a\": \"\xff\"}",
        &[b'['; 100_000],
    ] {
        let dir = directory(&[("model.safetensors", &block())]);
        fs::write(dir.path().join("config.json"), bytes).unwrap();
        assert_error!(
            Checkpoint::open(dir.path()),
            Error::Json { .. },
            ["config.json: not valid JSON"]
        );
    }
    // Valid JSON that is not a config: the error names the missing field.
    for json in ["[]", "null", "{}", "7", "\"llama\""] {
        let dir = directory(&[("model.safetensors", &block())]);
        fs::write(dir.path().join("config.json"), json).unwrap();
        let checkpoint = Checkpoint::open(dir.path()).unwrap();
        assert_error!(
            FfnConfig::from_json(checkpoint.config()),
            Error::MissingField { .. },
            ["missing field hidden_size"]
        );
    }
}

#[test]
fn a_file_cut_anywhere() {
    let whole = block();
    let header = whole.len() - 3 * 4 * H * I;
    for length in 0..whole.len() {
        let opened = open_file(&whole[..length]);
        if length < header {
            assert_error!(
                opened,
                Error::Header { .. },
                ["model.safetensors: broken safetensors header"]
            );
        } else {
            let parts = [
                format!("expected {} bytes", whole.len()),
                format!("found {length}"),
                "model.safetensors".into(),
            ];
            assert_error!(opened, Error::FileSize { .. }, parts.iter().map(String::as_str));
        }
    }
    for more in [1, 7, 8, 4096] {
        let mut bytes = whole.clone();
        bytes.resize(whole.len() + more, 0);
        let parts = [format!("expected {} bytes", whole.len()), format!("found {}", bytes.len())];
        assert_error!(open_file(&bytes), Error::FileSize { .. }, parts.iter().map(String::as_str));
    }
}

#[test]
fn a_file_cut_after_it_was_opened() {
    let dir = directory(&[("model.safetensors", &block())]);
    let checkpoint = Checkpoint::open(dir.path()).unwrap();
    let path = dir.path().join("model.safetensors");
    fs::OpenOptions::new().write(true).open(&path).unwrap().set_len(400).unwrap();
    let vb = checkpoint.var_builder(DType::F32, &Device::Cpu);
    assert_error!(
        SwiGluFfn::new(&FfnConfig::new(H, I), vb.pp("mlp")),
        Error::Io { .. },
        [path.to_str().unwrap()]
    );
}

#[test]
fn headers_that_lie() {
    let one = |shape: &str, offsets: &str| {
        format!(r#"{{"w":{{"dtype":"F32","shape":{shape},"data_offsets":{offsets}}}}}"#)
    };
    let two = |first: &str, second: &str| {
        let tensor = |name, offsets| {
            format!(r#""{name}":{{"dtype":"F32","shape":[2],"data_offsets":{offsets}}}"#)
        };
        format!("{{{},{}}}", tensor("first", first), tensor("second", second))
    };
    let max = u64::MAX;
    for (header, reason) in [
        // not a valid header
        (String::new(), ""),
        ("{".into(), ""),
        ("[]".into(), ""),
        ("null".into(), ""),
        (format!(r#"{{"w":{}"#, "[".repeat(10_000)), "recursion"),
        (r#"{"w":{}}"#.into(), "dtype"),
        (r#"{"w":{"dtype":"F32","shape":[4]}}"#.into(), "data_offsets"),
        (r#"{"w":{"dtype":"F31","shape":[4],"data_offsets":[0,16]}}"#.into(), "F31"),
        (r#"{"__metadata__":{"format":7}}"#.into(), ""),
        (r#"{"w":{"dtype":"F4","shape":[3],"data_offsets":[0,1]}}"#.into(), ""),
        // shapes and offsets that contradict each other
        (one("[4]", "[0,12]"), ""),
        (one("[4]", "[0,20]"), ""),
        (one("[]", "[0,16]"), ""),
        (one("[4]", "[16,0]"), "w"),
        (one("[4]", "[4,20]"), "w"),
        (one("[4]", "[-16,0]"), ""),
        (one("[-4]", "[0,16]"), ""),
        (one("[4.0]", "[0,16]"), ""),
        (one("[4]", &format!("[0,{max}]")), ""),
        (one("[4]", "[0,18446744073709551616]"), ""),
        // products that overflow
        (one("[4294967296,4294967296]", "[0,0]"), "overflow"),
        (one(&format!("[{max},2]"), "[0,16]"), "overflow"),
        (one(&format!("[{}]", max / 8), "[0,16]"), "overflow"),
        // tensors that overlap, or leave a hole
        (two("[0,8]", "[0,8]"), ""),
        (two("[0,8]", "[4,12]"), "second"),
        (two("[0,8]", "[9,17]"), "second"),
        (two("[8,16]", "[16,24]"), "first"),
    ] {
        assert_error!(
            open_file(&file(&header, 16)),
            Error::Header { .. },
            ["model.safetensors: broken safetensors header", reason]
        );
    }
    // Without elements any shape has the right size, but its strides overflow.
    for shape in ["[0,4294967296,4294967296]", "[4294967296,0,4294967296]"] {
        let opened = open_file(&file(&one(shape, "[0,0]"), 0));
        assert_error!(
            opened,
            Error::Header { .. },
            ["model.safetensors", "w: shape [", "strides that overflow"]
        );
    }
    // bytes that are not UTF-8
    let mut bytes = file(&one("[4]", "[0,16]"), 16);
    bytes[10] = 0xff;
    assert_error!(
        open_file(&bytes),
        Error::Header { .. },
        ["model.safetensors: broken safetensors header"]
    );
    // a valid header with data of another length
    for (header, data) in [
        (one("[4]", "[0,16]"), 12),
        (one("[4]", "[0,16]"), 20),
        (one("[144115188075855872]", "[0,576460752303423488]"), 16),
    ] {
        assert_error!(
            open_file(&file(&header, data)),
            Error::FileSize { .. },
            ["model.safetensors: expected ", " bytes"]
        );
    }
}

#[test]
fn headers_of_a_false_length() {
    let whole = block();
    let real = u64::from_le_bytes(whole[..8].try_into().unwrap());
    let rest = whole.len() as u64 - 8;
    for length in [
        0,
        1,
        real - 1,
        real + 1,
        rest,
        rest + 1,
        100_000_001,
        1 << 32,
        1 << 60,
        i64::MAX as u64,
        u64::MAX - 7,
        u64::MAX,
    ] {
        let mut bytes = whole.clone();
        bytes[..8].copy_from_slice(&length.to_le_bytes());
        assert_error!(
            open_file(&bytes),
            Error::Header { .. },
            ["model.safetensors: broken safetensors header"]
        );
    }
}

/// A directory with an index that maps `mlp.up_proj.weight` to `shard`, and the shard
/// `a.safetensors`.
fn indexed(shard: &str) -> TempDir {
    let json = serde_json::json!({"weight_map": {"mlp.up_proj.weight": shard}}).to_string();
    directory(&[("model.safetensors.index.json", json.as_bytes()), ("a.safetensors", &block())])
}

#[test]
fn indexes() {
    const INDEX: &str = "model.safetensors.index.json";
    assert!(Checkpoint::open(indexed("a.safetensors").path()).is_ok());
    let missing = indexed("b.safetensors");
    let parts = [INDEX, "shard b.safetensors", "mlp.up_proj.weight", "missing"];
    assert_error!(Checkpoint::open(missing.path()), Error::MissingShard { .. }, parts);
    let json = br#"{"weight_map": {"mlp.up_proj.weight": "a.safetensors", "norm.weight": "a.safetensors"}}"#;
    let lacking = directory(&[(INDEX, json), ("a.safetensors", &block())]);
    assert_error!(
        Checkpoint::open(lacking.path()),
        Error::NotInShard { .. },
        [INDEX, "norm.weight", "a.safetensors"]
    );
    // no paths outside the directory
    let outside = directory(&[("a.safetensors", &block())]);
    let absolute = outside.path().join("a.safetensors");
    for path in [
        "../a.safetensors",
        "..",
        ".",
        "",
        "/",
        "/etc/passwd",
        "x/a.safetensors",
        "./../a.safetensors",
        absolute.to_str().unwrap(),
    ] {
        let parts = [INDEX, "weight_map.mlp.up_proj.weight", "expected a file name", path];
        assert_error!(Checkpoint::open(indexed(path).path()), Error::Index { .. }, parts);
    }
    assert_error!(
        Checkpoint::open(indexed("a\0.safetensors").path()),
        Error::MissingShard { .. },
        ["a\0.safetensors"]
    );
    for (json, found) in [
        (r#"{}"#, "weight_map"),
        (r#"[]"#, "weight_map"),
        (r#"{"weight_map": null}"#, "weight_map"),
        (r#"{"weight_map": ["a.safetensors"]}"#, "weight_map"),
        (r#"{"weight_map": {}}"#, "weight_map"),
        (r#"{"weight_map": {"w": 1}}"#, "weight_map.w: expected a file name, found 1"),
        (r#"{"weight_map": {"w": null}}"#, "found null"),
        (r#"{"weight_map": {"w": ["a.safetensors"]}}"#, "weight_map.w"),
    ] {
        let dir = directory(&[(INDEX, json.as_bytes()), ("a.safetensors", &block())]);
        assert_error!(Checkpoint::open(dir.path()), Error::Index { .. }, [INDEX, found]);
    }
    let dir = directory(&[(INDEX, b"{\"weight_map\": {")]);
    assert_error!(Checkpoint::open(dir.path()), Error::Json { .. }, [INDEX, "not valid JSON"]);
    // A shard is checked like a single file.
    let json = br#"{"weight_map": {"w": "a.safetensors"}}"#;
    let dir = directory(&[(INDEX, json), ("a.safetensors", &block()[..100])]);
    assert_error!(Checkpoint::open(dir.path()), Error::Header { .. }, ["a.safetensors"]);
}

#[test]
fn a_tensor_in_two_files() {
    // Model-parallel halves of one tensor are not joined.
    let half = tensors(&[("layers.0.feed_forward.w1.weight", "F32", &[I / 2, H])]);
    let dir = directory(&[
        ("consolidated.00.safetensors", &half),
        ("consolidated.01.safetensors", &half),
    ]);
    let parts = [
        "layers.0.feed_forward.w1.weight",
        "consolidated.00.safetensors",
        "consolidated.01.safetensors",
    ];
    assert_error!(Checkpoint::open(dir.path()), Error::DuplicateTensor { .. }, parts);
    // The same holds for a tensor that the index does not name.
    let one = tensors(&[("w", "F32", &[2]), ("a", "F32", &[1])]);
    let two = tensors(&[("w", "F32", &[2]), ("b", "F32", &[1])]);
    let json = br#"{"weight_map": {"a": "1.safetensors", "b": "2.safetensors"}}"#;
    let files: [(&str, &[u8]); 3] =
        [("model.safetensors.index.json", json), ("1.safetensors", &one), ("2.safetensors", &two)];
    assert_error!(
        Checkpoint::open(directory(&files).path()),
        Error::DuplicateTensor { .. },
        ["w is both", "1.safetensors", "2.safetensors"]
    );
}

/// Opens the file and loads all tensors that it claims to contain. Errors are allowed, panics are
/// not. Returns whether the file opened.
fn try_everything(dir: &TempDir, bytes: &[u8]) -> bool {
    // All contents have the same length, so the file is overwritten in place. Some file systems
    // flush a file that was truncated and refilled, which takes 3 ms.
    let path = dir.path().join("model.safetensors");
    let mut file =
        fs::OpenOptions::new().write(true).create(true).truncate(false).open(path).unwrap();
    file.write_all(bytes).unwrap();
    let Ok(checkpoint) = Checkpoint::open(dir.path()) else { return false };
    for name in checkpoint.names() {
        for dtype in [DType::BF16, DType::F64] {
            let _ = checkpoint.tensor(name, dtype, &Device::Cpu);
        }
    }
    let vb = checkpoint.var_builder(DType::F32, &Device::Cpu);
    let _ = SwiGluFfn::new(&FfnConfig::new(H, I), vb.pp("mlp"));
    true
}

#[test]
fn every_byte_of_a_header_changed() {
    let whole = block();
    let header = whole.len() - 3 * 4 * H * I;
    let dir = directory(&[]);
    let (mut opened, mut tried) = (0, 0);
    let mut attempt = |bytes: &[u8]| {
        opened += usize::from(try_everything(&dir, bytes));
        tried += 1;
    };
    for at in 0..header {
        let flips = [1, 2, 4, 8, 16, 32, 64, 128].map(|bit| whole[at] ^ bit);
        for value in flips.into_iter().chain([0, 255, b'0', b'9', b'-', b'"', b'}', b']', b',']) {
            let mut bytes = whole.clone();
            bytes[at] = value;
            attempt(&bytes);
        }
    }
    // Up to four bytes changed at once, and sections moved.
    let mut state = 7u64;
    let mut random = |n: usize| {
        state = state.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
        (state >> 33) as usize % n
    };
    for _ in 0..3000 {
        let mut bytes = whole.clone();
        for _ in 0..=random(4) {
            bytes[8 + random(header - 8)] = b"0123456789[]{},:\"F ew."[random(22)];
        }
        let (from, to, n) = (8 + random(header - 8), 8 + random(header - 8), random(8));
        if from + n < header && to + n < header {
            bytes.copy_within(from..from + n, to);
        }
        attempt(&bytes);
    }
    // Most changes are refused, but names and dtypes of the same size can change.
    assert!(opened > 100 && opened < tried / 2, "{opened} of {tried} opened");
}
