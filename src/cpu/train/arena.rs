//! Pieces of one scratch buffer.

use crate::cpu::buffer::Scratch;
use crate::cpu::threads::SendPtr;

/// Adds up the sizes of pieces, each of which begins with a cache line.
#[derive(Default)]
pub(super) struct Arena(usize);

impl Arena {
    /// The offset of a new piece.
    pub(super) fn piece(&mut self, bytes: usize) -> usize {
        let start = self.0;
        self.0 = (start + bytes).next_multiple_of(64);
        start
    }

    pub(super) fn bytes(&self) -> usize {
        self.0
    }
}

/// Scratch that all threads share, and a piece of equal size for each of them.
pub(super) struct Memory {
    base: SendPtr<u8>,
    own: usize,
    own_bytes: usize,
    _scratch: Scratch,
}

impl Memory {
    pub(super) fn new(mut shared: Arena, own: &Arena, threads: usize) -> Self {
        let start = shared.piece(threads * own.bytes());
        let mut scratch = Scratch::borrow(shared.bytes());
        let base = SendPtr(scratch.as_mut_ptr());
        Self { base, own: start, own_bytes: own.bytes(), _scratch: scratch }
    }

    /// The byte at an offset of the shared pieces.
    pub(super) fn at(&self, offset: usize) -> *mut u8 {
        self.base.0.wrapping_add(offset)
    }

    /// A thread's first byte.
    pub(super) fn own(&self, thread: usize) -> *mut u8 {
        self.at(self.own + thread * self.own_bytes)
    }
}
