//! Huge pages for large allocations.
//!
//! The first write to a new output of 235 MB (4096 x 14336 in f32) causes 57,000 page faults, which
//! take longer than the arithmetic. With huge pages there are 112. Linux provides them on request
//! in its `madvise` mode, the default of Debian and Ubuntu.

/// A smaller allocation may not contain a whole huge page.
const FROM: usize = 4 << 20;

/// Requests huge pages for `capacity` elements at `start`. Failure has no effect on the result.
pub(super) fn advise_huge<T>(start: *mut T, capacity: usize) {
    let bytes = capacity.saturating_mul(size_of::<T>());
    if bytes >= FROM {
        advise(start as usize, bytes);
    }
}

#[cfg(target_os = "linux")]
fn advise(start: usize, bytes: usize) {
    const HUGE: usize = 2 << 20;
    let first = start.next_multiple_of(HUGE);
    let last = (start + bytes) / HUGE * HUGE;
    if first < last {
        // SAFETY: the range lies within one live allocation, and the advice does not change its
        // contents.
        unsafe { libc::madvise(first as *mut libc::c_void, last - first, libc::MADV_HUGEPAGE) };
    }
}

#[cfg(not(target_os = "linux"))]
fn advise(_: usize, _: usize) {}
