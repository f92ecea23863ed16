//! Single arguments across the boundary: counts, handles, flags, text, short sequences.
//!
//! Everything here runs before a core is locked, so that Python code called on the way (`__index__`) may itself use it.

use pyo3::exceptions::{PyOverflowError, PyTypeError};
use pyo3::prelude::*;
use pyo3::types::{PyBool, PyInt, PyList, PyString, PyTuple};

use super::errors::{self, Class};

/// An argument that has a default: absent, or what the caller gave, `None` included. (With `Option` a caller's `None`
/// would pass for the default.)
pub struct Arg<'py>(pub Option<Bound<'py, PyAny>>);

impl<'py> FromPyObject<'_, 'py> for Arg<'py> {
    type Error = PyErr;

    fn extract(obj: Borrowed<'_, 'py, PyAny>) -> PyResult<Self> {
        Ok(Self(Some(obj.to_owned())))
    }
}

impl<'py> Arg<'py> {
    /// What `read` makes of it, or the default.
    pub fn or<T>(&self, default: T, read: impl FnOnce(&Bound<'py, PyAny>) -> PyResult<T>) -> PyResult<T> {
        self.0.as_ref().map_or(Ok(default), read)
    }
}

/// An int in [min, max]. bool, float and str are a `TypeError`, any other int an `InvalidArgumentError`.
pub fn int(obj: &Bound<'_, PyAny>, argument: &str, min: i64, max: i64) -> PyResult<i64> {
    match strict_i64(obj, argument)? {
        Some(value) if (min..=max).contains(&value) => Ok(value),
        Some(value) if value < min => Err(out_of_range(obj, argument, format!("at least {min}"), min)),
        Some(_) => Err(out_of_range(obj, argument, format!("at most {max}"), max)),
        None => Err(out_of_range(
            obj,
            argument,
            format!("{min} to {max}"),
            format!("{min} to {max}"),
        )),
    }
}

fn out_of_range<'py>(
    obj: &Bound<'py, PyAny>,
    argument: &str,
    expected: String,
    limit: impl IntoPyObject<'py>,
) -> PyErr {
    let message = format!("{argument} is {}, expected {expected}", errors::shown(obj));
    errors::invalid(obj, argument, &message).with("expected", limit).into()
}

/// A size or count. The core says what its upper limit is.
pub fn size(obj: &Bound<'_, PyAny>, argument: &str) -> PyResult<usize> {
    let value = int(obj, argument, 0, i64::MAX)?;
    Ok(usize::try_from(value).unwrap_or(usize::MAX))
}

/// A count in [min, 2^31).
pub fn count(obj: &Bound<'_, PyAny>, argument: &str, min: u32) -> PyResult<u32> {
    let value = int(obj, argument, i64::from(min), i64::from(i32::MAX))?;
    Ok(u32::try_from(value).unwrap_or(u32::MAX))
}

/// `None`, or what `read` makes of the object.
pub fn optional<'py, T>(
    obj: Option<&Bound<'py, PyAny>>,
    read: impl FnOnce(&Bound<'py, PyAny>) -> PyResult<T>,
) -> PyResult<Option<T>> {
    obj.filter(|o| !o.is_none()).map(read).transpose()
}

/// A step number; the caller's `expected` says which step would have been right.
pub fn step(obj: &Bound<'_, PyAny>, argument: &str) -> PyResult<u64> {
    let value = int(obj, argument, 0, i64::MAX)?;
    Ok(value.cast_unsigned())
}

/// A handle. A number that can never have been one is as stale as one that was freed.
pub fn handle(obj: &Bound<'_, PyAny>, argument: &str, kind: &'static str) -> PyResult<u64> {
    if is_int_like(obj) {
        match obj.extract::<u64>() {
            Ok(handle) => return Ok(handle),
            Err(error) if error.is_instance_of::<PyOverflowError>(obj.py()) => {
                return Err(errors::new(
                    obj.py(),
                    Class::StaleHandle,
                    format!("there is no {kind} with handle {}", errors::shown(obj)),
                )
                .with("kind", kind)
                .with("handle", obj)
                .into());
            }
            Err(error) if error.is_instance_of::<PyTypeError>(obj.py()) => {}
            Err(error) => return Err(error),
        }
    }
    Err(PyTypeError::new_err(format!(
        "{argument} must be a {kind} handle (int), not {}",
        type_name(obj)
    )))
}

