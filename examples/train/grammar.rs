//! A seeded generator of short stories with known entropy: the training text of the checkpoint in
//! `weights/`.
//!
//! `stories.txt` contains lists of facts, and thirteen plots written as templates. A story is
//! generated from left to right. A fact (who, where, which toy, what weather) is drawn where it is
//! first mentioned, and every later mention repeats it.
//!
//! # Notation of `stories.txt`
//! * `@toys use` opens a list whose rows are `kite, ball : fly it`: keys, then one value for each
//!   further form.
//! * `## name` opens a rule. Its lines are joined by spaces, a blank line is a new paragraph, a
//!   line that starts with `|` or `}` continues the one before, and a line `? text` is told every
//!   other time.
//! * `{a|3*b|(hero.peer=kid)c|(day)d}` chooses: `b` has three times the weight, `c` is open only if
//!   that form of the hero is `kid`, `d` only if the slot `day` is bound.
//! * `[toy:toys]`, `[friend:girls+boys]` draws a row that no other slot holds, binds it to the slot
//!   and tells its key.
//! * `[toy]`, `[toy.use]` tells the key or a form of the bound row; `[he]`, `[him]`, `[his]` are
//!   those of the slot `hero`. A capital first letter in the brackets gives one in the text.
//!   `<name>` tells a rule.
//!
//! # Entropy
//! All randomness goes through `Teller::pick`, which adds -log2(p) of its choice. `Story::bits` is
//! therefore -log2 of the probability of the derivation. No two derivations give the same text: the
//! test `no_text_has_two_derivations` proves it for the whole grammar. Hence `bits` is also -log2
//! of the probability of the *text*, and its mean over stories is exactly the entropy of the
//! distribution. No model's expected loss, summed over a story, is below `bits` · ln 2 nats.
//!
//! The mean is 93.6 bits at 159 words (a million stories: 76 to 125 bits, 125 to 199 words). Every
//! story has a probability below 2^-69.

#![allow(
    clippy::panic,
    reason = "stories.txt is a part of the program, and the tests walk through all of it"
)]

use std::collections::HashMap;
use std::sync::LazyLock;

/// One story and its information content.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Story {
    /// Paragraphs separated by blank lines, no newline at the end.
    pub(crate) text: String,
    /// -log2 of the probability that the grammar generates exactly this text.
    pub(crate) bits: f64,
}

/// Story number `index` of the stream `seed`: the same on every machine.
///
/// Streams of different seeds are independent, so held-out stories use another seed.
pub(crate) fn story(seed: u64, index: u64) -> Story {
    static GRAMMAR: LazyLock<Grammar> =
        LazyLock::new(|| Grammar::parse(include_str!("stories.txt")));
    GRAMMAR.story(seed, index)
}

/// SplitMix64 (Steele, Lea, Flood: "Fast splittable pseudorandom number generators", OOPSLA 2014,
/// figure 16).
struct SplitMix64(u64);

impl SplitMix64 {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let z = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }
}

/// The parsed `stories.txt`.
struct Grammar {
    lists: HashMap<String, Vec<Row>>,
    rules: HashMap<String, Vec<Node>>,
}

/// A fact: form name -> text; the key is the form "".
type Row = HashMap<String, String>;

/// A piece of a template.
enum Node {
    Text(String),
    Choice(Vec<Branch>),
    /// `[slot:list+list]`: slot, lists, with a capital letter
    Draw(String, Vec<String>, bool),
    /// `[slot.form]`: slot, form, with a capital letter
    Recall(String, String, bool),
    Rule(String),
}

/// An alternative of a `{..|..}`.
struct Branch {
    weight: u64,
    /// `(slot)` or `(slot.form=value)`: slot, then form and value
    guard: Option<(String, Option<(String, String)>)>,
    nodes: Vec<Node>,
}

// ---- telling ----

/// The state while a story is generated.
struct Teller<'g> {
    grammar: &'g Grammar,
    random: SplitMix64,
    slots: HashMap<&'g str, &'g Row>,
    story: Story,
}

impl Grammar {
    fn story(&self, seed: u64, index: u64) -> Story {
        let random = SplitMix64(SplitMix64(seed).next().wrapping_add(index));
        let story = Story { text: String::new(), bits: 0.0 };
        let mut teller = Teller { grammar: self, random, slots: HashMap::new(), story };
        teller.tell(self.rule("story"));
        teller.story
    }
}

