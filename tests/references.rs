//! The published package has neither `tests/golden` nor the tests that read it, because the
//! references would be most of its size. There this program says so. In the repository it checks
//! that `exclude` in Cargo.toml names exactly those tests.
#![allow(missing_docs, clippy::expect_used, reason = "a test")]

use std::collections::BTreeSet;
use std::fs;
use std::path::Path;

fn main() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    if !root.join("tests/golden").is_dir() {
        println!(
            "skipped: the comparisons with PyTorch and transformers. Their references (tests/golden, 5 MB) are \
             not in the published package; clone the repository to run them."
        );
        return;
    }
    let manifest = fs::read_to_string(root.join("Cargo.toml")).expect("Cargo.toml");
    let excluded = manifest
        .lines()
        .filter_map(|line| line.trim().strip_prefix("\"tests/")?.strip_suffix("\","));
    let excluded: BTreeSet<String> =
        excluded.filter(|name| name.ends_with(".rs")).map(str::to_string).collect();
    let entries = fs::read_dir(root.join("tests")).expect("tests");
    let names =
        entries.map(|entry| entry.expect("an entry").file_name().to_string_lossy().into_owned());
    let reads_golden = |name: &String| {
        let source = || fs::read_to_string(root.join("tests").join(name)).expect("a test");
        name.ends_with(".rs")
            && name != "references.rs"
            && source().to_lowercase().contains("golden")
    };
    let readers: BTreeSet<String> = names.filter(reads_golden).collect();
    assert_eq!(readers, excluded, "tests that read tests/golden, and those excluded in Cargo.toml");
    println!("the package excludes {}", Vec::from_iter(excluded).join(", "));
}