/// A bool and nothing else: `0` or `"no"` in its place is a mistake.
pub fn flag(obj: &Bound<'_, PyAny>, argument: &str) -> PyResult<bool> {
    obj.cast::<PyBool>()
        .map(pyo3::types::PyBoolMethods::is_true)
        .map_err(|_| PyTypeError::new_err(format!("{argument} must be a bool, not {}", type_name(obj))))
}

/// Text as UTF-8.
pub fn text(obj: &Bound<'_, PyAny>, argument: &str) -> PyResult<String> {
    let text = obj
        .cast::<PyString>()
        .map_err(|_| PyTypeError::new_err(format!("{argument} must be a str, not {}", type_name(obj))))?;
    text.to_str().map(str::to_owned).map_err(|_| {
        // Lone surrogates have no UTF-8 form, so two different salts could become equal: refused.
        errors::invalid(
            obj,
            argument,
            &format!("{argument} holds a lone surrogate: it is not valid Unicode text"),
        )
        .into()
    })
}

fn strict_i64(obj: &Bound<'_, PyAny>, argument: &str) -> PyResult<Option<i64>> {
    to_i64(obj).map_err(|error| {
        if error.is_instance_of::<PyTypeError>(obj.py()) {
            let message = format!("{argument} must be an int, not {}", type_name(obj));
            return with_cause(obj.py(), PyTypeError::new_err(message), error);
        }
        error
    })
}

/// The value of an int; `None` if it does not fit 64 bits; a `TypeError` for a bool and for what is no integer.
pub fn to_i64(obj: &Bound<'_, PyAny>) -> PyResult<Option<i64>> {
    if !is_int_like(obj) {
        return Err(PyTypeError::new_err("not an int"));
    }
    match obj.extract::<i64>() {
        Ok(value) => Ok(Some(value)),
        Err(error) if error.is_instance_of::<PyOverflowError>(obj.py()) => Ok(None),
        Err(error) => Err(error),
    }
}

fn is_int_like(obj: &Bound<'_, PyAny>) -> bool {
    obj.is_exact_instance_of::<PyInt>() || !obj.is_instance_of::<PyBool>()
}

/// A block id. Whether it exists is for the pool to say; what cannot be one at all is a `BlockError` here.
pub fn block_id(obj: &Bound<'_, PyAny>, argument: &str, num_blocks: usize) -> PyResult<u32> {
    match strict_i64(obj, argument)?.map(u32::try_from) {
        Some(Ok(block)) => Ok(block),
        _ => Err(errors::new(
            obj.py(),
            Class::Block,
            format!("block {} is outside [0, {num_blocks})", errors::shown(obj)),
        )
        .with("block", obj)
        .with("num_blocks", num_blocks)
        .into()),
    }
}

/// The items of a tuple or list. (A str is a sequence too, and is what a caller passes by mistake.)
pub fn items<'py>(obj: &Bound<'py, PyAny>, argument: &str, of: &str) -> PyResult<Vec<Bound<'py, PyAny>>> {
    if let Ok(tuple) = obj.cast::<PyTuple>() {
        return Ok(tuple.iter().collect());
    }
    if let Ok(list) = obj.cast::<PyList>() {
        return Ok(list.iter().collect());
    }
    Err(PyTypeError::new_err(format!(
        "{argument} must be a tuple or list {of}, not {}",
        type_name(obj)
    )))
}

pub fn type_name(obj: &Bound<'_, PyAny>) -> String {
    obj.get_type()
        .name()
        .map_or_else(|_| "?".to_owned(), |name| name.to_string())
}

pub fn with_cause(py: Python<'_>, error: PyErr, cause: PyErr) -> PyErr {
    error.set_cause(py, Some(cause));
    error
}
