//! Packing of B for one unit of work, out of a matrix of any strides and into panels.
//!
//! A weight that is trained changes with every step of an optimizer, so it has no packed copy. A
//! unit packs the k-block that it multiplies next into its thread's scratch, where it stays in L2.

use half::bf16;

use crate::cpu::epilogue::Widening;
use crate::cpu::panels::PanelLayout;
use crate::cpu::simd::{Body, Element, Isa, Simd};

/// B (k, columns) and the place of its first element in a panel.
#[derive(Clone, Copy)]
pub(in crate::cpu) struct PackArgs {
    /// The first element of B.
    pub(in crate::cpu) from: *const u8,
    /// Elements between neighbours in k, and between columns.
    pub(in crate::cpu) strides: (usize, usize),
    pub(in crate::cpu) k: usize,
    pub(in crate::cpu) columns: usize,
    /// The first column of a panel at the first step of a round over the streams.
    pub(in crate::cpu) to: *mut u8,
    pub(in crate::cpu) layout: PanelLayout,
}

/// Packs B; what lies beyond k and columns is not touched, except for the odd half of a pair.
pub(in crate::cpu) type Pack = unsafe fn(&PackArgs);

/// # Safety
/// The CPU has the instructions of I. B has k·columns readable elements of type T at its strides,
/// and the panel has room for them in the format of E.
pub(in crate::cpu) unsafe fn pack<I: Isa, T: Element, E: PackedFrom<T>>(args: &PackArgs) {
    struct Packing<'a, T, E>(&'a PackArgs, std::marker::PhantomData<(T, E)>);
    impl<S: Simd, T: Element, E: PackedFrom<T>> Body<S> for Packing<'_, T, E> {
        type Output = ();
        #[inline(always)]
        fn run(self, s: S) {
            // SAFETY: `pack`'s contract.
            unsafe {
                if self.0.strides.1 == 1 {
                    by_steps::<S, T, E>(s, self.0);
                } else {
                    by_columns::<S, T, E>(s, self.0);
                }
            }
        }
    }
    // SAFETY: the caller's contract.
    unsafe { I::assume() }.vectorize(Packing::<T, E>(args, std::marker::PhantomData));
}

/// How elements of type T become steps of a panel that is multiplied with A in Self. A step has one
/// word for each column.
pub(in crate::cpu) trait PackedFrom<T: Element>: Copy + 'static {
    /// Values of k in a word.
    const K_STEP: usize;

    /// The words of one step whose columns are adjacent in memory.
    ///
    /// # Safety
    /// The CPU has the instructions; `from` has `columns` elements, and as many from `next` on, the
    /// next value of k, unless it is null; `to` has room for `columns` words.
    unsafe fn step<S: Simd>(s: S, from: *const T, next: *const T, columns: usize, to: *mut u32);

    /// The words of one column, `k` values at a distance of `stride`.
    ///
    /// # Safety
    /// The CPU has the instructions; the values are readable; `to` has room for them and for a
    /// vector.
    unsafe fn column<S: Simd>(s: S, from: *const T, stride: usize, k: usize, to: &mut Words);
}

/// Words of one column.
const WORDS: usize = 64;

type Words = [u32; WORDS];

impl<T: Element> PackedFrom<T> for f32 {
    const K_STEP: usize = 1;

    #[inline(always)]
    unsafe fn step<S: Simd>(s: S, from: *const T, _: *const T, columns: usize, to: *mut u32) {
        Widening { from, n: columns, to: to.cast() }.run(s);
    }

    #[inline(always)]
    unsafe fn column<S: Simd>(s: S, from: *const T, stride: usize, k: usize, to: &mut Words) {
        let mut gathered = [T::default(); WORDS];
        let from = if stride == 1 {
            from
        } else {
            for (i, value) in gathered[..k].iter_mut().enumerate() {
                // SAFETY: the caller's contract.
                *value = unsafe { *from.add(i * stride) };
            }
            gathered.as_ptr()
        };
        Widening { from, n: k, to: to.as_mut_ptr().cast() }.run(s);
    }
}

/// Pairs of neighbours in k. The odd half of the last pair is 0 if k is odd.
impl PackedFrom<bf16> for bf16 {
    const K_STEP: usize = 2;

