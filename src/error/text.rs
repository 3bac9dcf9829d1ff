//! Parts of the messages.

use std::path::PathBuf;

pub(super) fn list(names: &[String], separator: &str) -> String {
    if names.is_empty() { "none".to_string() } else { names.join(separator) }
}

/// At most 20 of the names.
pub(super) fn first(names: &[String]) -> String {
    const MOST: usize = 20;
    match names.len().checked_sub(MOST) {
        None | Some(0) => list(names, ", "),
        Some(more) => format!("{} and {more} more", names[..MOST].join(", ")),
    }
}

pub(super) fn did_you_mean(prefixes: &[String]) -> String {
    if prefixes.is_empty() {
        return String::new();
    }
    let quoted: Vec<String> = prefixes.iter().map(|prefix| format!("\"{prefix}\"")).collect();
    format!("; did you mean {}?", quoted.join(" or "))
}

pub(super) fn instead(found: &[String]) -> String {
    if found.is_empty() { String::new() } else { format!("; there is {}", found.join(", ")) }
}

pub(super) fn of_size(size: &Option<u64>) -> String {
    size.map(|size| format!(" of {size} bytes")).unwrap_or_default()
}

pub(super) fn by_the_config(key: &Option<&str>) -> String {
    key.map(|key| format!(" (config: {key})")).unwrap_or_default()
}

pub(super) fn within(location: &Option<PathBuf>) -> String {
    location.as_ref().map(|path| format!(" (in {})", path.display())).unwrap_or_default()
}