impl<'g> Teller<'g> {
    /// Picks an index with probability `weights[i]` / sum. No other function uses random numbers.
    ///
    /// 64 random bits are scaled to the sum, which is below 2^10, so each probability is exact to
    /// within 2^-54.
    fn pick(&mut self, weights: &[u64]) -> usize {
        let total: u64 = weights.iter().sum();
        let mut left = (u128::from(self.random.next()) * u128::from(total)) >> 64;
        let is_picked = |&w: &u64| {
            let hit = left < u128::from(w);
            left = left.saturating_sub(u128::from(w));
            hit
        };
        let picked = weights.iter().position(is_picked).unwrap_or_default();
        self.story.bits += (total as f64 / weights[picked] as f64).log2();
        picked
    }

    fn tell(&mut self, nodes: &'g [Node]) {
        for node in nodes {
            match node {
                Node::Text(text) => self.story.text.push_str(text),
                Node::Choice(branches) => self.choose(branches),
                Node::Draw(slot, lists, capital) => self.draw(slot, lists, *capital),
                Node::Recall(slot, form, capital) => self.say(self.recall(slot, form), *capital),
                Node::Rule(name) => self.tell(self.grammar.rule(name)),
            }
        }
    }

    fn choose(&mut self, branches: &'g [Branch]) {
        let open: Vec<_> = branches.iter().filter(|b| self.is_open(b)).collect();
        let weights: Vec<_> = open.iter().map(|b| b.weight).collect();
        let picked = self.pick(&weights);
        self.tell(&open[picked].nodes);
    }

    fn is_open(&self, branch: &Branch) -> bool {
        branch.guard.as_ref().is_none_or(|(slot, equals)| match equals {
            None => self.slots.contains_key(&**slot),
            Some((form, value)) => self.recall(slot, form) == value,
        })
    }

    fn draw(&mut self, slot: &'g str, lists: &[String], capital: bool) {
        let is_free = |row: &&Row| !self.slots.values().any(|taken| std::ptr::eq(*taken, *row));
        let rows: Vec<_> =
            lists.iter().flat_map(|l| self.grammar.list(l)).filter(is_free).collect();
        let row = rows[self.pick(&vec![1; rows.len()])];
        self.slots.insert(slot, row);
        self.say(&row[""], capital);
    }

    fn recall(&self, slot: &str, form: &str) -> &'g str {
        let row = self
            .slots
            .get(slot)
            .unwrap_or_else(|| panic!("slot {slot} is not bound after: {}", self.story.text));
        row.get(form).unwrap_or_else(|| panic!("slot {slot} has no form {form}"))
    }

    fn say(&mut self, text: &str, capital: bool) {
        self.story.text.push_str(&capitalised(text, capital));
    }
}

/// `text`, its first letter in upper case if `capital`.
fn capitalised(text: &str, capital: bool) -> String {
    let split = if capital { text.chars().next().map_or(0, char::len_utf8) } else { 0 };
    text[..split].to_uppercase() + &text[split..]
}

// ---- reading stories.txt ----

impl Grammar {
    fn parse(source: &str) -> Self {
        let mut grammar = Self { lists: HashMap::new(), rules: HashMap::new() };
        let (lists, rules) = source.split_once("\n## ").unwrap_or((source, ""));
        for block in lists.split("\n@").skip(1) {
            let (head, body) = block.split_once([':', '\n']).unwrap_or((block, ""));
            let mut forms = head.split(' ');
            let name = forms.next().unwrap_or_default();
            let forms: Vec<_> = forms.collect();
            let lines = body.lines().filter(|l| !l.is_empty() && !l.starts_with('#'));
            grammar.lists.insert(name.into(), lines.flat_map(|l| rows(l.trim(), &forms)).collect());
        }
        for block in rules.split("\n## ") {
            let (name, body) = block.split_once([':', '\n']).unwrap_or((block, ""));
            let joined = joined(body);
            let mut rest = joined.as_str();
            grammar.rules.insert(name.into(), nodes(&mut rest));
            assert!(rest.is_empty(), "rule {name}: a brace too many before {rest}");
        }
        grammar
    }

    fn list(&self, name: &str) -> &[Row] {
        self.lists.get(name).unwrap_or_else(|| panic!("no list {name}"))
    }

