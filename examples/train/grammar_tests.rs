//! The proof that each story has one derivation, and checks of the generated texts.

use super::*;
use std::collections::{BTreeSet, HashSet};

/// All derivations as a graph of characters: each path from the start to `End` is one derivation,
/// character by character.
///
/// The graph contains slightly more than the grammar: guards count as open, a draw may take any
/// row, and a recalled fact may be any row that is ever bound to the slot. A derivation of the
/// grammar is still one path, and different derivations are different paths.
struct Paths {
    states: Vec<State>,
    /// slot -> the lists its rows come from
    bound: HashMap<String, BTreeSet<String>>,
    meeting: HashMap<(usize, usize), bool>,
}

enum State {
    Char(char, usize),
    /// Successors. `chosen`: the grammar chooses between them, unlike the rows of a recalled fact.
    Fork {
        ways: Vec<usize>,
        chosen: bool,
    },
    End,
}

impl Paths {
    /// The paths of a grammar and their start.
    fn new(grammar: &Grammar) -> (Self, usize) {
        let mut paths =
            Self { states: vec![State::End], bound: HashMap::new(), meeting: HashMap::new() };
        grammar.rules.values().for_each(|nodes| paths.note_slots(nodes));
        let start = paths.nodes(grammar, grammar.rule("story"), 0);
        (paths, start)
    }

    fn note_slots(&mut self, nodes: &[Node]) {
        for node in nodes {
            match node {
                Node::Draw(slot, lists, _) => {
                    self.bound.entry(slot.clone()).or_default().extend(lists.clone())
                }
                Node::Choice(branches) => branches.iter().for_each(|b| self.note_slots(&b.nodes)),
                _ => (),
            }
        }
    }

    fn push(&mut self, state: State) -> usize {
        self.states.push(state);
        self.states.len() - 1
    }

    fn text(&mut self, text: &str, next: usize) -> usize {
        text.chars().rev().fold(next, |next, c| self.push(State::Char(c, next)))
    }

    fn texts(&mut self, texts: Vec<String>, chosen: bool, next: usize) -> usize {
        let ways = texts.iter().map(|t| self.text(t, next)).collect();
        self.push(State::Fork { ways, chosen })
    }

    /// The state at which `nodes` begin, followed by `next`.
    fn nodes(&mut self, grammar: &Grammar, nodes: &[Node], next: usize) -> usize {
        nodes.iter().rev().fold(next, |next, node| match node {
            Node::Text(text) => self.text(text, next),
            Node::Rule(name) => self.nodes(grammar, grammar.rule(name), next),
            Node::Choice(branches) => {
                let ways = branches.iter().map(|b| self.nodes(grammar, &b.nodes, next)).collect();
                self.push(State::Fork { ways, chosen: true })
            }
            Node::Draw(_, lists, capital) => {
                let rows = lists.iter().flat_map(|l| grammar.list(l));
                self.texts(rows.map(|r| capitalised(&r[""], *capital)).collect(), true, next)
            }
            Node::Recall(slot, form, capital) => {
                let rows = self.bound[slot].iter().flat_map(|l| grammar.list(l));
                let texts: BTreeSet<_> =
                    rows.filter_map(|r| r.get(form)).map(|t| capitalised(t, *capital)).collect();
                self.texts(texts.into_iter().collect(), false, next)
            }
        })
    }

    /// Whether some text can be generated both from `a` and from `b`.
    fn meet(&mut self, a: usize, b: usize) -> bool {
        if a == b {
            return true;
        }
        let pair = (a.min(b), a.max(b));
        if let Some(&known) = self.meeting.get(&pair) {
            return known;
        }
        let met = match (&self.states[a], &self.states[b]) {
            (State::Fork { ways, .. }, _) => ways.clone().into_iter().any(|way| self.meet(way, b)),
            (_, State::Fork { ways, .. }) => ways.clone().into_iter().any(|way| self.meet(a, way)),
            (&State::Char(c, next), &State::Char(d, after)) => c == d && self.meet(next, after),
            _ => false,
        };
        self.meeting.insert(pair, met);
        met
    }

