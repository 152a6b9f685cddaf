//! What is said of many samples: where the middle is, how far the rest lies from it, and how a cost grows.
//!
//! Nothing here assumes a distribution: times on a busy machine have none that is known. The middle is the median, the spread is made of percentiles, and the
//! uncertainty of the median is found by drawing from the samples again (the bootstrap), always with the same random numbers, so that the same samples
//! always give the same answer.

use serde::{Deserialize, Serialize};

/// How many points of the distribution a report keeps: every 2.5 % from the smallest to the largest.
pub(crate) const QUANTILES: usize = 41;
/// How often the bootstrap draws.
const DRAWS: usize = 400;

/// The middle of samples and what lies around it. All in the unit of the samples.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub(crate) struct Summary {
    pub(crate) median: f64,
    pub(crate) p10: f64,
    pub(crate) p90: f64,
    pub(crate) n: usize,
    /// From the smallest to the largest in equal steps of rank.
    pub(crate) quantiles: Vec<f64>,
}

impl Summary {
    /// `None` of nothing.
    pub(crate) fn of(mut samples: Vec<f64>) -> Option<Self> {
        samples.sort_unstable_by(f64::total_cmp);
        if samples.is_empty() {
            return None;
        }
        let at = |part| six_figures(percentile(&samples, part));
        let step = 1.0 / (QUANTILES - 1) as f64;
        Some(Self {
            median: at(0.5),
            p10: at(0.1),
            p90: at(0.9),
            n: samples.len(),
            quantiles: (0..QUANTILES).map(|step_number| at(step_number as f64 * step)).collect(),
        })
    }
}

/// The value to six figures, which is more than any clock knows, and few enough to come back from JSON as they were.
pub(crate) fn six_figures(value: f64) -> f64 {
    format!("{value:.5e}").parse().unwrap_or(value)
}

/// The value below which `part` (0 to 1) of the samples lie, which are sorted and not empty; between two of them it is interpolated.
pub(crate) fn percentile(sorted: &[f64], part: f64) -> f64 {
    let rank = part.clamp(0.0, 1.0) * (sorted.len() - 1) as f64;
    let below = floor(rank);
    let above = (below + 1).min(sorted.len() - 1);
    let share = rank - below as f64;
    // Written so that equal neighbours give exactly themselves.
    sorted[below] + (sorted[above] - sorted[below]) * share
}

/// The median of samples in any order; not a number if there are none.
pub(crate) fn median(samples: &[f64]) -> f64 {
    let mut sorted = samples.to_vec();
    sorted.sort_unstable_by(f64::total_cmp);
    if sorted.is_empty() { f64::NAN } else { percentile(&sorted, 0.5) }
}

/// Where the median of the population lies with a probability of 95 %, as far as these samples tell.
pub(crate) fn median_interval(samples: &[f64]) -> (f64, f64) {
    let mut random = Random::new(samples.len() as u64);
    let mut drawn = vec![0.0; samples.len()];
    let medians = (0..DRAWS).map(|_| {
        drawn.iter_mut().for_each(|slot| *slot = samples[random.below(samples.len())]);
        median(&drawn)
    });
    let mut medians: Vec<_> = medians.collect();
    medians.sort_unstable_by(f64::total_cmp);
    (percentile(&medians, 0.025), percentile(&medians, 0.975))
}

/// `b` of the `y = a * x^b` that fits the points best, by least squares of the logarithms: 0 for a cost that stays, 1 for one that grows with `x`.
/// `None` with less than two different `x`, or anything that has no logarithm.
pub(crate) fn growth_exponent(points: &[(f64, f64)]) -> Option<f64> {
    if points.iter().any(|&(x, y)| x <= 0.0 || y <= 0.0 || !x.is_finite() || !y.is_finite()) {
        return None;
    }
    let logs: Vec<_> = points.iter().map(|&(x, y)| (x.ln(), y.ln())).collect();
    let n = logs.len() as f64;
    let (mean_x, mean_y) = (logs.iter().map(|p| p.0).sum::<f64>() / n, logs.iter().map(|p| p.1).sum::<f64>() / n);
    let across: f64 = logs.iter().map(|p| (p.0 - mean_x).powi(2)).sum();
    let along: f64 = logs.iter().map(|p| (p.0 - mean_x) * (p.1 - mean_y)).sum();
    (across > 1e-12).then(|| along / across)
}

/// The largest whole number that is not above `value`, which is not negative.
#[allow(clippy::cast_sign_loss)] // the caller's promise
pub(crate) fn floor(value: f64) -> usize {
    value as usize
}

