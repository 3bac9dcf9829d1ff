//! The regular expressions of a config, applied as PEFT applies them with Python's `re`.

use fancy_regex::Regex;

use crate::error::{Error, Result};

/// The value of the first key that matches the module, as PEFT's `get_pattern_key` defines it.
pub(super) fn find<'a, T>(
    field: &str,
    patterns: &'a [(String, T)],
    module: &str,
) -> Result<Option<&'a T>> {
    for (key, value) in patterns {
        if matches_end(field, key, module)? {
            return Ok(Some(value));
        }
    }
    // PEFT then looks the name itself up, which differs for a key with special characters.
    Ok(patterns.iter().find(|(key, _)| key == module).map(|(_, value)| value))
}

/// `re.match(r"(.*\.)?({key})$", module)`
fn matches_end(field: &str, key: &str, module: &str) -> Result<bool> {
    if is_plain(key) {
        return Ok(matches_plain(key, module));
    }
    let regex = regex(field, key, &format!(r"\A(.*\.)?({key})$"))?;
    regex.is_match(module).map_err(|error| invalid(field, key, &error))
}

/// `re.fullmatch(pattern, module)`
pub(super) fn matches_whole(field: &str, pattern: &str, module: &str) -> Result<bool> {
    let regex = regex(field, pattern, &format!(r"\A(?:{pattern})\z"))?;
    regex.is_match(module).map_err(|error| invalid(field, pattern, &error))
}

/// The layer's number in a module's name: the first number after a name that matches one of
/// `patterns`, or after any two parts if there are none.
pub(super) fn layer(patterns: &[String], module: &str) -> Result<Option<usize>> {
    const FIELD: &str = "layers_pattern";
    let any = [String::new()];
    for pattern in if patterns.is_empty() { &any } else { patterns } {
        let text = if patterns.is_empty() {
            r"\A.*?\.[^.]*\.(?P<idx>\d+)\.".to_string()
        } else {
            format!(r"\A(?:\A|.*?\.){pattern}\.(?P<idx>\d+)\.")
        };
        let found = regex(FIELD, pattern, &text)?
            .captures(module)
            .map_err(|error| invalid(FIELD, pattern, &error))?;
        if let Some(number) = found.as_ref().and_then(|found| found.name("idx")) {
            return Ok(number.as_str().parse().ok());
        }
    }
    Ok(None)
}

fn regex(field: &str, pattern: &str, whole: &str) -> Result<Regex> {
    if let Some(reason) = read_differently(pattern) {
        return Err(invalid(field, pattern, &reason));
    }
    Regex::new(whole).map_err(|error| invalid(field, pattern, &error))
}

fn invalid(field: &str, pattern: &str, reason: &dyn std::fmt::Display) -> Error {
    Error::InvalidField {
        field: field.to_string(),
        expected: "a regular expression",
        found: format!("{pattern:?} ({reason})"),
    }
}

/// Only letters, digits, `_`, `-` and dots: most keys. An adapter may have one key for each of
/// hundreds of modules, which would take seconds to compile.
fn is_plain(key: &str) -> bool {
    key.bytes().all(|b| b.is_ascii_alphanumeric() || b"._-".contains(&b))
}

/// [`matches_end`] for a plain key, in which a dot matches any character.
fn matches_plain(key: &str, module: &str) -> bool {
    let mut rest = module.chars().rev();
    let same = |k: char, m: Option<char>| m.is_some_and(|m| k == m || (k == '.' && m != '\n'));
    key.chars().rev().all(|k| same(k, rest.next())) && rest.next().is_none_or(|c| c == '.')
}

/// Inside brackets Python reads `[`, `&&`, `--` and `~~` as characters, fancy-regex as the syntax
/// of sets.
fn read_differently(pattern: &str) -> Option<&'static str> {
    let mut chars = pattern.chars().peekable();
    let mut in_class = false;
    while let Some(c) = chars.next() {
        match c {
            '\\' => drop(chars.next()),
            '[' if in_class => return Some("a set in a set of characters"),
            '&' | '-' | '~' if in_class && chars.peek() == Some(&c) => {
                return Some("an operation on sets of characters");
            }
            '[' => {
                in_class = true;
                chars.next_if_eq(&'^');
                chars.next_if_eq(&']');
            }
            ']' => in_class = false,
            _ => {}
        }
    }
    None
}
