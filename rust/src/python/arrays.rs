//! Arrays of numbers across the boundary, inwards: token ids, block ids, samples, flags, the bytes of a plan.
//!
//! Ids come as any one-dimensional int32 or int64 buffer (`NumPy`, `array.array`, `memoryview`, ctypes), as a torch CPU
//! tensor or another array object, or as a list, tuple or range of ints. A buffer costs one copy and no Python
//! object per id; it is copied because the caller may change it while a call has released the GIL.
//!
//! Everything here runs before a core is locked, so that Python code called on the way (`__index__`, `__array__`,
//! `__buffer__`) may itself use the core.

use pyo3::buffer::{ElementType, PyBuffer, PyUntypedBuffer};
use pyo3::exceptions::{PyBufferError, PyMemoryError, PyTypeError};
use pyo3::prelude::*;
use pyo3::types::{PyList, PyRange, PyTuple};

use super::arguments::{self, to_i64, type_name, with_cause};
use super::errors::{self, Class};
use super::numpy::{self, dtype_name};
use crate::tokens::Vocabulary;

/// Most ids that one call takes: 2^28, so that a `range` or a zero-stride view of absurd length is refused instead of
/// exhausting the machine's memory. One call's prompt is far shorter.
pub const MAX_IDS: usize = 1 << 28;

/// Ids between two looks at pending signals while a list is read (about 10 ms).
const SIGNAL_PERIOD: usize = 1 << 20;

/// Token ids, each in the vocabulary. O(n).
///
/// # Errors
/// `TokenOutOfRangeError` with the first bad token and its position; `TypeError` for anything but integers;
/// `InvalidArgumentError` for a wrong shape.
pub fn token_ids(obj: &Bound<'_, PyAny>, argument: &str, vocabulary: Vocabulary) -> PyResult<Vec<u32>> {
    let vocab_size = (vocabulary != Vocabulary::ALL).then(|| vocabulary.size());
    let last = i32::try_from(vocabulary.size() - 1).unwrap_or(i32::MAX);
    unsigned(integers(obj, argument, 0, last, &|token, position| {
        let py = token.py();
        let shown = errors::shown(token);
        let (message, hint) = match vocab_size {
            Some(size) => (
                format!(
                    "token {shown} at position {position} of {argument} is outside the vocabulary of {size} tokens"
                ),
                "use the tokenizer of the model that vocab_size was taken from",
            ),
            None => (
                format!("token {shown} at position {position} of {argument} is outside [0, 2147483648)"),
                "token ids are int32; pass vocab_size to be told of ids outside the vocabulary as well",
            ),
        };
        errors::new(py, Class::TokenOutOfRange, message)
            .hint(hint)
            .with("argument", argument)
            .with("got", token)
            .with("token", token)
            .with("position", position)
            .with("vocab_size", vocab_size)
            .into()
    }))
}

/// Block ids. Whether each exists is for the pool to say; what cannot be one at all is a `BlockError` here.
pub fn block_ids(obj: &Bound<'_, PyAny>, argument: &str, num_blocks: usize) -> PyResult<Vec<u32>> {
    unsigned(integers(obj, argument, 0, i32::MAX, &|block, position| {
        let shown = errors::shown(block);
        errors::new(
            block.py(),
            Class::Block,
            format!("block {shown} at position {position} of {argument} is outside [1, {num_blocks})"),
        )
        .hint("pass ids that this pool handed out")
        .with("block", block)
        .with("num_blocks", num_blocks)
        .into()
    }))
}

/// Sampled token ids: int32 numbers of any sign, for the core to judge, as those of sequences that ended may be
/// anything.
pub fn samples(obj: &Bound<'_, PyAny>, argument: &str) -> PyResult<Vec<i32>> {
    int32s(obj, argument, Class::TokenOutOfRange, "token")
}

/// How many tokens each sample is, for the core to judge.
pub fn counts(obj: &Bound<'_, PyAny>, argument: &str) -> PyResult<Vec<i32>> {
    int32s(obj, argument, Class::InvalidArgument, "count")
}