    #[inline(always)]
    unsafe fn step<S: Simd>(
        _: S,
        from: *const bf16,
        next: *const bf16,
        columns: usize,
        to: *mut u32,
    ) {
        for column in 0..columns {
            // SAFETY: the caller's contract.
            unsafe {
                let odd = if next.is_null() { bf16::ZERO } else { *next.add(column) };
                *to.add(column) = pair(*from.add(column), odd);
            }
        }
    }

    #[inline(always)]
    unsafe fn column<S: Simd>(_: S, from: *const bf16, stride: usize, k: usize, to: &mut Words) {
        if stride == 1 {
            // SAFETY: the caller's contract; pairs are adjacent.
            return unsafe {
                to.as_mut_ptr().cast::<bf16>().copy_from_nonoverlapping(from, k);
                if k % 2 == 1 {
                    to[k / 2] &= 0xffff;
                }
            };
        }
        // SAFETY: the caller's contract.
        let value = |i: usize| unsafe { *from.add(i * stride) };
        for (i, word) in to[..k / 2].iter_mut().enumerate() {
            *word = pair(value(2 * i), value(2 * i + 1));
        }
        if k % 2 == 1 {
            to[k / 2] = pair(value(k - 1), bf16::ZERO);
        }
    }
}

#[inline(always)]
fn pair(even: bf16, odd: bf16) -> u32 {
    u32::from(even.to_bits()) | u32::from(odd.to_bits()) << 16
}

/// Columns are adjacent in memory: one step after the other.
///
/// # Safety
/// As [`pack`].
#[inline(always)]
unsafe fn by_steps<S: Simd, T: Element, E: PackedFrom<T>>(s: S, args: &PackArgs) {
    let (from, k_stride) = (args.from.cast::<T>(), args.strides.0);
    for step in 0..args.k.div_ceil(E::K_STEP) {
        // SAFETY: the caller's contract.
        unsafe {
            let first = from.add(step * E::K_STEP * k_stride);
            let has_next = E::K_STEP > 1 && step * E::K_STEP + 1 < args.k;
            let next = if has_next { first.add(k_stride) } else { std::ptr::null() };
            let to = args.to.add(args.layout.step_offset(step)).cast();
            E::step(s, first, next, args.columns, to);
        }
    }
}

/// Columns are apart: one column after the other, in blocks of k whose steps stay in L1.
///
/// # Safety
/// As [`pack`].
#[inline(always)]
unsafe fn by_columns<S: Simd, T: Element, E: PackedFrom<T>>(s: S, args: &PackArgs) {
    let block = WORDS * E::K_STEP;
    let (step_bytes, streams) = (args.layout.step_bytes(), args.layout.streams());
    for start in (0..args.k).step_by(block) {
        let k = block.min(args.k - start);
        let words = k.div_ceil(E::K_STEP);
        for column in 0..args.columns {
            let mut buffer = [0; WORDS];
            // SAFETY: the caller's contract; a block is a whole number of rounds.
            unsafe {
                let from = args.from.cast::<T>();
                let from = from.add(start * args.strides.0 + column * args.strides.1);
                E::column(s, from, args.strides.0, k, &mut buffer);
                let first = args.to.add(args.layout.step_offset(start / E::K_STEP));
                for stream in 0..streams {
                    let mut to = first.add(stream * args.layout.stream_stride());
                    for word in buffer[..words].iter().skip(stream).step_by(streams) {
                        *to.cast::<u32>().add(column) = *word;
                        to = to.wrapping_add(step_bytes);
                    }
                }
            }
        }
    }
}

/// `to[c][r] = from[r][c]` for rows and columns, in elements of E.
///
/// # Safety
/// Both matrices have room at their strides, in elements, and do not overlap.
pub(super) unsafe fn transpose<E: Copy>(
    (rows, columns): (usize, usize),
    (from, from_stride): (*const E, usize),
    (to, to_stride): (*mut E, usize),
) {
    const BLOCK: usize = 16;
    for first_row in (0..rows).step_by(BLOCK) {
        let last_row = rows.min(first_row + BLOCK);
        for column in 0..columns {
            for row in first_row..last_row {
                // SAFETY: the caller's contract.
                unsafe {
                    *to.add(column * to_stride + row) = *from.add(row * from_stride + column)
                };
            }
        }
    }
}
