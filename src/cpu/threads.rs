//! Threads, and work that they claim in units.
//!
//! A phase of work ends when its units are done, not when every thread has arrived. Whoever runs
//! claims the next unit, so that a call waits for a thread that the system does not run only if it
//! was interrupted within the call. Nobody waits for a thread that has not started. candle's pool
//! differs: each of its calls ends when every thread has woken, run and left. With other programs
//! on the machine most calls then wait for a thread that is not running.

use std::cell::{Cell, UnsafeCell};
use std::mem::MaybeUninit;
use std::ops::Range;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Mutex, OnceLock};
use std::thread::Thread;

use candle_core::utils::{barrier_pool, set_thread_affinity};

/// How many times a thread checks for what it waits for before it lets others run. A check takes 20
/// to 70 ns.
const SPINS: usize = 1 << 10;
/// The same for a worker without work, which does so twice and then sleeps. Waking it takes longer
/// than the gap between two layers of a model.
const IDLE_SPINS: usize = 1 << 11;

/// The number of threads including the calling one: as many as candle uses (`CANDLE_NUM_THREADS`,
/// `RAYON_NUM_THREADS`).
pub(super) fn count() -> usize {
    barrier_pool().n_workers() + 1
}

/// Calls `f(0)`, and on each worker that is free in the meantime `f(i)` with its number i in
/// 1..[`count`]. The work is to be claimed from a [`Phase`], so that `f(0)` alone does all of it if
/// no worker comes.
///
/// Calls of several threads run one after the other. A call within a call is `f(0)` alone.
pub(super) fn run(f: impl Fn(usize) + Sync) {
    if count() == 1 || WITHIN_CALL.get() {
        return f(0);
    }
    let pool = Pool::get();
    // A panic of an earlier caller has left the pool in order.
    let _calling = pool.calling.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
    pool.run(&f);
}

/// [`run`], or `f(0)` alone for one thread.
pub(super) fn run_on(threads: usize, f: impl Fn(usize) + Sync) {
    if threads == 1 { f(0) } else { run(f) }
}

/// Calls `f` with ranges that partition 0..n, about [`PARTS`] per thread.
pub(super) fn run_chunked(n: usize, f: impl Fn(Range<usize>) + Sync) {
    let chunk = n.div_ceil(PARTS * count()).max(1);
    let chunks = Phase::new(n.div_ceil(chunk));
    run(|_| chunks.work(|unit, _| f(unit * chunk..n.min((unit + 1) * chunk))));
}

thread_local! {
    /// This thread is a worker, or the caller of a job.
    static WITHIN_CALL: Cell<bool> = const { Cell::new(false) };
}

/// [`Pool::state`]: workers may enter the job.
const OPEN: usize = 1;
/// One worker within the job.
const INSIDE: usize = 2;
/// One job.
const JOB: usize = 1 << 16;

/// This crate's workers. They live as long as the process.
struct Pool {
    /// Held by the caller.
    calling: Mutex<()>,
    /// [`OPEN`], the number of workers within the job, and the number of the job.
    state: AtomicUsize,
    job: UnsafeCell<Job>,
    panic: Mutex<Option<Box<dyn std::any::Any + Send>>>,
    workers: OnceLock<Vec<Thread>>,
}

/// A function and the caller's closure.
#[derive(Clone, Copy)]
struct Job {
    call: unsafe fn(*const (), usize),
    closure: *const (),
}

// SAFETY: `job` is written while no worker is inside and none may enter. It is read by workers that
// have entered, and its closure is Sync.
unsafe impl Sync for Pool {}
// SAFETY: as above.
unsafe impl Send for Pool {}