/// int32 numbers of any sign. One that is wider is an error of `class`, which has it as its attribute `item`.
fn int32s(obj: &Bound<'_, PyAny>, argument: &str, class: Class, item: &'static str) -> PyResult<Vec<i32>> {
    integers(obj, argument, i32::MIN, i32::MAX, &|value, position| {
        let message = format!(
            "{argument}[{position}] is {}, which is not an int32",
            errors::shown(value)
        );
        errors::new(value.py(), class, message)
            .with("argument", argument)
            .with("got", value)
            .with(item, value)
            .with("position", position)
            .into()
    })
}

/// bools: a bool array or tensor, or a list or tuple of them.
pub fn flags(obj: &Bound<'_, PyAny>, argument: &str) -> PyResult<Vec<bool>> {
    let py = obj.py();
    if obj.is_instance_of::<PyList>() || obj.is_instance_of::<PyTuple>() {
        let items = arguments::items(obj, argument, "of bools")?;
        return items
            .iter()
            .enumerate()
            .map(|(i, item)| arguments::flag(item, &format!("{argument}[{i}]")))
            .collect();
    }
    let array = numpy::as_numpy(obj, true)?.unwrap_or_else(|| obj.clone());
    let buffer = PyUntypedBuffer::get(&array)
        .ok()
        .filter(|b| ElementType::from_format(b.format()) == ElementType::Bool);
    let Some(buffer) = buffer else {
        let got = dtype_name(&array);
        return Err(PyTypeError::new_err(format!(
            "{argument} must be a bool array, or a list of bools, not {got}"
        )));
    };
    if buffer.dimensions() != 1 {
        return Err(wrong_shape(py, argument, buffer.shape(), "one dimension"));
    }
    check_length(obj, argument, buffer.item_count())?;
    let bytes: Vec<u8> = copied(py, PyUntypedBuffer::get(&numpy::as_bytes(&array)?)?, argument)?;
    Ok(bytes.into_iter().map(|byte| byte != 0).collect())
}

/// A plan's buffer as words of eight bytes, the last one filled up with zeros, and how many bytes it has.
pub fn words(obj: &Bound<'_, PyAny>, argument: &str) -> PyResult<(Vec<u64>, usize)> {
    let py = obj.py();
    let array = if numpy::is_torch(obj) {
        obj.call_method0("numpy")?
    } else {
        obj.clone()
    };
    let wrong = |got: &str, cause| {
        let error = PyTypeError::new_err(format!("{argument} must be bytes or a uint8 array, not {got}"));
        Err(with_cause(py, error, cause))
    };
    let buffer = match PyUntypedBuffer::get(&array) {
        Ok(buffer) => buffer,
        Err(error) => return wrong(&type_name(obj), error),
    };
    if buffer.dimensions() != 1 {
        return Err(wrong_shape(py, argument, buffer.shape(), "one dimension"));
    }
    // A stride of zero would let a small object claim any length.
    if !buffer.is_c_contiguous() {
        return Err(
            errors::invalid(obj, argument, &format!("{argument} must be contiguous"))
                .hint("pass a copy")
                .into(),
        );
    }
    let len = buffer.item_count();
    let buffer: PyBuffer<u8> = match buffer.into_typed() {
        Ok(buffer) => buffer,
        Err(error) => return wrong(&dtype_name(&array), error),
    };
    let mut words = reserved(len.div_ceil(8))?;
    words.resize(len.div_ceil(8), 0_u64);
    buffer.copy_to_slice(py, &mut bytemuck::cast_slice_mut(&mut words)[..len])?;
    Ok((words, len))
}

