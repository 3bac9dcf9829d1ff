//! Weights and where they come from: the names and layouts of checkpoint families, the tensors
//! under a prefix, the files of a checkpoint.

mod checkpoint;
mod family;
#[cfg(feature = "hub")]
pub mod hub;
mod missing;
mod reader;
mod unread;
mod weights;

pub(crate) use checkpoint::{ADAPTER_CONFIG, ADAPTER_WEIGHTS};
pub use checkpoint::{Checkpoint, read_json};
pub use family::{Family, FusedOrder, Names};
pub(crate) use reader::{get, load_each, load_projection, prefix_is_meta};
pub(crate) use unread::check_linear;
pub use weights::{Biases, GateUp, Weights};
pub(crate) use weights::{Piece, Wanted, fuse, split};
