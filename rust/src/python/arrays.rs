//! Numbers across the boundary: token ids, block ids and counts in, `NumPy` arrays out.
//!
//! Ids come as any one-dimensional int32 or int64 buffer (`NumPy`, `array.array`, `memoryview`, ctypes), as a torch CPU
//! tensor or another array object, or as a list, tuple or range of ints. A buffer costs one copy and no Python
//! object per id; it is copied because the caller may change it while a call has released the GIL.
//!
//! Everything here runs before a core is locked, so that Python code called on the way (`__index__`, `__array__`,
//! `__buffer__`) may itself use the core.

use pyo3::buffer::{ElementType, PyBuffer, PyUntypedBuffer};
use pyo3::exceptions::{PyBufferError, PyMemoryError, PyOverflowError, PyTypeError};
use pyo3::prelude::*;
use pyo3::sync::PyOnceLock;
use pyo3::types::{PyBool, PyInt, PyList, PyRange, PySlice, PyString, PyTuple};

use super::errors::{self, Class};

/// Most ids that one call takes: 2^28, so that a `range` or a zero-stride view of absurd length is refused instead of
/// exhausting the machine's memory. One call's prompt is far shorter.
pub const MAX_IDS: usize = 1 << 28;

/// Token ids are int32 in every array of a plan.
const TOKEN_LIMIT: u32 = 1 << 31;

/// Ids between two looks at pending signals while a list is read (about 10 ms).
const SIGNAL_PERIOD: usize = 1 << 20;

// ---------------------------------------------------------------------------------------------------------- ids in

/// Token ids, each in [0, `vocab_size`), or [0, 2^31) where no vocabulary was given. O(n).
///
/// # Errors
/// `TokenOutOfRangeError` with the first bad token and its position; `TypeError` for anything but integers;
/// `InvalidArgumentError` for a wrong shape.
pub fn token_ids(obj: &Bound<'_, PyAny>, argument: &str, vocab_size: Option<u32>) -> PyResult<Vec<u32>> {
    let limit = vocab_size.unwrap_or(TOKEN_LIMIT).min(TOKEN_LIMIT);
    ids_below(obj, argument, limit, &|token, position| {
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
    })
}

/// Block ids. Whether each exists is for the pool to say; what cannot be one at all is a `BlockError` here.
pub fn block_ids(obj: &Bound<'_, PyAny>, argument: &str, num_blocks: usize) -> PyResult<Vec<u32>> {
    ids_below(obj, argument, TOKEN_LIMIT, &|block, position| {
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
    })
}

/// One block id, likewise.
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

/// Makes the error for an id that is out of range, from the id and its position.
type OutOfRange<'a> = &'a dyn Fn(&Bound<'_, PyAny>, usize) -> PyErr;

/// Reads integers that must all be in [0, limit).
fn ids_below(obj: &Bound<'_, PyAny>, argument: &str, limit: u32, out_of_range: OutOfRange<'_>) -> PyResult<Vec<u32>> {
    if let Ok(list) = obj.cast::<PyList>() {
        return ids_from_items(obj.py(), list.iter(), list.len(), argument, limit, out_of_range);
    }
    if let Ok(tuple) = obj.cast::<PyTuple>() {
        return ids_from_items(obj.py(), tuple.iter(), tuple.len(), argument, limit, out_of_range);
    }
    if let Ok(range) = obj.cast::<PyRange>() {
        // A range longer than the address space has no len() at all.
        let len = range.len().map_err(|_| too_many(obj, argument, None))?;
        check_length(obj, argument, len)?;
        let items = range.try_iter()?.map_while(Result::ok);
        return ids_from_items(obj.py(), items, len, argument, limit, out_of_range);
    }
    let error = match PyUntypedBuffer::get(obj) {
        Ok(buffer) => return ids_from_buffer(obj, buffer, argument, limit, out_of_range),
        Err(error) => error,
    };
    // Not a buffer, or one without strides (ctypes), which NumPy understands.
    let without_strides = error.is_instance_of::<PyBufferError>(obj.py());
    let Some(array) = as_numpy(obj, without_strides)? else {
        return Err(not_ids(obj, argument, &type_name(obj), Some(error)));
    };
    if array.getattr("ndim")?.eq(0)? {
        return Err(wrong_shape(obj.py(), argument, &[], "one dimension"));
    }
    match PyUntypedBuffer::get(&array) {
        Ok(buffer) => ids_from_buffer(&array, buffer, argument, limit, out_of_range),
        Err(error) => Err(not_ids(obj, argument, &dtype_name(&array), Some(error))),
    }
}

fn ids_from_items<'py>(
    py: Python<'py>,
    items: impl Iterator<Item = Bound<'py, PyAny>>,
    len: usize,
    argument: &str,
    limit: u32,
    out_of_range: OutOfRange<'_>,
) -> PyResult<Vec<u32>> {
    let mut ids = reserved(len)?;
    for (position, item) in items.enumerate() {
        let id = match to_i64(&item) {
            Ok(value) => value.and_then(|v| u32::try_from(v).ok()).filter(|&v| v < limit),
            Err(error) if error.is_instance_of::<PyTypeError>(py) => {
                let message = format!("{argument}[{position}] must be an int, not {}", type_name(&item));
                return Err(with_cause(py, PyTypeError::new_err(message), error));
            }
            Err(error) => return Err(error),
        };
        ids.push(id.ok_or_else(|| out_of_range(&item, position))?);
        if position % SIGNAL_PERIOD == SIGNAL_PERIOD - 1 {
            py.check_signals()?;
        }
    }
    Ok(ids)
}