/// The same numbers in every run.
#[derive(Debug, Clone)]
pub(crate) struct Random(u64);

impl Random {
    pub(crate) fn new(seed: u64) -> Self {
        Self(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) ^ 0x5851_f42d_4c95_7f2d)
    }

    pub(crate) fn below(&mut self, end: usize) -> usize {
        self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (self.0 >> 33) as usize % end
    }

    pub(crate) fn shuffle<T>(&mut self, items: &mut [T]) {
        for at in (1..items.len()).rev() {
            items.swap(at, self.below(at + 1));
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// By counting: of an odd number of samples the one with as many on either side, of an even number the mean of the two in the middle.
    fn naive_median(samples: &[f64]) -> f64 {
        let rank = |of: f64| samples.iter().filter(|&&other| other < of).count();
        let nth = |n: usize| {
            let mut fits = samples.iter().filter(|&&x| rank(x) <= n);
            fits.by_ref().copied().fold(f64::NEG_INFINITY, f64::max)
        };
        let n = samples.len();
        if n % 2 == 1 { nth(n / 2) } else { f64::midpoint(nth(n / 2 - 1), nth(n / 2)) }
    }

    proptest! {
        #[test]
        fn the_median_is_the_one_found_by_counting(samples in prop::collection::vec(-1e6_f64..1e6, 1..60)) {
            let expected = naive_median(&samples);
            prop_assert!((median(&samples) - expected).abs() <= 1e-6, "{} is not {expected}", median(&samples));
        }

        #[test]
        fn percentiles_leave_the_right_share_below_them(mut samples in prop::collection::vec(0.0_f64..1e6, 1..80), part in 0.0_f64..=1.0) {
            samples.sort_unstable_by(f64::total_cmp);
            let value = percentile(&samples, part);
            let below = samples.iter().filter(|&&x| x < value).count() as f64;
            let not_above = samples.iter().filter(|&&x| x <= value).count() as f64;
            let rank = part * (samples.len() - 1) as f64;
            prop_assert!(below <= rank + 1.0 + 1e-9 && not_above >= rank - 1e-9, "{below} < {rank} <= {not_above}");
        }

        #[test]
        fn a_summary_is_ordered_and_within_the_samples(samples in prop::collection::vec(0.0_f64..1e6, 1..80)) {
            let summary = Summary::of(samples.clone()).unwrap();
            let (low, high) = samples.iter().fold((f64::MAX, f64::MIN), |(l, h), &x| (l.min(x), h.max(x)));
            let (low, high) = (six_figures(low), six_figures(high));
            let q = &summary.quantiles;
            prop_assert_eq!((q[0], q[QUANTILES - 1], summary.n), (low, high, samples.len()));
            prop_assert!(q.windows(2).all(|pair| pair[0] <= pair[1]));
            prop_assert!(summary.p10 <= summary.median && summary.median <= summary.p90);
        }

        #[test]
        fn the_interval_of_the_median_holds_it(samples in prop::collection::vec(1.0_f64..1e3, 3..60)) {
            let (low, high) = median_interval(&samples);
            let middle = median(&samples);
            prop_assert!(low <= middle && middle <= high, "{low} <= {middle} <= {high}");
        }

        #[test]
        fn the_exponent_of_a_power_is_its_own(a in 0.1_f64..10.0, b in -2.0_f64..3.0) {
            let points: Vec<_> = (0..8).map(|n| f64::from(1 << n)).map(|x| (x, a * x.powf(b))).collect();
            let found = growth_exponent(&points).unwrap();
            prop_assert!((found - b).abs() < 1e-9, "{found} is not {b}");
        }
    }

    #[test]
    fn the_interval_of_the_median_narrows_as_samples_become_more() {
        let samples = |n: usize| {
            let mut random = Random::new(7);
            (0..n).map(|_| random.below(1000) as f64).collect::<Vec<_>>()
        };
        let width = |n| {
            let (low, high) = median_interval(&samples(n));
            high - low
        };
        assert!(width(2000) < width(20) / 3.0, "{} of 2000 and {} of 20", width(2000), width(20));
    }

    #[test]
    fn nothing_has_no_summary_and_one_place_has_no_exponent() {
        assert_eq!(Summary::of(Vec::new()), None);
        assert_eq!(growth_exponent(&[(4.0, 1.0), (4.0, 2.0)]), None);
        assert_eq!(growth_exponent(&[(1.0, 0.0), (2.0, 2.0)]), None);
    }
}
