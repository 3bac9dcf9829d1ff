//! Runs a kernel over candle's CPU storages of any layout, on all threads, without copying
//! an operand.
//!
//! 1. The output is allocated, not initialised, and cut into blocks of 4096 elements that threads
//!    claim.
//! 2. A block is cut into segments on which every operand is either one contiguous slice, lent as
//!    it lies, or is gathered into a buffer of at most 512 elements (transposed, interleaved and
//!    broadcast operands).
//! 3. The kernel runs on each segment.

use std::ops::Range;

use candle_core::{CpuStorage, Layout};

use super::kernels::{CpuKernels, GateKernels};
use super::pages;
use super::threads::{self, SendPtr};
use crate::error::{Error, Result};
use crate::gate::activation::Glu;
use crate::reference;

/// Below this many elements one thread is faster than waking the others: the bound candle's own
/// elementwise ops use.
const PARALLEL_FROM: usize = 64 * 1024;
/// What a thread claims is a multiple of this.
const BLOCK: usize = 4096;
/// A gathered segment: 512 · 4 B · 3 operands = 6 KiB, fits L1.
const GATHER: usize = 512;
/// Contiguous runs shorter than this are gathered: a kernel call per run would cost more.
const MIN_RUN: usize = 64;

/// `op` of gate and up, of equal shape -> a contiguous storage of that shape.
pub(crate) fn gate_forward(
    kernels: &CpuKernels,
    op: &Glu,
    gate: (&CpuStorage, &Layout),
    up: (&CpuStorage, &Layout),
) -> Result<CpuStorage> {
    use CpuStorage as C;
    Ok(match (gate.0, up.0) {
        (C::F32(g), C::F32(u)) => {
            C::F32(run_forward(&kernels.gate_f32, op, (g, gate.1), (u, up.1)))
        }
        (C::BF16(g), C::BF16(u)) => {
            C::BF16(run_forward(&kernels.gate_bf16, op, (g, gate.1), (u, up.1)))
        }
        (C::F16(g), C::F16(u)) => {
            C::F16(run_forward(&kernels.gate_f16, op, (g, gate.1), (u, up.1)))
        }
        (C::F64(g), C::F64(u)) => C::F64(run_forward(&F64, op, (g, gate.1), (u, up.1))),
        _ => return Err(unsupported()),
    })
}

/// The gradients of gate, up under dy, all of one shape -> a contiguous storage of shape (2, ..):
/// dgate, then dup.
pub(crate) fn gate_backward(
    kernels: &CpuKernels,
    op: &Glu,
    inputs: [(&CpuStorage, &Layout); 3],
) -> Result<CpuStorage> {
    use CpuStorage as C;
    let layouts = inputs.map(|(_, layout)| layout);
    Ok(match inputs.map(|(storage, _)| storage) {
        [C::F32(g), C::F32(u), C::F32(dy)] => {
            C::F32(run_backward(&kernels.gate_f32, op, [g, u, dy], layouts))
        }
        [C::BF16(g), C::BF16(u), C::BF16(dy)] => {
            C::BF16(run_backward(&kernels.gate_bf16, op, [g, u, dy], layouts))
        }
        [C::F16(g), C::F16(u), C::F16(dy)] => {
            C::F16(run_backward(&kernels.gate_f16, op, [g, u, dy], layouts))
        }
        [C::F64(g), C::F64(u), C::F64(dy)] => C::F64(run_backward(&F64, op, [g, u, dy], layouts)),
        _ => return Err(unsupported()),
    })
}

/// The public functions check dtypes before they come here.
fn unsupported() -> Error {
    Error::DTypeUnsupported {
        name: "gate or up".into(),
        found: "another or mixed dtypes".into(),
        location: None,
    }
}

/// f64 is computed by the definition itself.
const F64: GateKernels<f64> = GateKernels {
    forward: |op, gate, up, out| {
        for ((out, &g), &u) in out.iter_mut().zip(gate).zip(up) {
            out.write(reference::glu(op, g, u));
        }
    },
    backward: |op, [gate, up, dy], [dgate, dup]| {
        for (i, (&g, &u)) in gate.iter().zip(up).enumerate() {
            let (dg, du) = reference::glu_grad(op, g, u, dy[i]);
            dgate[i].write(dg);
            dup[i].write(du);
        }
    },
};

fn run_forward<T: Copy + Send + Sync>(
    f: &GateKernels<T>,
    op: &Glu,
    gate: (&[T], &Layout),
    up: (&[T], &Layout),
) -> Vec<T> {
    let n = gate.1.shape().elem_count();
    let views = [View::new(gate.0, gate.1), View::new(up.0, up.1)];
    let mut out: Vec<T> = Vec::with_capacity(n);
    pages::advise_huge(out.as_mut_ptr(), out.capacity());
    let base = SendPtr(out.as_mut_ptr());
    parallel(n, |range| {
        segments(&views, range, |at, [gate, up]| {
            // SAFETY: segments are disjoint and lie in 0..n, the capacity of `out`.
            let out = unsafe { base.slice(at, gate.len()) };
            (f.forward)(op, gate, up, out);
        });
    });
    // SAFETY: the segments cover 0..n and the kernel writes every element of its output.
    unsafe { out.set_len(n) };
    out
}