    fn rule(&self, name: &str) -> &[Node] {
        self.rules.get(name).unwrap_or_else(|| panic!("no rule {name}"))
    }
}

/// `key, key : form; form` -> one row for each key.
fn rows(line: &str, forms: &[&str]) -> Vec<Row> {
    let (keys, values) = line.split_once(" : ").unwrap_or((line, ""));
    let values: Vec<_> = values.split("; ").filter(|v| !v.is_empty()).collect();
    assert_eq!(forms.len(), values.len(), "{line}: wants the forms {forms:?}");
    let row = |key| {
        let named = forms.iter().copied().zip(values.iter().copied());
        named.chain([("", key)]).map(|(form, text)| (form.into(), text.into())).collect()
    };
    keys.split(", ").map(row).collect()
}

/// The lines of a rule as one string: see the notation at the head of this file.
fn joined(body: &str) -> String {
    let mut out = String::new();
    let mut gap = "";
    for line in body.trim().lines().filter(|l| !l.starts_with('#')) {
        match line.as_bytes().first() {
            None => (),
            Some(b'|' | b'}') => out += line,
            Some(b'?') => out += &format!("{{{gap}{}|}}", line[1..].trim()),
            Some(_) => out += &format!("{gap}{line}"),
        }
        gap = if line.is_empty() { "\n\n" } else { " " };
    }
    out
}

/// Parses up to the end, a `|` or a `}`.
fn nodes(rest: &mut &str) -> Vec<Node> {
    let mut nodes = Vec::new();
    while let Some(first) = rest.chars().next().filter(|c| !"|}".contains(*c)) {
        nodes.push(match first {
            '{' => Node::Choice(branches(rest)),
            '[' => fact(between(rest, ']')),
            '<' => Node::Rule(between(rest, '>').into()),
            _ => Node::Text(
                take(rest, rest.find(['{', '[', '<', '|', '}']).unwrap_or(rest.len())).into(),
            ),
        });
    }
    nodes
}

/// `{a|3*b|(slot.form=value)c|5*(slot)d}`
fn branches(rest: &mut &str) -> Vec<Branch> {
    let mut branches = Vec::new();
    while rest.starts_with(['{', '|']) {
        take(rest, 1);
        let digits = rest.find(|c: char| !c.is_ascii_digit()).unwrap_or(0);
        let weight = if rest[digits..].starts_with('*') {
            take(rest, digits + 1).trim_end_matches('*')
        } else {
            "1"
        };
        let guard = rest.starts_with('(').then(|| guard(between(rest, ')')));
        branches.push(Branch { weight: weight.parse().unwrap_or(1), guard, nodes: nodes(rest) });
    }
    assert_eq!(take(rest, 1), "}", "a choice is not closed");
    branches
}

/// `slot` or `slot.form=value`
fn guard(inside: &str) -> (String, Option<(String, String)>) {
    let (slot, condition) = inside.split_once('.').unwrap_or((inside, ""));
    (slot.into(), condition.split_once('=').map(|(form, value)| (form.into(), value.into())))
}

/// `slot:list+list`, `slot.form`, `slot`, or a pronoun of the hero.
fn fact(inside: &str) -> Node {
    let capital = inside.starts_with(char::is_uppercase);
    let inside = inside.to_lowercase();
    if let Some((slot, lists)) = inside.split_once(':') {
        return Node::Draw(slot.into(), lists.split('+').map(String::from).collect(), capital);
    }
    let is_pronoun = ["he", "him", "his"].contains(&&*inside);
    let (slot, form) = if is_pronoun {
        ("hero", &*inside)
    } else {
        inside.split_once('.').unwrap_or((&inside, ""))
    };
    Node::Recall(slot.into(), form.into(), capital)
}

/// Removes the first `len` bytes from `rest` and returns them.
fn take<'a>(rest: &mut &'a str, len: usize) -> &'a str {
    let (taken, left) = rest.split_at(len.min(rest.len()));
    *rest = left;
    taken
}

/// Removes a bracket, its contents and the closing bracket from `rest`, and returns the contents.
fn between<'a>(rest: &mut &'a str, close: char) -> &'a str {
    let len = rest.find(close).unwrap_or_else(|| panic!("no {close} in {rest}"));
    &take(rest, len + 1)[1..len]
}

#[cfg(test)]
#[path = "grammar_tests.rs"]
mod tests;