fn ids_from_buffer(
    obj: &Bound<'_, PyAny>,
    buffer: PyUntypedBuffer,
    argument: &str,
    limit: u32,
    out_of_range: OutOfRange<'_>,
) -> PyResult<Vec<u32>> {
    let py = obj.py();
    if buffer.dimensions() != 1 {
        return Err(wrong_shape(py, argument, buffer.shape(), "one dimension"));
    }
    check_length(obj, argument, buffer.item_count())?;
    let byte_order = buffer.format().to_bytes().first().copied();
    if byte_order == Some(b'<') && cfg!(target_endian = "little") {
        // Another spelling (by ctypes) of the native order; a view makes it the plain one.
        let array = numpy(py)?.getattr("asarray")?.call1((obj,))?;
        let dtype = match ElementType::from_format(buffer.format()) {
            ElementType::SignedInteger { bytes: 4 } => &functions(py)?.int32,
            ElementType::SignedInteger { bytes: 8 } => &functions(py)?.int64,
            _ => return Err(not_ids(obj, argument, &dtype_name(&array), None)),
        };
        let array = array.call_method1("view", (dtype,))?;
        let buffer = PyUntypedBuffer::get(&array)?;
        return ids_from_buffer(&array, buffer, argument, limit, out_of_range);
    }
    if matches!(byte_order, Some(b'<' | b'>' | b'!')) {
        return Err(not_ids(obj, argument, "an array in foreign byte order", None));
    }
    match ElementType::from_format(buffer.format()) {
        ElementType::SignedInteger { bytes: 4 } => {
            let values: Vec<i32> = copied(py, buffer, argument)?;
            // One unsigned comparison does both ends of the range; it vectorises.
            #[allow(clippy::cast_sign_loss)]
            if let Some(position) = values.iter().position(|&v| v as u32 >= limit) {
                return Err(out_of_range(&values[position].into_pyobject(py)?.into_any(), position));
            }
            Ok(values.into_iter().map(i32::cast_unsigned).collect())
        }
        ElementType::SignedInteger { bytes: 8 } => {
            let values: Vec<i64> = copied(py, buffer, argument)?;
            if let Some(position) = values.iter().position(|&v| v.cast_unsigned() >= u64::from(limit)) {
                return Err(out_of_range(&values[position].into_pyobject(py)?.into_any(), position));
            }
            #[allow(clippy::cast_possible_truncation, clippy::cast_sign_loss)] // checked just above
            Ok(values.into_iter().map(|v| v as u32).collect())
        }
        other => Err(not_ids(
            obj,
            argument,
            &element_name(other, buffer.format().to_str().unwrap_or("?")),
            None,
        )),
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

// ------------------------------------------------------------------------------------------------------- scalars in

/// An argument that has a default: absent, or what the caller gave, `None` included. (With `Option` a caller's `None` would
/// pass for the default.)
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
        value => {
            let (expected, limit) = if value.is_some_and(|v| v < min) || (value.is_none() && obj.lt(0)?) {
                ("at least", min)
            } else {
                ("at most", max)
            };
            let message = format!("{argument} is {}, expected {expected} {limit}", errors::shown(obj));
            Err(errors::invalid(obj, argument, &message).with("expected", limit).into())
        }
    }
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

/// The number of token ids there are: 1 to 2^31.
pub fn vocab_size(obj: &Bound<'_, PyAny>) -> PyResult<u32> {
    let value = int(obj, "vocab_size", 1, 1 << 31)?;
    Ok(u32::try_from(value).unwrap_or(TOKEN_LIMIT))
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
fn to_i64(obj: &Bound<'_, PyAny>) -> PyResult<Option<i64>> {
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

// ------------------------------------------------------------------------------------------------------- arrays out

/// A new int32 array of shape [n]. All ids of the core are below 2^31.
pub fn new_i32<'py>(py: Python<'py>, values: Vec<u32>) -> PyResult<Bound<'py, PyAny>> {
    let array = functions(py)?
        .empty
        .bind(py)
        .call1((values.len(), &functions(py)?.int32))?;
    fill_i32(&array, values)?;
    Ok(array)
}

/// A new int32 array of shape [n], of numbers that are int32 already.
pub fn new_i32_signed<'py>(py: Python<'py>, values: &[i32]) -> PyResult<Bound<'py, PyAny>> {
    let array = functions(py)?
        .empty
        .bind(py)
        .call1((values.len(), &functions(py)?.int32))?;
    fill(&array, values)?;
    Ok(array)
}

