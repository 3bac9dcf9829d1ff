//! Properties of a process: the choice of the kernel, the number of threads, panics in other code.
//! Each case runs in a child process: this program again, which calls one of the functions of
//! [`ROLES`].
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, missing_docs)]

mod common;

use std::collections::BTreeSet;
use std::hash::{DefaultHasher, Hasher};
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use candle_core::utils::barrier_pool;
use candle_core::{DType, Device, Tensor, Var};
use candle_nn::Module;
use candle_swiglu::{Error, Linear, SwiGluFfn, cpu_kernels, silu_mul};
use rayon::prelude::*;

const ROLE: &str = "CANDLE_SWIGLU_TEST_ROLE";
const FORCED: &str = "CANDLE_SWIGLU_KERNEL";

type Role = fn() -> Result<()>;
const ROLES: [(&str, Role); 6] = [
    ("names", names),
    ("plain", plain),
    ("digests", digests),
    ("concurrent", concurrent),
    ("nested", nested),
    ("after a panic", after_a_panic),
];

/// The entry point of the child process.
#[test]
#[ignore = "the other tests start it in processes of their own"]
fn child() -> Result<()> {
    let role = std::env::var(ROLE)?;
    let (_, f) = ROLES.into_iter().find(|(name, _)| *name == role).context("no such role")?;
    f()
}