/// Makes the error for an integer that is out of range, from the integer and its position.
type OutOfRange<'a> = &'a dyn Fn(&Bound<'_, PyAny>, usize) -> PyErr;

fn unsigned(ids: PyResult<Vec<i32>>) -> PyResult<Vec<u32>> {
    Ok(ids?.into_iter().map(i32::cast_unsigned).collect())
}

/// Reads integers that must all be in [low, high].
fn integers(
    obj: &Bound<'_, PyAny>,
    argument: &str,
    low: i32,
    high: i32,
    out_of_range: OutOfRange<'_>,
) -> PyResult<Vec<i32>> {
    let read = Integers {
        argument,
        low,
        high,
        out_of_range,
    };
    if let Ok(list) = obj.cast::<PyList>() {
        return read.items(obj, list.iter(), list.len());
    }
    if let Ok(tuple) = obj.cast::<PyTuple>() {
        return read.items(obj, tuple.iter(), tuple.len());
    }
    if let Ok(range) = obj.cast::<PyRange>() {
        // A range longer than the address space has no len() at all.
        let len = range.len().map_err(|_| too_many(obj, argument, None))?;
        return read.items(obj, range.try_iter()?.map_while(Result::ok), len);
    }
    let error = match PyUntypedBuffer::get(obj) {
        Ok(buffer) => return read.buffer(obj, buffer),
        Err(error) => error,
    };
    // Not a buffer, or one without strides (ctypes), which NumPy understands.
    let without_strides = error.is_instance_of::<PyBufferError>(obj.py());
    let Some(array) = numpy::as_numpy(obj, without_strides)? else {
        return Err(not_ids(obj, argument, &type_name(obj), Some(error)));
    };
    if array.getattr("ndim")?.eq(0)? {
        return Err(wrong_shape(obj.py(), argument, &[], "one dimension"));
    }
    match PyUntypedBuffer::get(&array) {
        Ok(buffer) => read.buffer(&array, buffer),
        Err(error) => Err(not_ids(obj, argument, &dtype_name(&array), Some(error))),
    }
}

/// What is read, and how to refuse it.
struct Integers<'a> {
    argument: &'a str,
    low: i32,
    high: i32,
    out_of_range: OutOfRange<'a>,
}

impl Integers<'_> {
    fn items<'py>(
        &self,
        obj: &Bound<'py, PyAny>,
        items: impl Iterator<Item = Bound<'py, PyAny>>,
        len: usize,
    ) -> PyResult<Vec<i32>> {
        let (py, argument) = (obj.py(), self.argument);
        check_length(obj, argument, len)?;
        let mut values = reserved(len)?;
        for (position, item) in items.enumerate() {
            let value = match to_i64(&item) {
                Ok(value) => value
                    .and_then(|v| i32::try_from(v).ok())
                    .filter(|v| (self.low..=self.high).contains(v)),
                Err(error) if error.is_instance_of::<PyTypeError>(py) => {
                    let message = format!("{argument}[{position}] must be an int, not {}", type_name(&item));
                    return Err(with_cause(py, PyTypeError::new_err(message), error));
                }
                Err(error) => return Err(error),
            };
            values.push(value.ok_or_else(|| (self.out_of_range)(&item, position))?);
            if position % SIGNAL_PERIOD == SIGNAL_PERIOD - 1 {
                py.check_signals()?;
            }
        }
        Ok(values)
    }

    fn buffer(&self, obj: &Bound<'_, PyAny>, buffer: PyUntypedBuffer) -> PyResult<Vec<i32>> {
        let (py, argument) = (obj.py(), self.argument);
        if buffer.dimensions() != 1 {
            return Err(wrong_shape(py, argument, buffer.shape(), "one dimension"));
        }
        check_length(obj, argument, buffer.item_count())?;
        let element = ElementType::from_format(buffer.format());
        match buffer.format().to_bytes().first() {
            // Another spelling (by ctypes) of the native order; a view makes it the plain one.
            Some(b'<') if cfg!(target_endian = "little") => {
                let ElementType::SignedInteger { bytes: bytes @ (4 | 8) } = element else {
                    return Err(not_ids(obj, argument, &element_name(element, "?"), None));
                };
                let array = numpy::as_signed(obj, bytes)?;
                let buffer = PyUntypedBuffer::get(&array)?;
                return self.buffer(&array, buffer);
            }
            Some(b'<' | b'>' | b'!') => return Err(not_ids(obj, argument, "an array in foreign byte order", None)),
            _ => {}
        }
        // One unsigned comparison does both ends of a range; it vectorises.
        match element {
            ElementType::SignedInteger { bytes: 4 } => {
                let values: Vec<i32> = copied(py, buffer, argument)?;
                let width = self.high.wrapping_sub(self.low).cast_unsigned();
                match values
                    .iter()
                    .position(|v| v.wrapping_sub(self.low).cast_unsigned() > width)
                {
                    Some(at) => Err((self.out_of_range)(values[at].into_pyobject(py)?.as_any(), at)),
                    None => Ok(values),
                }
            }
            ElementType::SignedInteger { bytes: 8 } => {
                let values: Vec<i64> = copied(py, buffer, argument)?;
                let (low, width) = (
                    i64::from(self.low),
                    (i64::from(self.high) - i64::from(self.low)).cast_unsigned(),
                );
                match values.iter().position(|v| v.wrapping_sub(low).cast_unsigned() > width) {
                    Some(at) => Err((self.out_of_range)(values[at].into_pyobject(py)?.as_any(), at)),
                    #[allow(clippy::cast_possible_truncation)] // checked just now
                    None => Ok(values.into_iter().map(|v| v as i32).collect()),
                }
            }
            other => Err(not_ids(
                obj,
                argument,
                &element_name(other, buffer.format().to_str().unwrap_or("?")),
                None,
            )),
        }
    }
}