/// A new int32 array of shape [n, K].
pub fn new_i32_rows<'py, const K: usize>(py: Python<'py>, rows: &[[u32; K]]) -> PyResult<Bound<'py, PyAny>> {
    let array = functions(py)?
        .empty
        .bind(py)
        .call1(((rows.len(), K), &functions(py)?.int32))?;
    fill_i32(&array, rows.iter().flatten().copied().collect())?;
    Ok(array)
}

/// A new int64 array of shape [n].
pub fn new_i64<'py>(py: Python<'py>, values: &[i64]) -> PyResult<Bound<'py, PyAny>> {
    let array = functions(py)?
        .empty
        .bind(py)
        .call1((values.len(), &functions(py)?.int64))?;
    fill(&array, values)?;
    Ok(array)
}

fn fill_i32(array: &Bound<'_, PyAny>, values: Vec<u32>) -> PyResult<()> {
    let values: Vec<i32> = values.into_iter().map(u32::cast_signed).collect();
    fill(array, &values)
}

/// Writes all elements of a `NumPy` array that has as many.
fn fill<T: pyo3::buffer::Element>(array: &Bound<'_, PyAny>, values: &[T]) -> PyResult<()> {
    if values.is_empty() {
        return Ok(());
    }
    PyBuffer::<T>::get(array)?.copy_from_slice(array.py(), values)
}

/// An `out=` argument, checked before anything happens: a writable one-dimensional buffer of the right dtype.
pub struct Out<'py> {
    /// A `NumPy` view of the caller's memory.
    array: Bound<'py, PyAny>,
    capacity: usize,
}

impl<'py> Out<'py> {
    /// Accepts `NumPy` arrays and other writable buffers, and torch CPU tensors, strided or not.
    pub fn new(obj: &Bound<'py, PyAny>, bytes: usize) -> PyResult<Self> {
        let py = obj.py();
        let array = match PyUntypedBuffer::get(obj) {
            Ok(_) => numpy(py)?.getattr("asarray")?.call1((obj,))?,
            // Only where the array is known to share the tensor's memory: a copy would swallow the result.
            Err(_) if is_torch(obj) => obj.call_method0("numpy")?,
            Err(error) => {
                return Err(with_cause(
                    py,
                    PyTypeError::new_err(format!(
                        "out must be a writable int{} array, not {}",
                        bytes * 8,
                        type_name(obj)
                    )),
                    error,
                ));
            }
        };
        if array.getattr("ndim")?.eq(0)? {
            return Err(wrong_shape(py, "out", &[], "one dimension"));
        }
        let buffer = PyUntypedBuffer::get(&array)?;
        if buffer.dimensions() != 1 {
            return Err(wrong_shape(py, "out", buffer.shape(), "one dimension"));
        }
        let element = ElementType::from_format(buffer.format());
        if element != (ElementType::SignedInteger { bytes }) || buffer.format().to_bytes().starts_with(b">") {
            return Err(PyTypeError::new_err(format!(
                "out must be int{}, not {}",
                bytes * 8,
                dtype_name(&array)
            )));
        }
        if buffer.readonly() {
            return Err(errors::invalid(obj, "out", "out is read-only")
                .hint("pass a writable array")
                .into());
        }
        let aligned = match bytes {
            4 => buffer.as_typed::<i32>().map(|_| ()),
            _ => buffer.as_typed::<i64>().map(|_| ()),
        };
        aligned.map_err(|e| unusable(py, "out", &e))?;
        Ok(Self {
            capacity: buffer.item_count(),
            array,
        })
    }

