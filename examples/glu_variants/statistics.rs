//! Counts over the activations of one layer and over the gradients that reach them.

/// The largest share of the largest absolute value at which an activation counts as small.
const SMALL: f32 = 0.01;

/// What the units of one layer had at N tokens: row-major (N,units).
#[derive(Debug, Default)]
pub(crate) struct LayerValues {
    pub(crate) units: usize,
    /// The input of the activation.
    pub(crate) pre: Vec<f32>,
    /// The derivative of the loss, in nats summed over the tokens, by the input of the activation.
    pub(crate) gradient: Vec<f32>,
    /// The input of down_proj.
    pub(crate) hidden: Vec<f32>,
}

/// Shares of the activations, and of the units, of one layer.
#[derive(Debug, PartialEq)]
pub(crate) struct Shares {
    /// The largest absolute activation.
    pub(crate) largest: f32,
    /// Activations that are exactly 0.
    pub(crate) zero: f64,
    /// Activations below 1 % of the largest absolute value; exact zeros are among them.
    pub(crate) small: f64,
    /// Units that are dead at all tokens: 0 if `rectified`, else below 1 % of the largest.
    pub(crate) dead: f64,
}

/// hidden (N,units), row-major. NaN counts as neither small nor dead.
pub(crate) fn shares(hidden: &[f32], units: usize, rectified: bool) -> Shares {
    let largest = hidden.iter().fold(0f32, |most, h| most.max(h.abs()));
    let is_zero = |h: &f32| *h == 0.0;
    let is_small = |h: &f32| is_zero(h) || h.abs() < SMALL * largest;
    let is_dead = |unit: &usize| {
        let mut column = hidden.iter().skip(*unit).step_by(units);
        if rectified { column.all(is_zero) } else { column.all(is_small) }
    };
    let share = |is: &dyn Fn(&f32) -> bool| {
        hidden.iter().filter(|h| is(h)).count() as f64 / hidden.len() as f64
    };
    Shares {
        largest,
        zero: share(&is_zero),
        small: share(&is_small),
        dead: (0..units).filter(is_dead).count() as f64 / units as f64,
    }
}

/// The gradients by the sign of the input of the activation.
#[derive(Debug, PartialEq)]
pub(crate) struct BySign {
    /// The share of negative inputs. 0 and -0 are not negative.
    pub(crate) negative: f64,
    /// The mean absolute gradient at negative inputs; NaN if there are none.
    pub(crate) gradient_negative: f64,
    /// The mean absolute gradient at all others; NaN if there are none.
    pub(crate) gradient_positive: f64,
}

/// pre and gradient have the same length.
pub(crate) fn by_sign(pre: &[f32], gradient: &[f32]) -> BySign {
    let (mut counts, mut sums) = ([0usize; 2], [0f64; 2]);
    for (pre, gradient) in pre.iter().zip(gradient) {
        let side = usize::from(*pre < 0.0);
        counts[side] += 1;
        sums[side] += f64::from(gradient.abs());
    }
    BySign {
        negative: counts[1] as f64 / pre.len() as f64,
        gradient_negative: sums[1] / counts[1] as f64,
        gradient_positive: sums[0] / counts[0] as f64,
    }
}

/// Bins of equal width over [low, high), with the number and the sum of what fell into each.
#[derive(Debug)]
pub(crate) struct Bins {
    low: f64,
    width: f64,
    bins: Vec<Bin>,
}

/// One bin: [low, high).
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub(crate) struct Bin {
    pub(crate) low: f64,
    pub(crate) high: f64,
    pub(crate) count: u64,
    pub(crate) sum: f64,
}

impl Bins {
    pub(crate) fn new(low: f64, high: f64, count: usize) -> Self {
        let width = (high - low) / count as f64;
        let edge = |i: usize| low + i as f64 * width;
        let bin = |i| Bin { low: edge(i), high: edge(i + 1), ..Bin::default() };
        Self { low, width, bins: (0..count).map(bin).collect() }
    }

