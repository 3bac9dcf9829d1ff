//! Memory aligned to a cache line: packed weights, and scratch that is kept for the next call.

use std::sync::Mutex;

use bytemuck::Pod;

use super::pages;

const LINE: usize = 64;

/// Bytes, aligned to 64.
#[derive(Default)]
pub(super) struct Buffer {
    /// One cache line more than the bytes.
    memory: Vec<u64>,
    /// The word of `memory` at which the first cache line begins.
    first: usize,
}

impl Buffer {
    /// Zeros, on pages that the system provides when they are first written. Large buffers ask for
    /// huge pages: with pages of 4 KiB, address translation takes 1 to 10 % of a call with up to 32
    /// rows (Zen 4).
    pub(super) fn zeroed(bytes: usize) -> Self {
        let bytes = bytes.next_multiple_of(LINE);
        // Words rather than cache lines: an allocation with a larger alignment is zeroed by
        // writing, which would touch every page.
        let memory: Vec<u64> = bytemuck::zeroed_vec((bytes + LINE) / size_of::<u64>());
        let first = memory.as_ptr().align_offset(LINE);
        let mut buffer = Self { memory, first };
        pages::advise_huge(buffer.as_mut_ptr::<u8>(), bytes);
        buffer
    }

    pub(super) fn len(&self) -> usize {
        (self.memory.len() * size_of::<u64>()).saturating_sub(LINE)
    }

    pub(super) fn bytes(&self) -> &[u8] {
        bytemuck::cast_slice(&self.memory[self.first..][..self.len() / size_of::<u64>()])
    }

    pub(super) fn as_ptr<T: Pod>(&self) -> *const T {
        self.memory[self.first..].as_ptr().cast()
    }

    pub(super) fn as_mut_ptr<T: Pod>(&mut self) -> *mut T {
        self.memory[self.first..].as_mut_ptr().cast()
    }
}

/// Scratch that is not in use.
static IDLE: Mutex<Vec<Buffer>> = Mutex::new(Vec::new());

/// A borrowed buffer with arbitrary content, returned when dropped. The pool holds at most as many
/// buffers as were in use at once.
pub(super) struct Scratch(Buffer);

impl Scratch {
    /// The largest idle buffer, or a larger one in its place.
    pub(super) fn borrow(bytes: usize) -> Self {
        let idle = idle().pop();
        Self(idle.filter(|buffer| buffer.len() >= bytes).unwrap_or_else(|| Buffer::zeroed(bytes)))
    }

    pub(super) fn as_mut_ptr(&mut self) -> *mut u8 {
        self.0.as_mut_ptr()
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        let mut idle = idle();
        let at = idle.partition_point(|other| other.len() <= self.0.len());
        idle.insert(at, std::mem::take(&mut self.0));
    }
}

fn idle() -> std::sync::MutexGuard<'static, Vec<Buffer>> {
    IDLE.lock().unwrap_or_else(|poisoned| poisoned.into_inner())
}
