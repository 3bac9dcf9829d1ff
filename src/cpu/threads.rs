//! Work on candle's threads. Threads claim it in units, so that a slow thread does not delay the
//! others.

use std::mem::MaybeUninit;
use std::ops::Range;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

use candle_core::utils::barrier_pool;

/// The number of candle's threads including the calling one (`CANDLE_NUM_THREADS`,
/// `RAYON_NUM_THREADS`).
pub(super) fn count() -> usize {
    barrier_pool().n_workers() + 1
}

/// Calls `f(i)` once for each i in 0..[`count`], on the threads that are free. One thread may make
/// several of the calls, so no call may wait for another one to start.
///
/// All calls run on the calling thread if it is one of candle's own, or if a panic elsewhere has
/// poisoned candle's pool.
pub(super) fn run(f: impl Fn(usize) + Sync) {
    run_chunked(count(), |calls| calls.for_each(&f));
}

/// Calls `f` with ranges that partition 0..n, about one per thread. Nothing else uses candle's
/// pool.
pub(super) fn run_chunked(n: usize, f: impl Fn(Range<usize>) + Sync) {
    static UNUSABLE: AtomicBool = AtomicBool::new(false);
    if count() == 1 || UNUSABLE.load(Ordering::Relaxed) {
        return f(0..n);
    }
    let started = AtomicBool::new(false);
    let outcome = catch_unwind(AssertUnwindSafe(|| {
        barrier_pool().execute_chunked(n, |range| {
            started.store(true, Ordering::Relaxed);
            f(range);
        });
    }));
    match outcome {
        Ok(()) => (),
        Err(payload) if started.load(Ordering::Relaxed) => resume_unwind(payload),
        Err(_) => {
            UNUSABLE.store(true, Ordering::Relaxed);
            f(0..n)
        }
    }
}

/// A claim is this fraction of a thread's share of the remaining units: claims are few, and a slow
/// thread does not delay the others for long.
const PARTS: usize = 8;

/// Units of work that threads claim in runs. The runs get shorter towards the end.
pub(super) struct Phase {
    units: usize,
    /// [`PARTS`] times the number of threads.
    parts: usize,
    next: AtomicUsize,
    done: AtomicUsize,
}

impl Phase {
    pub(super) fn new(units: usize) -> Self {
        Self { units, parts: PARTS * count(), next: AtomicUsize::new(0), done: AtomicUsize::new(0) }
    }

    /// Claims units and calls `f(unit, next)` for each until none is left. `next` is the unit that
    /// this thread will most likely claim afterwards, or `units` if there is none.
    pub(super) fn work(&self, mut f: impl FnMut(usize, usize)) {
        let run = |start: usize| ((self.units - start) / self.parts).max(1);
        let claim = |next: usize| (next < self.units).then(|| next + run(next));
        while let Ok(start) = self.next.fetch_update(Ordering::Relaxed, Ordering::Relaxed, claim) {
            let end = start + run(start);
            let _finish = Finish(&self.done, end - start);
            for unit in start..end {
                f(unit, if unit + 1 < end { unit + 1 } else { self.next.load(Ordering::Relaxed) });
            }
        }
    }

    /// Waits until all units are done. Units that still run are on other threads.
    pub(super) fn wait(&self) {
        const SPINS: usize = 1 << 14;
        let mut spins = 0;
        while self.done.load(Ordering::Acquire) < self.units {
            spins += 1;
            if spins < SPINS {
                std::hint::spin_loop();
            } else {
                std::thread::yield_now();
            }
        }
    }
}

/// Counts units as done even if one panics. Otherwise the other threads would wait forever.
struct Finish<'a>(&'a AtomicUsize, usize);

impl Drop for Finish<'_> {
    fn drop(&mut self) {
        self.0.fetch_add(self.1, Ordering::Release);
    }
}

/// A buffer whose disjoint pieces are written by different threads.
pub(super) struct SendPtr<T>(pub(super) *mut T);

// SAFETY: whoever dereferences the pointer keeps the pieces of different threads disjoint.
unsafe impl<T: Send> Sync for SendPtr<T> {}
// SAFETY: as above.
unsafe impl<T: Send> Send for SendPtr<T> {}

impl<T> SendPtr<T> {
    /// The element `at`.
    ///
    /// # Safety
    /// `at` lies within the allocation or at its end.
    pub(super) unsafe fn at(&self, at: usize) -> *mut T {
        // SAFETY: the caller's contract.
        unsafe { self.0.add(at) }
    }

    /// # Safety
    /// `at..at + len` lies within the allocation, and no other live slice overlaps it.
    #[allow(clippy::mut_from_ref)]
    pub(super) unsafe fn slice(&self, at: usize, len: usize) -> &mut [MaybeUninit<T>] {
        // SAFETY: the caller's contract; MaybeUninit<T> has T's layout and needs no initialisation.
        unsafe { std::slice::from_raw_parts_mut(self.0.add(at).cast(), len) }
    }
}
