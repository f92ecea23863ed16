//! The way from [`Error`](crate::error::Error) to the exception classes of `pagedcore.errors`.
//!
//! The classes live in Python, so that the kernels and the engine raise the same ones. They are imported when the
//! first error is raised and looked up once.

use pyo3::IntoPyObjectExt;
use pyo3::prelude::*;
use pyo3::sync::PyOnceLock;
use pyo3::types::{PyDict, PyModule};

use crate::error::{Error, Expected};

/// A class of `pagedcore.errors`.
#[derive(Clone, Copy, Debug)]
pub enum Class {
    InvalidArgument,
    Unsupported,
    TokenOutOfRange,
    RequestTooLarge,
    DuplicateRequest,
    UnknownRequest,
    StaleHandle,
    Block,
    OutOfBlocks,
    Step,
    Closed,
    Corruption,
    ForkedProcess,
}

impl Class {
    const fn name(self) -> &'static str {
        match self {
            Self::InvalidArgument => "InvalidArgumentError",
            Self::Unsupported => "UnsupportedError",
            Self::TokenOutOfRange => "TokenOutOfRangeError",
            Self::RequestTooLarge => "RequestTooLargeError",
            Self::DuplicateRequest => "DuplicateRequestError",
            Self::UnknownRequest => "UnknownRequestError",
            Self::StaleHandle => "StaleHandleError",
            Self::Block => "BlockError",
            Self::OutOfBlocks => "OutOfBlocksError",
            Self::Step => "StepError",
            Self::Closed => "ClosedError",
            Self::Corruption => "CorruptionError",
            Self::ForkedProcess => "ForkedProcessError",
        }
    }
}

/// An exception on its way: a message, and the numbers in it as attributes.
pub struct Raise<'py> {
    py: Python<'py>,
    class: Class,
    message: String,
    attributes: Bound<'py, PyDict>,
}

/// Starts an exception of `pagedcore.errors`.
pub fn new(py: Python<'_>, class: Class, message: impl Into<String>) -> Raise<'_> {
    Raise {
        py,
        class,
        message: message.into(),
        attributes: PyDict::new(py),
    }
}

/// Starts an `InvalidArgumentError` about `got`, the value that came for `argument`.
pub fn invalid<'py>(got: &Bound<'py, PyAny>, argument: &str, message: &str) -> Raise<'py> {
    new(got.py(), Class::InvalidArgument, message)
        .with("argument", argument)
        .with("got", got)
}

impl<'py> Raise<'py> {
    /// What the caller can do about it.
    pub fn hint(self, hint: &str) -> Self {
        self.with("hint", hint)
    }

    /// An attribute. One that cannot be made a Python object is left out: the error matters more.
    pub fn with(self, name: &str, value: impl IntoPyObject<'py>) -> Self {
        if let Ok(value) = value.into_bound_py_any(self.py) {
            let _ = self.attributes.set_item(name, value);
        }
        self
    }

    fn raise(self) -> PyResult<PyErr> {
        static MODULE: PyOnceLock<Py<PyModule>> = PyOnceLock::new();
        let module = MODULE.get_or_try_init(self.py, || self.py.import("pagedcore.errors").map(Bound::unbind))?;
        let class = module.bind(self.py).getattr(self.class.name())?;
        Ok(PyErr::from_value(class.call((self.message,), Some(&self.attributes))?))
    }
}

impl From<Raise<'_>> for PyErr {
    fn from(raise: Raise<'_>) -> Self {
        // The second error (a broken installation, an interrupt) is what there is to report then.
        raise.raise().unwrap_or_else(|error| error)
    }
}

/// The exception for an error of the core: its message, its hint, its numbers under the names that `errors.py`
/// documents.
pub fn from_core(py: Python<'_>, error: &Error) -> PyErr {
    let raise = |class| {
        let raise = new(py, class, error.to_string());
        if error.hint().is_empty() {
            raise
        } else {
            raise.hint(error.hint())
        }
    };
    match error {
        Error::InvalidArgument {
            argument,
            got,
            expected,
        } => raise(Class::InvalidArgument)
            .with("argument", argument)
            .with("got", got)
            .with("expected", Limit(*expected)),
        Error::Unsupported {
            argument,
            got,
            expected,
        } => raise(Class::Unsupported)
            .with("argument", argument)
            .with("got", got)
            .with("expected", Limit(*expected)),
        Error::TokenOutOfRange {
            token,
            position,
            vocab_size,
        } => raise(Class::TokenOutOfRange)
            .with("got", token)
            .with("token", token)
            .with("position", position)
            .with("vocab_size", vocab_size),
        Error::RequestTooLarge { needed, limit, .. } => raise(Class::RequestTooLarge)
            .with("needed", needed)
            .with("limit", limit),
        Error::DuplicateRequest { request_id } => {
            raise(Class::DuplicateRequest).with("request_id", request_id.as_ref())
        }
        Error::UnknownRequest { request_id } => raise(Class::UnknownRequest).with("request_id", request_id.as_ref()),
        Error::StaleHandle { kind, handle } => raise(Class::StaleHandle)
            .with("kind", kind.to_string())
            .with("handle", handle),
        Error::Block { block, num_blocks, .. } => raise(Class::Block)
            .with("block", block.0)
            .with("num_blocks", num_blocks),
        Error::OutOfBlocks { needed, free } => raise(Class::OutOfBlocks).with("needed", needed).with("free", free),
        Error::Step { step, expected, .. } => raise(Class::Step).with("step", step).with("expected", expected),
        Error::ForeignStep => raise(Class::Step),
        Error::Closed => raise(Class::Closed),
        Error::Corruption { .. } => raise(Class::Corruption),
        Error::ForkedProcess => raise(Class::ForkedProcess),
    }
    .into()
}

/// The `expected` attribute: a number where one number says it, else text.
struct Limit(Expected);

impl<'py> IntoPyObject<'py> for Limit {
    type Target = PyAny;
    type Output = Bound<'py, PyAny>;
    type Error = PyErr;

    fn into_pyobject(self, py: Python<'py>) -> PyResult<Self::Output> {
        match self.0 {
            Expected::AtLeast(n) | Expected::AtMost(n) | Expected::Exactly(n) => n.into_bound_py_any(py),
            Expected::Between(..) | Expected::That(_) => self.0.to_string().into_bound_py_any(py),
        }
    }
}

/// A value as it stands in a message: its repr, shortened. Never fails and never runs long.
pub fn shown(value: &Bound<'_, PyAny>) -> String {
    const LONGEST: usize = 60;
    // An int of more than 4,300 digits has no repr.
    let text = value.repr().map_or_else(
        |_| format!("a huge {}", super::arguments::type_name(value)),
        |r| r.to_string_lossy().into_owned(),
    );
    match text.char_indices().nth(LONGEST) {
        Some((end, _)) => format!("{}...", &text[..end]),
        None => text,
    }
}
