//! Constructors, and conversions from and into candle's error.

use std::path::Path;

use super::Error;

impl Error {
    /// The crate's error inside a candle error, if it came from here.
    ///
    /// ```
    /// use candle_swiglu::{silu_mul, Error};
    /// use candle_core::{DType, Device, Tensor};
    ///
    /// fn in_candle_code() -> candle_core::Result<Tensor> {
    ///     let gate = Tensor::zeros((2, 3), DType::U32, &Device::Cpu)?;
    ///     Ok(silu_mul(&gate, &gate)?)
    /// }
    /// let error = in_candle_code().unwrap_err();
    /// assert!(matches!(Error::find(&error), Some(Error::DTypeUnsupported { .. })));
    /// ```
    pub fn find(error: &candle_core::Error) -> Option<&Error> {
        use candle_core::Error as E;
        match error {
            E::Io(io) => io.get_ref()?.downcast_ref(),
            E::Context { inner, .. }
            | E::WithPath { inner, .. }
            | E::WithBacktrace { inner, .. } => Self::find(inner),
            _ => None,
        }
    }

    /// The weight of this projection was not given.
    pub(crate) fn missing(projection: &str) -> Error {
        Self::missing_tensor(format!("{projection}.weight"))
    }

    /// A tensor of this name was not given.
    pub(crate) fn missing_tensor(name: String) -> Error {
        Error::MissingTensor {
            prefix: String::new(),
            tried: vec![name],
            present: Box::default(),
            suggestions: Box::default(),
            location: None,
        }
    }

    pub(crate) fn io(path: &Path) -> impl FnOnce(std::io::Error) -> Error {
        let path = path.to_path_buf();
        move |source| Error::Io { path, source }
    }
}

/// The error travels inside candle's transparent I/O variant, the one that keeps a source of any
/// type: it prints as itself, and [`Error::find`] gets it back.
impl From<Error> for candle_core::Error {
    fn from(error: Error) -> Self {
        match error {
            Error::Candle(inner) => inner,
            own => candle_core::Error::Io(std::io::Error::other(own)),
        }
    }
}

impl From<candle_core::Error> for Error {
    fn from(error: candle_core::Error) -> Self {
        match error {
            candle_core::Error::Io(io) => match io.downcast::<Error>() {
                Ok(own) => own,
                Err(io) => Error::Candle(candle_core::Error::Io(io)),
            },
            candle_core::Error::WithBacktrace { inner, .. } if Error::find(&inner).is_some() => {
                Error::from(*inner)
            }
            other => Error::Candle(other),
        }
    }
}