impl Pool {
    fn get() -> &'static Self {
        static POOL: OnceLock<&Pool> = OnceLock::new();
        POOL.get_or_init(|| {
            let pool: &Self = Box::leak(Box::new(Self {
                calling: Mutex::new(()),
                state: AtomicUsize::new(0),
                job: UnsafeCell::new(Job { call: |_, _| (), closure: std::ptr::null() }),
                panic: Mutex::new(None),
                workers: OnceLock::new(),
            }));
            // Without threads (WebAssembly, a limit of the system) the caller works alone.
            let workers = (1..count()).map_while(|index| {
                let name = format!("candle-swiglu-{index}");
                std::thread::Builder::new().name(name).spawn(move || pool.work(index)).ok()
            });
            let workers = workers.map(|handle| handle.thread().clone()).collect();
            pool.workers.get_or_init(|| workers);
            pool
        })
    }

    /// The caller's part of a job; `calling` is locked.
    fn run<F: Fn(usize) + Sync>(&self, f: &F) {
        /// # Safety
        /// `closure` points to an F.
        unsafe fn call<F: Fn(usize) + Sync>(closure: *const (), index: usize) {
            // SAFETY: the caller's contract.
            unsafe { (*closure.cast::<F>())(index) }
        }
        /// Ends the job also if the caller panics: its closure is about to be dropped.
        struct End<'a>(&'a Pool);
        impl Drop for End<'_> {
            fn drop(&mut self) {
                WITHIN_CALL.set(false);
                self.0.state.fetch_and(!OPEN, Ordering::Relaxed);
                wait_until(|| self.0.state.load(Ordering::Acquire).is_multiple_of(JOB));
            }
        }
        // A worker's panic is lost if the caller has panicked too.
        drop(self.take_panic());
        // SAFETY: the last job has ended, so that no worker is inside, and none may enter.
        unsafe { *self.job.get() = Job { call: call::<F>, closure: std::ptr::from_ref(f).cast() } };
        let end = End(self);
        WITHIN_CALL.set(true);
        self.state.fetch_add(JOB | OPEN, Ordering::Release);
        self.workers.get().into_iter().flatten().for_each(Thread::unpark);
        f(0);
        drop(end);
        if let Some(payload) = self.take_panic() {
            resume_unwind(payload);
        }
    }

    fn take_panic(&self) -> Option<Box<dyn std::any::Any + Send>> {
        self.panic.lock().unwrap_or_else(|poisoned| poisoned.into_inner()).take()
    }

    /// The life of a worker.
    fn work(&self, index: usize) {
        WITHIN_CALL.set(true);
        set_thread_affinity();
        let (mut last, mut spins) = (0, 0);
        loop {
            let state = self.state.load(Ordering::Relaxed);
            if state & OPEN != 0 && state / JOB != last {
                let entered = self.state.compare_exchange(
                    state,
                    state + INSIDE,
                    Ordering::Acquire,
                    Ordering::Relaxed,
                );
                if entered.is_ok() {
                    last = state / JOB;
                    spins = 0;
                    // SAFETY: the job is open and stays in place until this worker has left.
                    let Job { call, closure } = unsafe { *self.job.get() };
                    // SAFETY: the closure is alive until this worker has left.
                    let call = AssertUnwindSafe(|| unsafe { call(closure, index) });
                    if let Err(payload) = catch_unwind(call) {
                        let panic = self.panic.lock();
                        *panic.unwrap_or_else(|poisoned| poisoned.into_inner()) = Some(payload);
                    }
                    self.state.fetch_sub(INSIDE, Ordering::Release);
                }
            } else if spins < IDLE_SPINS {
                spins += 1;
                std::hint::spin_loop();
            } else {
                spins = 0;
                std::thread::park();
            }
        }
    }
}

/// Spins for a while, then lets other threads run.
fn wait_until(done: impl Fn() -> bool) {
    let mut spins = 0;
    while !done() {
        spins += 1;
        if spins < SPINS {
            std::hint::spin_loop();
        } else {
            std::thread::yield_now();
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
        wait_until(|| self.done.load(Ordering::Acquire) >= self.units);
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