fn run_backward<T: Copy + Send + Sync>(
    f: &GateKernels<T>,
    op: &Glu,
    data: [&[T]; 3],
    layouts: [&Layout; 3],
) -> Vec<T> {
    let n = layouts[0].shape().elem_count();
    let views = [0, 1, 2].map(|i| View::new(data[i], layouts[i]));
    let mut out: Vec<T> = Vec::with_capacity(2 * n);
    pages::advise_huge(out.as_mut_ptr(), out.capacity());
    let base = SendPtr(out.as_mut_ptr());
    parallel(n, |range| {
        segments(&views, range, |at, inputs| {
            let len = inputs[0].len();
            // SAFETY: segments are disjoint and lie in 0..n; `out` has 2n elements, dup in the
            // second half.
            let (dgate, dup) = unsafe { (base.slice(at, len), base.slice(n + at, len)) };
            (f.backward)(op, inputs, [dgate, dup]);
        });
    });
    // SAFETY: the segments cover 0..n in both halves and the kernel writes every element of its
    // outputs.
    unsafe { out.set_len(2 * n) };
    out
}

/// Calls `f` on ranges that partition 0..n: on this thread if n is small, else on all threads.
fn parallel(n: usize, f: impl Fn(Range<usize>) + Sync) {
    if n <= PARALLEL_FROM {
        return f(0..n);
    }
    threads::run_chunked(n.div_ceil(BLOCK), |blocks| {
        f(blocks.start * BLOCK..n.min(blocks.end * BLOCK));
    });
}

/// One operand: element i of its shape, in row-major order, lies at `offset(i)`.
struct View<'a, T> {
    data: &'a [T],
    layout: &'a Layout,
    /// Elements that lie contiguously, starting at every multiple of it.
    run: usize,
}

impl<'a, T: Copy> View<'a, T> {
    fn new(data: &'a [T], layout: &'a Layout) -> Self {
        let mut run = 1;
        for (&dim, &stride) in layout.dims().iter().zip(layout.stride()).rev() {
            if dim != 1 && stride != run {
                break;
            }
            run *= dim;
        }
        Self { data, layout, run }
    }

    fn gathered(&self) -> bool {
        self.run < MIN_RUN && self.run < self.layout.shape().elem_count()
    }

    /// Where the row-major element `index` lies.
    fn offset(&self, mut index: usize) -> usize {
        let mut offset = self.layout.start_offset();
        for (&dim, &stride) in self.layout.dims().iter().zip(self.layout.stride()).rev() {
            offset += index % dim * stride;
            index /= dim;
        }
        offset
    }

    /// Copies the elements of `range` into the buffer, if this operand has to be gathered.
    fn gather(&self, range: Range<usize>, buffer: &mut Vec<T>) {
        if !self.gathered() {
            return;
        }
        buffer.clear();
        let last = self.layout.dims().len() - 1;
        let (dim, stride) = (self.layout.dims()[last], self.layout.stride()[last]);
        let mut at = range.start;
        while at < range.end {
            let len = (dim - at % dim).min(range.end - at);
            let start = self.offset(at);
            buffer.extend((0..len).map(|i| self.data[start + i * stride]));
            at += len;
        }
    }

    /// The elements of `range`, as they lie (no run is cut) or as gathered.
    fn elements<'b>(&'b self, range: Range<usize>, buffer: &'b [T]) -> &'b [T] {
        if self.gathered() {
            return buffer;
        }
        let start = self.offset(range.start);
        &self.data[start..start + range.len()]
    }
}

/// Cuts `range` into segments and calls `f` with the start and the operands of each.
fn segments<T: Copy, const N: usize>(
    views: &[View<'_, T>; N],
    range: Range<usize>,
    mut f: impl FnMut(usize, [&[T]; N]),
) {
    let any_gathered = views.iter().any(View::gathered);
    let mut buffers: [Vec<T>; N] = std::array::from_fn(|_| Vec::new());
    let mut at = range.start;
    while at < range.end {
        let mut end = if any_gathered { range.end.min(at + GATHER) } else { range.end };
        for view in views.iter().filter(|view| !view.gathered()) {
            end = end.min((at / view.run + 1) * view.run);
        }
        for (view, buffer) in views.iter().zip(&mut buffers) {
            view.gather(at..end, buffer);
        }
        f(at, std::array::from_fn(|i| views[i].elements(at..end, &buffers[i])));
        at = end;
    }
}
