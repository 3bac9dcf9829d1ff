//! The schedule of the learning rate.

/// The learning rate of a step, counted from 0: it rises to `peak` for 100 steps and falls along a
/// cosine to a twentieth of it.
pub(crate) fn learning_rate(peak: f64, step: u64, steps: u64) -> f64 {
    const WARMUP: f64 = 100.0;
    let progress = step as f64 / steps as f64;
    let cosine = 0.05 + 0.95 * 0.5 * (1.0 + (std::f64::consts::PI * progress).cos());
    peak * cosine * ((step as f64 + 1.0) / WARMUP).min(1.0)
}
