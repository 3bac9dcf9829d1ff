//! What the environment variable `CANDLE_SWIGLU_KERNEL` forces, on every device.

use std::sync::OnceLock;

/// Read once per process.
pub(crate) const VARIABLE: &str = "CANDLE_SWIGLU_KERNEL";

/// The definition by candle's own operations, without a kernel of this crate. For debugging: a
/// result that stays wrong under it does not come from the kernels.
pub(crate) const PLAIN: &str = "plain";

/// The value of [`VARIABLE`]; None if it is unset or empty.
pub(crate) fn kernel() -> Option<&'static str> {
    static KERNEL: OnceLock<Option<String>> = OnceLock::new();
    let read = || std::env::var(VARIABLE).ok().filter(|name| !name.is_empty());
    KERNEL.get_or_init(read).as_deref()
}

/// No kernel of this crate is to run, on any device.
pub(crate) fn is_plain() -> bool {
    kernel() == Some(PLAIN)
}
