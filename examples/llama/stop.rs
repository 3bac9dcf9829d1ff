//! Strings that end a text.

/// Ends a text before the first stop string, which may be spread over several pieces.
pub struct Stop<'a> {
    strings: &'a [String],
    /// The end of the text so far, if it may be the beginning of a stop string.
    held: String,
}

impl<'a> Stop<'a> {
    /// Searches for `strings`, none of which may be empty.
    pub fn new(strings: &'a [String]) -> Self {
        Self { strings, held: String::new() }
    }

    /// The text that can be returned after `piece`, and whether a stop string follows it.
    pub fn push(&mut self, piece: &str) -> (String, bool) {
        self.held.push_str(piece);
        if let Some(end) =
            self.strings.iter().filter_map(|stop| self.held.find(stop.as_str())).min()
        {
            self.held.truncate(end);
            return (self.finish(), true);
        }
        let begins_stop = |(i, _): &(usize, char)| {
            self.strings.iter().any(|stop| stop.starts_with(&self.held[*i..]))
        };
        let certain =
            self.held.char_indices().find(begins_stop).map_or(self.held.len(), |(i, _)| i);
        let rest = self.held.split_off(certain);
        (std::mem::replace(&mut self.held, rest), false)
    }

    /// The text that was not returned because a stop string could begin with it.
    pub fn finish(&mut self) -> String {
        std::mem::take(&mut self.held)
    }
}