/// Runs a child and returns the lines that it prints after `> `. It is an error if the child fails
/// or hangs.
fn run(role: &str, environment: &[(&str, &str)]) -> Result<Vec<String>> {
    let mut command = common::this_program()?;
    command.args(["child", "--exact", "--ignored", "--nocapture"]).env(ROLE, role);
    for name in [FORCED, "RAYON_NUM_THREADS", "CANDLE_NUM_THREADS"] {
        command.env_remove(name);
    }
    let mut child = command
        .envs(environment.iter().copied())
        .stdout(std::process::Stdio::piped())
        .stderr(std::process::Stdio::piped())
        .spawn()?;
    let start = Instant::now();
    while child.try_wait()?.is_none() {
        if start.elapsed() > Duration::from_secs(300) {
            child.kill()?;
            bail!("{role} {environment:?}: the child hangs");
        }
        std::thread::sleep(Duration::from_millis(5));
    }
    let output = child.wait_with_output()?;
    let (out, err) =
        (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    ensure!(output.status.success(), "{role} {environment:?}: {out}{err}");
    Ok(out
        .lines()
        .filter_map(|line| line.split_once("> "))
        .map(|(_, said)| said.to_string())
        .collect())
}

fn say(line: impl std::fmt::Display) {
    println!("> {line}");
}

// ---------------------------------------------------------------- which kernel

/// Prints the kernel's name, or the names that the error lists.
fn names() -> Result<()> {
    let one = Tensor::ones((1, 1), DType::BF16, &Device::Cpu)?;
    match SwiGluFfn::from_tensors(one.clone(), one.clone(), one.clone()) {
        Ok(ffn) => {
            let linear = Linear::new(one, None)?;
            ensure!(linear.kernel() == ffn.kernel());
            // Everything except products in bf16 uses the instruction set that this kernel extends.
            for dtype in [DType::F32, DType::F16] {
                let kernel = ffn.to_dtype(dtype)?.kernel().to_string();
                let expected = match ffn.kernel() {
                    "amx" => "avx512",
                    name => name.trim_end_matches("bf16"),
                };
                ensure!(kernel == expected, "{kernel}");
            }
            say(ffn.kernel());
        }
        Err(Error::UnknownKernel { available, .. }) => {
            let message = Linear::new(one, None).unwrap_err().to_string();
            ensure!(message.contains(FORCED) && message.contains("sse9"), "{message}");
            ensure!(available.iter().all(|name| message.contains(name)), "{message}");
            available.iter().for_each(say);
        }
        Err(other) => return Err(other.into()),
    }
    Ok(())
}

#[test]
fn every_kernel_of_this_machine_can_be_forced_by_name() -> Result<()> {
    let available = cpu_kernels();
    #[cfg(target_arch = "x86_64")]
    let promised = [
        ("avx512bf16", is_x86_feature_detected!("avx512bf16")),
        ("avx512", is_x86_feature_detected!("avx512bw") && is_x86_feature_detected!("avx512dq")),
        (
            "avx2",
            is_x86_feature_detected!("avx2")
                && is_x86_feature_detected!("fma")
                && is_x86_feature_detected!("f16c"),
        ),
        ("scalar", true),
    ];
    #[cfg(target_arch = "aarch64")]
    let promised = [
        ("neonbf16", std::arch::is_aarch64_feature_detected!("bf16")),
        ("neon", std::arch::is_aarch64_feature_detected!("neon")),
        ("scalar", true),
    ];
    #[cfg(not(any(target_arch = "x86_64", target_arch = "aarch64")))]
    let promised = [("scalar", true)];
    let promised: Vec<&str> =
        promised.into_iter().filter(|(_, there)| *there).map(|(name, _)| name).collect();
    // The order of the others depends on the CPU family. Whether the process may use `amx` is the
    // system's decision.
    let set = |names: &[&'static str]| names.iter().copied().collect::<BTreeSet<_>>();
    assert_eq!(
        set(&available).into_iter().filter(|&name| name != "amx").collect::<BTreeSet<_>>(),
        set(&promised)
    );
    assert_eq!(available.last(), Some(&"scalar"));
    assert!(!available.contains(&"amx") || available[0] == "amx");
    let listed: Vec<&str> = available.iter().copied().chain(["plain"]).collect();
    assert_eq!(
        run("names", &[(FORCED, "sse9")])?,
        listed,
        "the error for an unknown name lists the kernels"
    );
    for name in &available {
        assert_eq!(run("names", &[(FORCED, name)])?, [*name]);
    }
    for unset in [&[][..], &[(FORCED, "")]] {
        assert_eq!(run("names", unset)?, available[..1]);
    }
    Ok(())
}

/// `plain` is the block by candle's own operations: their bits, and gradients twice.
fn plain() -> Result<()> {
    for (dtype, bound) in
        [(DType::F64, 1e-14), (DType::F32, 1e-6), (DType::F16, 4e-3), (DType::BF16, 3e-2)]
    {
        let tensor = |dims, scale| numbers(dims, dtype, scale);
        let (x, gate, up, down) = (
            tensor((3, 8), 1.0)?,
            tensor((24, 8), 0.5)?,
            tensor((24, 8), 0.4)?,
            tensor((8, 24), 0.3)?,
        );
        let ffn = SwiGluFfn::from_tensors(gate.clone(), up.clone(), down.clone())?;
        ensure!(ffn.kernel() == "plain", "{}", ffn.kernel());
        let linear = Linear::new(gate.clone(), None)?;
        let exact = |y: Tensor| y.to_dtype(DType::F64)?.to_vec2::<f64>();
        ensure!(exact(linear.forward(&x)?)? == exact(x.matmul(&gate.t()?)?)?);
        let (g, u) = (x.matmul(&gate.t()?)?, x.matmul(&up.t()?)?);
        let h = (&g * candle_nn::ops::sigmoid(&g)? * &u)?;
        let difference = (ffn.forward(&x)? - h.matmul(&down.t()?)?)?
            .to_dtype(DType::F64)?
            .abs()?
            .max_all()?
            .to_scalar::<f64>()?;
        ensure!(difference <= bound, "{dtype:?}: {difference}");
        // candle's operations have a second derivative, the fused gate has none. (A conversion ends
        // the graph of a gradient.)
        if matches!(dtype, DType::F16 | DType::BF16) {
            continue;
        }
        let x = candle_core::Var::from_tensor(&x)?;
        let first =
            silu_mul(&x, &x)?.sum_all()?.backward()?.get(&x).context("no gradient")?.clone();
        ensure!(
            first.sqr()?.sum_all()?.backward()?.get(&x).is_some(),
            "{dtype:?}: the gate is not composed"
        );
    }
    say("plain");
    Ok(())
}

#[test]
fn plain_runs_candles_own_operations() -> Result<()> {
    assert_eq!(run("plain", &[(FORCED, "plain")])?, ["plain"]);
    assert!(run("plain", &[]).is_err(), "the role tells kernels from candle's operations");
    Ok(())
}

// ---------------------------------------------------------------- how many threads

/// Deterministic numbers in ±scale.
fn numbers(dims: (usize, usize), dtype: DType, scale: f64) -> Result<Tensor> {
    let number = |i: usize| ((i * 2_654_435_761) % 1_000_003) as f64 / 500_001.5 - 1.0;
    let numbers: Vec<f64> = (0..dims.0 * dims.1).map(|i| scale * number(i)).collect();
    Ok(Tensor::from_vec(numbers, dims, &Device::Cpu)?.to_dtype(dtype)?)
}

fn block(h: usize, i: usize, dtype: DType) -> Result<SwiGluFfn> {
    let weights = [(i, h), (i, h), (h, i)].map(|dims| numbers(dims, dtype, 0.3));
    let [gate, up, down] = weights;
    Ok(SwiGluFfn::from_tensors(gate?, up?, down?)?)
}

fn digest(y: &Tensor) -> Result<u64> {
    let mut hasher = DefaultHasher::new();
    for value in y.to_dtype(DType::F32)?.flatten_all()?.to_vec1::<f32>()? {
        ensure!(value.is_finite());
        hasher.write_u32(value.to_bits());
    }
    Ok(hasher.finish())
}

/// Prints one hash for each dtype and number of rows.
fn digests() -> Result<()> {
    say(candle_core::utils::get_num_threads());
    for dtype in [DType::F32, DType::BF16, DType::F16] {
        let ffn = block(190, 333, dtype)?;
        for rows in [1, 5, 16, 77, 600] {
            say(digest(&ffn.forward(&numbers((rows, 190), dtype, 1.0)?)?)?);
        }
        gradient_digests(dtype)?;
    }
    Ok(())
}

/// Prints the digests of the gradients of a block of variables.
fn gradient_digests(dtype: DType) -> Result<()> {
    let var = |shape| -> Result<Var> { Ok(Var::from_tensor(&numbers(shape, dtype, 0.1)?)?) };
    let vars = [var((333, 190))?, var((333, 190))?, var((190, 333))?];
    let [gate, up, down] = vars.each_ref().map(|var| var.as_tensor().clone());
    let ffn = SwiGluFfn::from_tensors(gate, up, down)?;
    for rows in [3, 600] {
        let x = Var::from_tensor(&numbers((rows, 190), dtype, 1.0)?)?;
        let store = (ffn.forward(&x)?.sqr()? * 1e-3)?.sum_all()?.backward()?;
        for var in vars.iter().chain([&x]) {
            let found = digest(store.get(var).context("no gradient")?);
            say(found.with_context(|| format!("{dtype:?}, {rows} rows, {:?}", var.dims()))?);
        }
    }
    Ok(())
}

#[test]
fn the_number_of_threads_does_not_show() -> Result<()> {
    for kernel in cpu_kernels() {
        let mut seen = BTreeSet::new();
        for threads in ["1", "2", "3", "7"] {
            let said = run("digests", &[("RAYON_NUM_THREADS", threads), (FORCED, kernel)])?;
            assert_eq!(said[0], threads);
            assert_eq!(said.len(), 1 + 3 * (5 + 8));
            seen.insert(said[1..].to_vec());
        }
        assert_eq!(seen.len(), 1, "{kernel}: {seen:?}");
    }
    Ok(())
}

// ---------------------------------------------------------------- many callers

/// A block with its inputs and their outputs.
fn cases() -> Result<Vec<(SwiGluFfn, Tensor, u64)>> {
    let mut cases = vec![];
    for dtype in [DType::F32, DType::BF16] {
        let ffn = block(96, 200, dtype)?;
        for rows in [1, 3, 40, 150] {
            let x = numbers((rows, 96), dtype, 1.0)?;
            let y = digest(&ffn.forward(&x)?)?;
            cases.push((ffn.clone(), x, y));
        }
    }
    Ok(cases)
}

fn check((ffn, x, y): &(SwiGluFfn, Tensor, u64)) -> Result<()> {
    ensure!(digest(&ffn.forward(x)?)? == *y, "the result differs between concurrent callers");
    Ok(())
}

/// Clones in threads and in rayon's tasks, concurrent with candle's own products.
fn concurrent() -> Result<()> {
    let cases = Arc::new(cases()?);
    let threads: Vec<_> = (0..6)
        .map(|start| {
            let cases = cases.clone();
            std::thread::spawn(move || {
                (0..60).try_for_each(|i| check(&cases[(start + i) % cases.len()]))
            })
        })
        .collect();
    (0..200usize).into_par_iter().try_for_each(|i| {
        if i % 5 == 0 {
            let a = numbers((50, 60), DType::F32, 1.0)?;
            a.matmul(&a.t()?)?;
        }
        check(&cases[i % cases.len()])
    })?;
    threads.into_iter().try_for_each(|thread| thread.join().expect("no panic"))
}

/// Calls within a task of rayon on which other tasks wait.
fn nested() -> Result<()> {
    let cases = cases()?;
    let (a, (b, c)) = rayon::join(
        || cases.iter().try_for_each(check),
        || {
            rayon::join(
                || cases.par_iter().try_for_each(check),
                || cases.iter().rev().try_for_each(check),
            )
        },
    );
    a.and(b).and(c)
}

/// Calls after another task on candle's threads has panicked. Such a panic leaves candle's pool
/// locked permanently.
fn after_a_panic() -> Result<()> {
    let cases = cases()?;
    let panicked = std::panic::catch_unwind(|| {
        barrier_pool().execute_chunked(64, |_| panic!("somebody else's panic"))
    });
    ensure!(panicked.is_err());
    // Enough elements for several threads, compared with parts that one thread computes. (candle's
    // own backward pass adds gradients of this size on its threads and would panic.)
    let (gate, up) = (numbers((512, 512), DType::F32, 1.0)?, numbers((512, 512), DType::F32, 1.0)?);
    let whole = silu_mul(&gate, &up)?;
    for part in 0..16 {
        let rows = |tensor: &Tensor| tensor.narrow(0, 32 * part, 32);
        ensure!(digest(&silu_mul(&rows(&gate)?, &rows(&up)?)?)? == digest(&rows(&whole)?)?);
    }
    for _ in 0..3 {
        cases.iter().try_for_each(check)?;
    }
    Ok(())
}

#[test]
fn many_callers_at_once() -> Result<()> {
    for threads in ["1", "2", "5"] {
        run("concurrent", &[("RAYON_NUM_THREADS", threads)])?;
        run("nested", &[("RAYON_NUM_THREADS", threads)])?;
    }
    Ok(())
}

#[test]
fn a_panic_elsewhere_does_no_harm() -> Result<()> {
    for threads in ["1", "2", "5"] {
        run("after a panic", &[("RAYON_NUM_THREADS", threads)])?;
    }
    Ok(())
}