    /// Adds `value` to the bin of x. An x outside all bins, and NaN, are left out.
    pub(crate) fn add(&mut self, x: f64, value: f64) {
        let at = ((x - self.low) / self.width).floor();
        if at >= 0.0
            && let Some(bin) = self.bins.get_mut(at as usize)
        {
            bin.count += 1;
            bin.sum += value;
        }
    }

    pub(crate) fn iter(&self) -> impl Iterator<Item = &Bin> {
        self.bins.iter()
    }
}

/// The square root of the mean square.
pub(crate) fn root_mean_square(values: &[f32]) -> f64 {
    let sum: f64 = values.iter().map(|x| f64::from(*x).powi(2)).sum();
    (sum / values.len() as f64).sqrt()
}

/// The first quartile, the median and the third quartile, interpolated linearly between the sorted
/// values; NaN of none.
pub(crate) fn quartiles(values: &[f64]) -> [f64; 3] {
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    let Some(last) = sorted.len().checked_sub(1) else { return [f64::NAN; 3] };
    [0.25, 0.5, 0.75].map(|share| {
        let at = share * last as f64;
        let (below, above) = (sorted[at.floor() as usize], sorted[at.ceil() as usize]);
        below + at.fract() * (above - below)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Three tokens of four units: unit 0 is 0 everywhere, unit 1 small everywhere, unit 2 small at
    /// two tokens, unit 3 never.
    const HIDDEN: [f32; 12] =
        [0.0, 0.5, -0.5, 100.0, -0.0, -0.99, 0.0, 1.0, 0.0, 0.25, -1.5, -50.0];

    #[test]
    fn a_rectified_unit_is_dead_if_it_is_never_nonzero() {
        let expected =
            Shares { largest: 100.0, zero: 4.0 / 12.0, small: 8.0 / 12.0, dead: 1.0 / 4.0 };
        assert_eq!(shares(&HIDDEN, 4, true), expected);
    }

    #[test]
    fn a_smooth_unit_is_dead_if_it_is_always_below_a_hundredth_of_the_largest() {
        assert_eq!(shares(&HIDDEN, 4, false).dead, 2.0 / 4.0);
        // Exactly 1 % is not below it.
        assert_eq!(shares(&[100.0, 1.0], 2, false).dead, 0.0);
        assert_eq!(shares(&[0.0; 6], 2, false).dead, 1.0);
    }

    #[test]
    fn gradients_are_split_by_the_sign_of_the_input() {
        let found = by_sign(&[-1.0, -0.0, 2.0, -3.0], &[0.5, -1.0, 3.0, -1.5]);
        let expected = BySign { negative: 0.5, gradient_negative: 1.0, gradient_positive: 2.0 };
        assert_eq!(found, expected);
        assert!(by_sign(&[1.0], &[1.0]).gradient_negative.is_nan());
    }

    #[test]
    fn a_bin_has_its_lower_edge_and_not_its_upper_one() {
        let mut bins = Bins::new(-6.0, 6.0, 48);
        let values = [(-6.0, 1.0), (-5.76, 2.0), (-5.75, 4.0), (0.0, 8.0), (5.99, 16.0)];
        values.into_iter().for_each(|(x, value)| bins.add(x, value));
        [-6.01, 6.0, f64::NAN, f64::INFINITY, f64::NEG_INFINITY]
            .into_iter()
            .for_each(|x| bins.add(x, 1000.0));
        let filled: Vec<Bin> = bins.iter().copied().filter(|bin| bin.count > 0).collect();
        let bin = |low, count, sum| Bin { low, high: low + 0.25, count, sum };
        let expected =
            [bin(-6.0, 2, 3.0), bin(-5.75, 1, 4.0), bin(0.0, 1, 8.0), bin(5.75, 1, 16.0)];
        assert_eq!(filled, expected);
    }

    #[test]
    fn quartiles_divide_the_sorted_values_into_four() {
        assert_eq!(quartiles(&[3.0, 1.0, 2.0, 5.0, 4.0]), [2.0, 3.0, 4.0]);
        assert_eq!(quartiles(&[4.0, 1.0, 2.0, 3.0]), [1.75, 2.5, 3.25]);
        assert_eq!(quartiles(&[7.0]), [7.0; 3]);
        assert!(quartiles(&[]).iter().all(|x| x.is_nan()));
    }
}
