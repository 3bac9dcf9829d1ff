//! Memory whose first byte begins a cache line: packed weights, and scratch that is kept for the next call.

use std::sync::Mutex;

use bytemuck::{Pod, Zeroable};

const LINE: usize = 64;

#[derive(Clone, Copy)]
#[repr(align(64))]
struct Line(#[allow(dead_code, reason = "read through pointers")] [u8; LINE]);

// SAFETY: 64 bytes, no padding, and zeros are a valid value.
unsafe impl Zeroable for Line {}

/// Bytes, aligned to 64.
pub(super) struct Buffer(Vec<Line>);

impl Buffer {
    /// Zeros, on pages that the system hands out as they are written.
    pub(super) fn zeroed(bytes: usize) -> Self {
        Self(bytemuck::zeroed_vec(bytes.div_ceil(LINE)))
    }

    pub(super) fn bytes(&self) -> usize {
        self.0.len() * LINE
    }

    pub(super) fn words(&self) -> &[f32] {
        // SAFETY: whole lines of 64 initialised bytes, aligned to 64.
        unsafe { std::slice::from_raw_parts(self.0.as_ptr().cast(), self.bytes() / size_of::<f32>()) }
    }

    pub(super) fn as_ptr<T: Pod>(&self) -> *const T {
        self.0.as_ptr().cast()
    }

    pub(super) fn as_mut_ptr<T: Pod>(&mut self) -> *mut T {
        self.0.as_mut_ptr().cast()
    }
}

/// Scratch that is not in use.
static IDLE: Mutex<Vec<Buffer>> = Mutex::new(Vec::new());

/// A buffer on loan, of any content; given back when dropped. There are never more than there were loans at one time.
pub(super) struct Scratch(Buffer);

impl Scratch {
    /// The largest idle buffer, or a larger one in its place.
    pub(super) fn borrow(bytes: usize) -> Self {
        let idle = idle().pop();
        Self(idle.filter(|buffer| buffer.bytes() >= bytes).unwrap_or_else(|| Buffer::zeroed(bytes)))
    }

    pub(super) fn as_mut_ptr(&mut self) -> *mut u8 {
        self.0.as_mut_ptr()
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        let mut idle = idle();
        let at = idle.partition_point(|other| other.bytes() <= self.0.bytes());
        idle.insert(at, Buffer(std::mem::take(&mut self.0.0)));
    }
}

fn idle() -> std::sync::MutexGuard<'static, Vec<Buffer>> {
    IDLE.lock().unwrap_or_else(|poisoned| poisoned.into_inner())
}