/// The buffer's elements in a vector of their own; strided buffers are gathered.
fn copied<T: pyo3::buffer::Element + Default>(
    py: Python<'_>,
    buffer: PyUntypedBuffer,
    argument: &str,
) -> PyResult<Vec<T>> {
    let buffer: PyBuffer<T> = buffer.into_typed().map_err(|e| unusable(py, argument, &e))?;
    let mut values = reserved(buffer.item_count())?;
    values.resize(buffer.item_count(), T::default());
    buffer.copy_to_slice(py, &mut values)?;
    Ok(values)
}

fn reserved<T>(len: usize) -> PyResult<Vec<T>> {
    let mut values = Vec::new();
    values
        .try_reserve_exact(len)
        .map_err(|_| PyMemoryError::new_err(format!("no memory for {len} ids")))?;
    Ok(values)
}

fn check_length(obj: &Bound<'_, PyAny>, argument: &str, len: usize) -> PyResult<()> {
    if len > MAX_IDS {
        Err(too_many(obj, argument, Some(len)))
    } else {
        Ok(())
    }
}

fn too_many(obj: &Bound<'_, PyAny>, argument: &str, len: Option<usize>) -> PyErr {
    let shown = len.map_or_else(|| "more than 2^63".to_owned(), |n| n.to_string());
    errors::new(
        obj.py(),
        Class::InvalidArgument,
        format!("{argument} has {shown} ids, one call takes at most {MAX_IDS}"),
    )
    .with("argument", argument)
    .with("got", len)
    .with("expected", MAX_IDS)
    .into()
}

pub fn wrong_shape(py: Python<'_>, argument: &str, shape: &[usize], expected: &str) -> PyErr {
    let shape = PyTuple::new(py, shape).map_or_else(|_| "?".to_owned(), |t| t.to_string());
    errors::new(
        py,
        Class::InvalidArgument,
        format!("{argument} must have {expected}, got shape {shape}"),
    )
    .with("argument", argument)
    .with("got", shape)
    .with("expected", expected)
    .into()
}

fn not_ids(obj: &Bound<'_, PyAny>, argument: &str, got: &str, cause: Option<PyErr>) -> PyErr {
    let error = PyTypeError::new_err(format!(
        "{argument} must be an int32 or int64 array, or a list of ints, not {got}"
    ));
    match cause {
        Some(cause) => with_cause(obj.py(), error, cause),
        None => error,
    }
}

pub fn unusable(py: Python<'_>, argument: &str, error: &PyErr) -> PyErr {
    let reason = error.value(py).to_string();
    let known = error.is_instance_of::<PyBufferError>(py);
    let message = format!("{argument} cannot be read: {reason}");
    if known {
        errors::new(py, Class::InvalidArgument, message)
            .hint("pass a copy of it")
            .with("argument", argument)
            .into()
    } else {
        error.clone_ref(py)
    }
}

fn element_name(element: ElementType, format: &str) -> String {
    match element {
        ElementType::SignedInteger { bytes } => format!("int{}", bytes * 8),
        ElementType::UnsignedInteger { bytes } => format!("uint{}", bytes * 8),
        ElementType::Bool => "bool".to_owned(),
        ElementType::Float { bytes } => format!("float{}", bytes * 8),
        ElementType::Unknown => format!("elements of format '{format}'"),
    }
}
