//! Downloads from a hub that this test runs on loopback. Every file must arrive, none may be
//! downloaded twice, and every failure must be reported. Each download runs in a process of its
//! own, controlled by the environment variables that users set.
#![cfg(feature = "hub")]
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, missing_docs)]

use std::collections::BTreeMap;
use std::io::{BufRead, BufReader, Write};
use std::net::{TcpListener, TcpStream};
use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use std::sync::{Arc, Mutex};

use candle_core::{DType, Device};
use candle_swiglu::{Checkpoint, Error, hub};
use tempfile::TempDir;

const COMMIT: &str = "0123456789abcdef0123456789abcdef01234567";
const MODEL: &str = "someone/tiny-llama";
const SHARD: &str = "model-00002-of-00004.safetensors";

// ---------------------------------------------------------------- the hub

#[derive(Clone, Default)]
struct Behaviour {
    /// The only token that gives access to the model.
    token: Option<&'static str>,
    /// The connection closes after half of this file.
    cut: Option<&'static str>,
    /// Every response is 503.
    in_trouble: bool,
}

/// Serves the files of one model.
struct Hub {
    endpoint: String,
    /// Method and path of every request.
    requests: Arc<Mutex<Vec<String>>>,
}

impl Hub {
    fn start(files: BTreeMap<String, Vec<u8>>, behaviour: Behaviour) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let endpoint = format!("http://{}", listener.local_addr().unwrap());
        let requests = Arc::new(Mutex::new(vec![]));
        let (log, files) = (requests.clone(), Arc::new(files));
        std::thread::spawn(move || {
            for stream in listener.incoming().flatten() {
                let (log, files, behaviour) = (log.clone(), files.clone(), behaviour.clone());
                std::thread::spawn(move || answer(stream, &files, &behaviour, &log));
            }
        });
        Self { endpoint, requests }
    }

    /// The number of requests for the content of a file.
    fn downloads(&self) -> usize {
        let requests = self.requests.lock().unwrap();
        requests
            .iter()
            .filter(|request| request.starts_with("GET") && request.contains("/resolve/"))
            .count()
    }
}

