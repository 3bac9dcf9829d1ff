//! The names of a block's three matrices.

/// One of a block's matrices. A linear layer has a single matrix and needs no tag.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Which {
    /// gate_proj (I,H)
    Gate,
    /// up_proj (I,H)
    Up,
    /// down_proj (H,I)
    Down,
}

impl Which {
    /// All three, in the order of evaluation.
    pub(crate) const ALL: [Self; 3] = [Self::Gate, Self::Up, Self::Down];

    /// The name that messages use.
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Gate => "gate_proj",
            Self::Up => "up_proj",
            Self::Down => "down_proj",
        }
    }

    /// The name of the matrix's bias in messages.
    pub(crate) fn bias_name(self) -> &'static str {
        match self {
            Self::Gate => "gate_proj bias",
            Self::Up => "up_proj bias",
            Self::Down => "down_proj bias",
        }
    }
}
