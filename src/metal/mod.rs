//! Kernels for Apple GPUs, on candle's own command encoder. Nothing here waits for the GPU.
//!
//! `swiglu.metal` describes the algorithms. `plan.rs` selects a kernel and its parameters for a
//! shape, without a GPU; `pipeline.rs` compiles each kernel once per device; `launch.rs` binds and
//! dispatches. candle orders dispatches by the buffers that they are declared to read and write, so
//! h needs no other synchronisation between gate·up and down.
//!
//! The kernels run on the CPU against f64 in `tests/metal_shim`; they have never run on Apple
//! hardware.

#[cfg(feature = "metal")]
mod gate;
#[cfg(feature = "metal")]
mod launch;
#[cfg(feature = "metal")]
mod pipeline;
mod plan;

#[cfg(feature = "metal")]
pub(crate) use gate::{gate_backward, gate_forward};
#[cfg(feature = "metal")]
pub(crate) use launch::{block, linear};
#[cfg(feature = "metal")]
pub(crate) use pipeline::{supports, supports_glu};

/// The line of swiglu.metal that is replaced by the text of gate.h, because Metal compiles one
/// string.
const INCLUDE: &str = "#include \"../gate/gate.h\"";

/// The kernels as Metal compiles them.
fn source() -> String {
    include_str!("swiglu.metal").replacen(INCLUDE, include_str!("../gate/gate.h"), 1)
}