    /// Writes the values to the front and gives the view of what was written; the rest of `out` keeps what it held.
    pub fn write_i32(self, values: &[i32]) -> PyResult<Bound<'py, PyAny>> {
        let view = self.front(values.len())?;
        fill(&view, values)?;
        Ok(view)
    }

    /// As [`Self::write_i32`], for int64.
    pub fn write_i64(self, values: &[i64]) -> PyResult<Bound<'py, PyAny>> {
        let view = self.front(values.len())?;
        fill(&view, values)?;
        Ok(view)
    }

    fn front(self, len: usize) -> PyResult<Bound<'py, PyAny>> {
        if len > self.capacity {
            let message = format!("out has room for {} values, {len} are needed", self.capacity);
            return Err(
                errors::invalid(self.capacity.into_pyobject(self.array.py())?.as_any(), "out", &message)
                    .with("expected", len)
                    .into(),
            );
        }
        if len == self.capacity {
            return Ok(self.array);
        }
        let stop = isize::try_from(len).unwrap_or(isize::MAX);
        self.array.get_item(PySlice::new(self.array.py(), 0, stop, 1))
    }
}

// -------------------------------------------------------------------------------------------------------------- NumPy

/// What is used of `NumPy`, looked up once. `NumPy` is imported by the first call that needs an array: `import pagedcore` is not slowed by it.
struct Functions {
    empty: Py<PyAny>,
    int32: Py<PyAny>,
    int64: Py<PyAny>,
}

fn functions(py: Python<'_>) -> PyResult<&'static Functions> {
    static FUNCTIONS: PyOnceLock<Functions> = PyOnceLock::new();
    FUNCTIONS.get_or_try_init(py, || {
        let numpy = numpy(py)?;
        let dtype = numpy.getattr("dtype")?;
        Ok(Functions {
            empty: numpy.getattr("empty")?.unbind(),
            int32: dtype.call1(("int32",))?.unbind(),
            int64: dtype.call1(("int64",))?.unbind(),
        })
    })
}

fn numpy(py: Python<'_>) -> PyResult<Bound<'_, PyModule>> {
    py.import("numpy")
}

/// The object as a `NumPy` array if it speaks one of the array protocols.
fn as_numpy<'py>(obj: &Bound<'py, PyAny>, is_buffer: bool) -> PyResult<Option<Bound<'py, PyAny>>> {
    if obj.is_instance_of::<pyo3::types::PyType>() {
        return Ok(None);
    }
    if is_torch(obj) {
        // Raises torch's own TypeError, which names the remedy, for a tensor that is not on the CPU.
        return obj.call_method0("numpy").map(Some);
    }
    if is_buffer || obj.hasattr("__array__")? {
        return numpy(obj.py())?.getattr("asarray")?.call1((obj,)).map(Some);
    }
    if obj.hasattr("__dlpack__")? {
        return numpy(obj.py())?.getattr("from_dlpack")?.call1((obj,)).map(Some);
    }
    Ok(None)
}

/// Whether the object is a torch tensor, found without importing torch.
fn is_torch(obj: &Bound<'_, PyAny>) -> bool {
    let class = obj.get_type();
    let module = class.module().ok();
    let torch = module
        .and_then(|m| m.to_str().ok().map(|m| m == "torch" || m.starts_with("torch.")))
        .unwrap_or(false);
    torch && obj.hasattr("numpy").unwrap_or(false)
}

// ------------------------------------------------------------------------------------------------------------- errors

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

fn wrong_shape(py: Python<'_>, argument: &str, shape: &[usize], expected: &str) -> PyErr {
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

fn unusable(py: Python<'_>, argument: &str, error: &PyErr) -> PyErr {
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

fn with_cause(py: Python<'_>, error: PyErr, cause: PyErr) -> PyErr {
    error.set_cause(py, Some(cause));
    error
}

pub fn type_name(obj: &Bound<'_, PyAny>) -> String {
    obj.get_type()
        .name()
        .map_or_else(|_| "?".to_owned(), |name| name.to_string())
}

fn dtype_name(array: &Bound<'_, PyAny>) -> String {
    array
        .getattr("dtype")
        .map_or_else(|_| type_name(array), |dtype| dtype.to_string())
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