fn answer(
    mut stream: TcpStream,
    files: &BTreeMap<String, Vec<u8>>,
    behaviour: &Behaviour,
    log: &Mutex<Vec<String>>,
) -> Option<()> {
    let mut lines = BufReader::new(stream.try_clone().ok()?).lines();
    let request = lines.next()?.ok()?;
    let headers: Vec<String> =
        lines.map_while(Result::ok).take_while(|line| !line.is_empty()).collect();
    let mut words = request.split(' ');
    let (method, target) = (words.next()?, words.next()?);
    let path = target.split('?').next()?;
    log.lock().unwrap().push(format!("{method} {path}"));

    let token = headers.iter().find_map(|line| {
        Some(line.to_lowercase().strip_prefix("authorization: bearer ")?.to_string())
    });
    let mut send = |status: &str, body: &[u8], sent: usize| {
        let head = format!(
            "HTTP/1.1 {status}\r\nContent-Length: {}\r\nETag: \"{:x}\"\r\nX-Repo-Commit: {COMMIT}\r\nConnection: close\r\n\r\n",
            body.len(),
            body.iter().fold(body.len() as u64, |sum, &byte| sum
                .wrapping_mul(31)
                .wrapping_add(u64::from(byte))),
        );
        stream.write_all(head.as_bytes()).ok()?;
        if method == "GET" {
            stream.write_all(&body[..sent]).ok()?;
        }
        stream.flush().ok()
    };
    let mut send_all = |status: &str, body: &[u8]| send(status, body, body.len());
    if behaviour.in_trouble {
        return send_all("503 Service Unavailable", b"");
    }
    if behaviour.token.is_some_and(|expected| token.as_deref() != Some(expected)) {
        return send_all("401 Unauthorized", br#"{"error": "Access to model is restricted"}"#);
    }
    if path == format!("/api/models/{MODEL}/revision/main") {
        return send_all("200 OK", format!(r#"{{"id": "{MODEL}", "sha": "{COMMIT}"}}"#).as_bytes());
    }
    if path == format!("/api/models/{MODEL}/tree/{COMMIT}") {
        let entry = |(name, bytes): (&String, &Vec<u8>)| {
            format!(r#"{{"type": "file", "oid": "1", "size": {}, "path": "{name}"}}"#, bytes.len())
        };
        let entries: Vec<String> = files.iter().map(entry).collect();
        return send_all("200 OK", format!("[{}]", entries.join(", ")).as_bytes());
    }
    let name = path.strip_prefix(&format!("/{MODEL}/resolve/{COMMIT}/")).unwrap_or_default();
    match files.get(name) {
        Some(bytes) if behaviour.cut == Some(name) => send("200 OK", bytes, bytes.len() / 2),
        Some(bytes) => send_all("200 OK", bytes),
        None => send_all("404 Not Found", br#"{"error": "Repository not found"}"#),
    }
}

fn golden() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden/models/gqa_tied_llama3_bf16")
}

/// The files of the golden model with four shards, and some that must not be downloaded.
fn files() -> BTreeMap<String, Vec<u8>> {
    let entries = std::fs::read_dir(golden()).unwrap().map(|entry| entry.unwrap().path());
    let read = |path: PathBuf| {
        (path.file_name().unwrap().to_str().unwrap().to_string(), std::fs::read(path).unwrap())
    };
    let mut files: BTreeMap<String, Vec<u8>> = entries.map(read).collect();
    files.remove("reference.safetensors");
    files.insert("pytorch_model.bin".into(), vec![0; 100]);
    files.insert("consolidated.00.pth".into(), vec![0; 100]);
    files
}

// ---------------------------------------------------------------- a user of the hub

/// The entry point of the processes that the tests start; it tests nothing by itself.
#[test]
fn process() {
    let Ok(model_id) = std::env::var("DOWNLOAD") else { return };
    let last = Arc::new(Mutex::new((0, 0)));
    let seen = last.clone();
    match hub::download(&model_id, "main", move |done, total| *seen.lock().unwrap() = (done, total))
    {
        Ok(dir) => println!("\nDIR {}\nPROGRESS {:?}", dir.display(), last.lock().unwrap()),
        Err(error) => {
            assert!(matches!(error, Error::Hub { .. }), "{error:?}");
            println!("\nERROR {error}");
        }
    }
}

struct User {
    home: TempDir,
}

impl User {
    fn new() -> Self {
        Self { home: TempDir::new().unwrap() }
    }

    fn run(&self, endpoint: &str, model_id: &str, variables: &[(&str, &str)]) -> Output {
        let mut command = Command::new(std::env::current_exe().unwrap());
        command.args(["--exact", "process", "--nocapture"]).env("DOWNLOAD", model_id);
        for name in [
            "HF_TOKEN",
            "HF_HUB_CACHE",
            "HUGGINGFACE_HUB_CACHE",
            "HF_HUB_OFFLINE",
            "http_proxy",
            "HTTP_PROXY",
        ] {
            command.env_remove(name);
        }
        command
            .env("HF_ENDPOINT", endpoint)
            .env("HF_HOME", self.home.path())
            .envs(variables.iter().copied());
        command.output().unwrap()
    }

    /// The directory of the checkpoint, or the error.
    fn download(
        &self,
        endpoint: &str,
        model_id: &str,
        variables: &[(&str, &str)],
    ) -> Result<PathBuf, String> {
        let output = self.run(endpoint, model_id, variables);
        let text = String::from_utf8(output.stdout).unwrap();
        assert!(output.status.success(), "{text}\n{}", String::from_utf8_lossy(&output.stderr));
        let line =
            |start: &str| Some(text.lines().find_map(|line| line.strip_prefix(start))?.to_string());
        match line("DIR ") {
            Some(dir) => Ok(PathBuf::from(dir)),
            None => {
                Err(line("ERROR ").unwrap_or_else(|| panic!("neither result nor error: {text}")))
            }
        }
    }

    fn fails(&self, endpoint: &str, model_id: &str, variables: &[(&str, &str)], parts: &[&str]) {
        let error = self.download(endpoint, model_id, variables).unwrap_err();
        for part in parts.iter().chain(&[model_id]) {
            assert!(error.contains(part), "expected {part:?} in {error:?}");
        }
    }
}

/// An address at which no server listens.
fn nowhere() -> String {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    format!("http://{}", listener.local_addr().unwrap())
}

// ---------------------------------------------------------------- the tests

#[test]
fn a_model_arrives_once_and_serves_offline() {
    let (hub, user) = (Hub::start(files(), Behaviour::default()), User::new());
    let dir = user.download(&hub.endpoint, MODEL, &[]).unwrap();
    // config, generation_config, the index and four shards; no pickles, no other files
    assert_eq!(hub.downloads(), 7, "{:?}", hub.requests.lock().unwrap());
    let found = Checkpoint::open(&dir).unwrap();
    let expected = Checkpoint::open(golden()).unwrap();
    assert!(found.names().eq(expected.names()));
    for name in expected.names() {
        let read = |checkpoint: &Checkpoint| {
            let tensor = checkpoint.tensor(name, DType::F32, &Device::Cpu).unwrap();
            tensor.flatten_all().unwrap().to_vec1::<f32>().unwrap()
        };
        assert_eq!(read(&found), read(&expected), "{name}");
    }

    let again = user.download(&hub.endpoint, MODEL, &[]).unwrap();
    assert_eq!((again, hub.downloads()), (dir.clone(), 7));
    assert_eq!(user.download(&nowhere(), MODEL, &[]).unwrap(), dir, "no server");
    let troubled = Hub::start(files(), Behaviour { in_trouble: true, ..Behaviour::default() });
    assert_eq!(user.download(&troubled.endpoint, MODEL, &[]).unwrap(), dir, "503");
    assert_eq!(
        user.download(&hub.endpoint, MODEL, &[("HF_HUB_OFFLINE", "1")]).unwrap(),
        dir,
        "offline"
    );

    let shard = dir.join(SHARD);
    std::fs::remove_file(&shard).unwrap();
    user.fails(&nowhere(), MODEL, &[], &["not complete", SHARD]);
    assert_eq!(user.download(&hub.endpoint, MODEL, &[]).unwrap(), dir);
    assert!(shard.is_file());
}

#[test]
fn a_chat_template_arrives() {
    for name in ["chat_template.jinja", "chat_template.json"] {
        let mut files = files();
        files.insert(name.into(), b"{}".to_vec());
        let (hub, user) = (Hub::start(files, Behaviour::default()), User::new());
        let dir = user.download(&hub.endpoint, MODEL, &[]).unwrap();
        assert_eq!(std::fs::read(dir.join(name)).unwrap(), b"{}");
    }
}

#[test]
fn progress_counts_the_weights() {
    let (hub, user) = (Hub::start(files(), Behaviour::default()), User::new());
    let output = user.run(&hub.endpoint, MODEL, &[]);
    let text = String::from_utf8(output.stdout).unwrap();
    let shards: usize = files()
        .iter()
        .filter(|(name, _)| name.ends_with(".safetensors"))
        .map(|(_, bytes)| bytes.len())
        .sum();
    assert!(text.contains(&format!("PROGRESS ({shards}, {shards})")), "{text}");
}

#[test]
fn one_file_or_metas_files() {
    for names in [
        &["model.safetensors"][..],
        &["consolidated.00.safetensors", "consolidated.01.safetensors"],
    ] {
        let mut files = files();
        let shards: Vec<Vec<u8>> = (1..=4)
            .map(|n| files.remove(&format!("model-0000{n}-of-00004.safetensors")).unwrap())
            .collect();
        files.remove("model.safetensors.index.json");
        files.extend(names.iter().map(|name| name.to_string()).zip(shards));
        let dir = User::new();
        let dir = (
            dir.download(&Hub::start(files, Behaviour::default()).endpoint, MODEL, &[]).unwrap(),
            dir,
        )
            .0;
        assert!(dir.ends_with(COMMIT), "{}", dir.display());
    }
}

#[test]
fn what_is_not_there() {
    let (hub, user) = (Hub::start(files(), Behaviour::default()), User::new());
    user.fails(&hub.endpoint, "someone/else", &[], &["not found"]);
    for id in ["", "/", "a/b/c", "../tiny", "some one/llama"] {
        user.fails(&hub.endpoint, id, &[], &["expected an id of the form owner/name"]);
    }
    let mut without = files();
    without.remove(SHARD);
    user.fails(
        &Hub::start(without, Behaviour::default()).endpoint,
        MODEL,
        &[],
        &[SHARD, "not in the repository"],
    );

    let pickles = files().into_iter().filter(|(name, _)| !name.contains(".safetensors")).collect();
    let parts = ["expected model.safetensors", "found", "pytorch_model.bin"];
    User::new().fails(&Hub::start(pickles, Behaviour::default()).endpoint, MODEL, &[], &parts);
}

#[test]
fn a_gated_model_needs_the_token() {
    let hub = Hub::start(files(), Behaviour { token: Some("hf_secret"), ..Behaviour::default() });
    let user = User::new();
    user.fails(&hub.endpoint, MODEL, &[], &["Authentication required"]);
    user.fails(&hub.endpoint, MODEL, &[("HF_TOKEN", "hf_wrong")], &["Authentication required"]);
    user.download(&hub.endpoint, MODEL, &[("HF_TOKEN", "hf_secret")]).unwrap();
}

#[test]
fn no_server_and_no_copy() {
    let user = User::new();
    let cache = user.home.path().join("hub").display().to_string();
    let endpoint = nowhere();
    user.fails(
        &endpoint,
        MODEL,
        &[],
        &[&endpoint, "refused", "nothing of revision main in the cache", &cache],
    );
    user.fails(&endpoint, MODEL, &[("HF_HUB_OFFLINE", "1")], &["HF_HUB_OFFLINE is set", &cache]);
    user.fails("no url", MODEL, &[], &["URL"]);
}

#[test]
fn half_a_file_is_never_taken_for_one() {
    let cut = Hub::start(files(), Behaviour { cut: Some(SHARD), ..Behaviour::default() });
    let user = User::new();
    let error = user.download(&cut.endpoint, MODEL, &[]).unwrap_err();
    assert!(error.contains(MODEL), "{error}");
    let whole = Hub::start(files(), Behaviour::default());
    let dir = user.download(&whole.endpoint, MODEL, &[]).unwrap();
    assert_eq!(std::fs::read(dir.join(SHARD)).unwrap(), files()[SHARD]);
}

#[test]
fn a_cache_that_cannot_be_written() {
    let (hub, user) = (Hub::start(files(), Behaviour::default()), User::new());
    let file = user.home.path().join("a file");
    std::fs::write(&file, "").unwrap();
    let cache = file.join("hub").display().to_string();
    user.fails(
        &hub.endpoint,
        MODEL,
        &[("HF_HUB_CACHE", &cache)],
        &["the cache", &cache, "cannot be used"],
    );
}