    /// The fewest and the most words of a text. The successors of a state were pushed before it.
    fn words(&self, start: usize) -> (usize, usize) {
        let mut spaces = vec![(0, 0)];
        for state in &self.states[1..=start] {
            spaces.push(match state {
                State::Char(' ', next) => (spaces[*next].0 + 1, spaces[*next].1 + 1),
                State::Char(_, next) => spaces[*next],
                State::Fork { ways, .. } => ways
                    .iter()
                    .map(|w| spaces[*w])
                    .fold((usize::MAX, 0), |a, w| (a.0.min(w.0), a.1.max(w.1))),
                State::End => (0, 0),
            });
        }
        (spaces[start].0 + 3, spaces[start].1 + 3)
    }

    /// Whether `text` can be generated from `at`.
    fn tell(&self, at: usize, text: &str) -> bool {
        match &self.states[at] {
            State::Char(c, next) => {
                text.strip_prefix(*c).is_some_and(|rest| self.tell(*next, rest))
            }
            State::Fork { ways, .. } => ways.iter().any(|&way| self.tell(way, text)),
            State::End => text.is_empty(),
        }
    }

    /// The start of a text that can follow two different branches of the same choice, if there is
    /// one.
    fn find_ambiguity(&mut self) -> Option<String> {
        for at in 0..self.states.len() {
            let State::Fork { ways, chosen: true } = &self.states[at] else { continue };
            let ways = ways.clone();
            for (i, &a) in ways.iter().enumerate() {
                if ways[..i].iter().any(|&b| self.meet(a, b)) {
                    return Some(self.rest(a, 100));
                }
            }
        }
        None
    }

    /// The first characters of a text generated from `at`.
    fn rest(&self, at: usize, len: usize) -> String {
        match &self.states[at] {
            State::Char(c, next) if len > 0 => format!("{c}{}", self.rest(*next, len - 1)),
            State::Fork { ways, .. } => self.rest(ways[0], len),
            _ => String::new(),
        }
    }
}

fn grammar() -> Grammar {
    Grammar::parse(include_str!("stories.txt"))
}

/// Two derivations of one text would differ at some choice, with the same text before and after it.
/// It is therefore enough that no two branches of a choice can generate the same rest of a story.
#[test]
fn no_text_has_two_derivations() {
    let (mut paths, start) = Paths::new(&grammar());
    assert_eq!(paths.find_ambiguity(), None);
    assert!(
        (0..300).all(|i| paths.tell(start, &story(3, i).text)),
        "the proof is about other texts"
    );
}

#[test]
fn an_ambiguity_is_found() {
    for rule in ["{a|ab}{bc|c}", "{a|a}", "a{|b}{|b}", "{<x>|[s:list]}"] {
        let source = format!("\n@list: one, two\n## story: {rule}\n## x: {{three|two}}");
        assert!(Paths::new(&Grammar::parse(&source)).0.find_ambiguity().is_some(), "{rule}");
    }
}

/// A lower bound of the information of the most likely text of `nodes`. Guarded alternatives count
/// as closed, and the rows that other slots hold are assumed to reduce each list as much as
/// possible.
fn least_bits(grammar: &Grammar, nodes: &[Node]) -> f64 {
    let least = |node: &Node| match node {
        Node::Text(_) | Node::Recall(..) => 0.0,
        Node::Rule(name) => least_bits(grammar, grammar.rule(name)),
        Node::Draw(_, lists, _) => {
            let rows: usize = lists.iter().map(|l| grammar.list(l).len()).sum();
            (rows.saturating_sub(2).max(1) as f64).log2() // no list fills more than three slots
        }
        Node::Choice(branches) => {
            let open: u64 = branches.iter().filter(|b| b.guard.is_none()).map(|b| b.weight).sum();
            let bits = |b: &Branch| {
                let total = open + if b.guard.is_some() { b.weight } else { 0 };
                (total as f64 / b.weight as f64).log2() + least_bits(grammar, &b.nodes)
            };
            branches.iter().map(bits).fold(f64::INFINITY, f64::min)
        }
    };
    nodes.iter().map(least).sum()
}

