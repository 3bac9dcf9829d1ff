//! Comparisons of candle-swiglu with candle-transformers. All of them are tests: `cargo test -p
//! candle-swiglu-compare`.
//!
//! They are a package of their own because candle-transformers takes longer to compile than
//! everything else that the crate and its tests need.
