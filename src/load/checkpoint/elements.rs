//! The float dtypes of files and of memory, and their conversion.

use bytemuck::Pod;
use half::{bf16, f16};
use safetensors::Dtype;

/// A float dtype of the file or of memory.
pub(super) trait Element: Pod {
    const IN_FILE: Dtype;
    const WIDE: bool = false;
    fn to_f32(self) -> f32;
    fn from_f32(value: f32) -> Self;
    fn to_f64(self) -> f64 {
        f64::from(self.to_f32())
    }
    fn from_f64(value: f64) -> Self;
}

impl Element for f16 {
    const IN_FILE: Dtype = Dtype::F16;
    fn to_f32(self) -> f32 {
        f16::to_f32(self)
    }
    fn from_f32(value: f32) -> Self {
        f16::from_f32(value)
    }
    fn from_f64(value: f64) -> Self {
        f16::from_f32(round_to_odd(value))
    }
}

impl Element for bf16 {
    const IN_FILE: Dtype = Dtype::BF16;
    fn to_f32(self) -> f32 {
        bf16::to_f32(self)
    }
    fn from_f32(value: f32) -> Self {
        bf16::from_f32(value)
    }
    fn from_f64(value: f64) -> Self {
        bf16::from_f32(round_to_odd(value))
    }
}

impl Element for f32 {
    const IN_FILE: Dtype = Dtype::F32;
    fn to_f32(self) -> f32 {
        self
    }
    fn from_f32(value: f32) -> Self {
        value
    }
    fn from_f64(value: f64) -> Self {
        value as f32
    }
}

impl Element for f64 {
    const IN_FILE: Dtype = Dtype::F64;
    const WIDE: bool = true;
    fn to_f32(self) -> f32 {
        self as f32
    }
    fn from_f32(value: f32) -> Self {
        f64::from(value)
    }
    fn to_f64(self) -> f64 {
        self
    }
    fn from_f64(value: f64) -> Self {
        value
    }
}

/// The f32 next to `value` on the side of zero, its last bit set if it is not exact: rounding this
/// once more to a narrower format gives what rounding `value` itself would (half's own `from_f64`
/// drops the lower half of the bits).
fn round_to_odd(value: f64) -> f32 {
    let near = value as f32;
    if near.is_nan() || f64::from(near) == value {
        return near;
    }
    let beyond = f64::from(near).abs() > value.abs();
    f32::from_bits((near.to_bits() - u32::from(beyond)) | 1)
}

/// Through f32, which holds f16 and bf16 exactly; through f64 where one side is f64, so that there
/// is one rounding.
pub(super) fn convert<S: Element, T: Element>(source: &[S], target: &mut [T]) {
    if S::WIDE || T::WIDE {
        target.iter_mut().zip(source).for_each(|(t, s)| *t = T::from_f64(s.to_f64()));
    } else {
        target.iter_mut().zip(source).for_each(|(t, s)| *t = T::from_f32(s.to_f32()));
    }
}