/// Two stories drawn independently are therefore equal with a probability below 2^-69.
#[test]
fn no_story_is_likely() {
    let grammar = grammar();
    let bits = least_bits(&grammar, grammar.rule("story"));
    assert!(bits > 69.0, "{bits}");
}

#[test]
fn stories_have_the_promised_length() {
    let (paths, start) = Paths::new(&grammar());
    let (fewest, most) = paths.words(start);
    assert!(fewest >= 80 && most <= 220, "{fewest} to {most} words");
}

/// In a small grammar with every kind of choice, 2^-bits of the distinct texts add up to 1.
#[test]
fn bits_are_those_of_a_distribution() {
    let rules = "{3*[a:list]|5*not [b:list]} [c:list]{|(a) x|2*(c.form=f) y|(c.form=g) z}";
    let source = format!("\n@list form\none : f\ntwo, six : g\n## story: {rules}");
    let small = Grammar::parse(&source);
    let told: HashMap<_, _> =
        (0..2000).map(|i| small.story(1, i)).map(|s| (s.text, (-s.bits).exp2())).collect();
    assert!((told.values().sum::<f64>() - 1.0).abs() < 1e-12, "{told:?}");
}

/// Reference values of SplitMix64 for the seed 1234567.
#[test]
fn random_numbers_are_splitmix64() {
    let mut random = SplitMix64(1_234_567);
    assert_eq!(
        [random.next(), random.next()],
        [6_457_827_717_110_365_317, 3_203_168_211_198_807_973]
    );
}

#[test]
fn entropy_is_large_and_streams_do_not_meet() {
    let train: Vec<_> = (0..4000).map(|i| story(1, i)).collect();
    let mean = train.iter().map(|s| s.bits).sum::<f64>() / 4000.0;
    assert!((90.0..100.0).contains(&mean), "{mean}");
    assert_eq!(train[7], story(1, 7));
    let held_out = (0..4000).map(|i| story(2, i).text);
    let distinct: HashSet<_> = train.iter().map(|s| s.text.clone()).chain(held_out).collect();
    assert_eq!(distinct.len(), 8000);
}

#[test]
fn stories_are_well_formed() {
    for text in (0..4000).map(|i| story(5, i).text) {
        assert!(
            ["  ", " .", " ,", "..", "\n\n\n", " \n", ",,", "!,"]
                .iter()
                .all(|slip| !text.contains(slip)),
            "{text}"
        );
        assert!(text.ends_with(['.', '!', '"']) && text.split("\n\n").count() == 3, "{text}");
        let words: Vec<_> =
            text.split_whitespace().map(|w| w.trim_matches(|c: char| !c.is_alphabetic())).collect();
        for pair in words.windows(2) {
            let vowel = pair[1].starts_with(['a', 'e', 'i', 'o', 'u']);
            assert!(!(pair[0] == "a" && vowel || pair[0] == "an" && !vowel), "{pair:?} in {text}");
            assert!(
                pair[0] != pair[1] || ["had", "Thank"].contains(&pair[0]),
                "{pair:?} in {text}"
            );
        }
        assert!(text.split("\n\n").all(|p| p.matches('"').count() % 2 == 0), "{text}");
        let starts = text.split(". ").chain(text.split("\n\n"));
        assert!(
            starts.clone().all(|s| s.trim_start_matches('"').starts_with(char::is_uppercase)),
            "{text}"
        );
    }
}

#[test]
fn once_upon_a_time_leads_to_every_plot() {
    let texts: Vec<_> = (0..2000).map(|i| story(6, i).text).collect();
    let begun: Vec<_> = texts.iter().filter(|t| t.starts_with("Once upon a time")).collect();
    assert!(begun.len() > 900, "{}", begun.len());
    let signs = "did you|I can |thunder|birthday|fell down|one wish|No, |safety|shadow| seed|Tuesday|gold in it| fog";
    for sign in signs.split('|') {
        assert!(begun.iter().any(|t| t.contains(sign)), "{sign}");
    }
}
