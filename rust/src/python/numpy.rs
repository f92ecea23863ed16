//! `NumPy` arrays out, and the views of plans. `NumPy` is imported by the first call that needs an array: importing
//! pagedcore is not slowed by it.

use pyo3::buffer::{ElementType, PyBuffer, PyUntypedBuffer};
use pyo3::exceptions::PyTypeError;
use pyo3::prelude::*;
use pyo3::sync::PyOnceLock;
use pyo3::types::{PySlice, PyType};

use super::arguments::{type_name, with_cause};
use super::arrays::{unusable, wrong_shape};
use super::errors;
use crate::ids::BlockId;
use crate::plan::{Array, ArrayInfo, DType};

/// An int32 array to be, of ids. It is made before the call that changes the core, with room for all that can come of
/// it: what can fail for want of `NumPy` or of memory has then failed before anything changes. (A view takes some bytes
/// only.)
pub struct NewIds<'py> {
    array: Bound<'py, PyAny>,
    room: usize,
}

impl<'py> NewIds<'py> {
    /// Of shape [room].
    pub fn new(py: Python<'py>, room: usize) -> PyResult<Self> {
        let functions = functions(py)?;
        let array = functions.empty.bind(py).call1((room, &functions.int32))?;
        Ok(Self { array, room })
    }

    /// Of shape [room, 2].
    pub fn pairs(py: Python<'py>, room: usize) -> PyResult<Self> {
        let functions = functions(py)?;
        let array = functions.empty.bind(py).call1(((room, 2), &functions.int32))?;
        Ok(Self { array, room })
    }

    /// The array with `len` ids, or pairs of ids: its front, if there is room for more. All ids are below 2^31.
    pub fn fill(self, len: usize, ids: impl Iterator<Item = u32>) -> PyResult<Bound<'py, PyAny>> {
        let array = if len == self.room {
            self.array
        } else {
            front(&self.array, len)?
        };
        let ids: Vec<i32> = ids.map(u32::cast_signed).collect();
        fill(&array, &ids)?;
        Ok(array)
    }

    /// The array with these blocks.
    pub fn blocks(self, blocks: Vec<BlockId>) -> PyResult<Bound<'py, PyAny>> {
        self.fill(blocks.len(), blocks.into_iter().map(|block| block.0))
    }
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

/// A new int64 array of shape [n].
pub fn new_i64<'py>(py: Python<'py>, values: &[i64]) -> PyResult<Bound<'py, PyAny>> {
    let array = functions(py)?
        .empty
        .bind(py)
        .call1((values.len(), &functions(py)?.int64))?;
    fill(&array, values)?;
    Ok(array)
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
        front(&self.array, len)
    }
}

/// What is used of `NumPy`, looked up once.
struct Functions {
    empty: Py<PyAny>,
    ndarray: Py<PyAny>,
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
            ndarray: numpy.getattr("ndarray")?.unbind(),
            int32: dtype.call1(("int32",))?.unbind(),
            int64: dtype.call1(("int64",))?.unbind(),
        })
    })
}

pub fn numpy(py: Python<'_>) -> PyResult<Bound<'_, PyModule>> {
    py.import("numpy")
}

/// The object as a `NumPy` array if it speaks one of the array protocols.
pub fn as_numpy<'py>(obj: &Bound<'py, PyAny>, is_buffer: bool) -> PyResult<Option<Bound<'py, PyAny>>> {
    if obj.is_instance_of::<PyType>() {
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
pub fn is_torch(obj: &Bound<'_, PyAny>) -> bool {
    let class = obj.get_type();
    let module = class.module().ok();
    let torch = module
        .and_then(|m| m.to_str().ok().map(|m| m == "torch" || m.starts_with("torch.")))
        .unwrap_or(false);
    torch && obj.hasattr("numpy").unwrap_or(false)
}

/// The name of an array's dtype.
pub fn dtype_name(array: &Bound<'_, PyAny>) -> String {
    array
        .getattr("dtype")
        .map_or_else(|_| type_name(array), |dtype| dtype.to_string())
}

/// A view of a byte array, as one array of a plan.
pub fn view<'py>(memory: &Bound<'py, PyAny>, info: &ArrayInfo) -> PyResult<Bound<'py, PyAny>> {
    let functions = functions(memory.py())?;
    let (dtype, size) = match info.array.dtype() {
        DType::Int32 => (&functions.int32, 4),
        DType::Int64 => (&functions.int64, 8),
    };
    let ndarray = functions.ndarray.bind(memory.py());
    if info.columns == 0 && info.array != Array::BlockTable {
        ndarray.call1(((info.len,), dtype, memory, info.offset))
    } else {
        let (shape, strides) = ((info.len, info.columns), (info.row_stride * size, size));
        ndarray.call1((shape, dtype, memory, info.offset, strides))
    }
}

/// The first `len` elements, as a view.
pub fn front<'py>(array: &Bound<'py, PyAny>, len: usize) -> PyResult<Bound<'py, PyAny>> {
    let stop = isize::try_from(len).unwrap_or(isize::MAX);
    array.get_item(PySlice::new(array.py(), 0, stop, 1))
}

/// A new byte array of the words, aligned to 64 bytes.
pub fn aligned_bytes<'py>(py: Python<'py>, words: &[u64]) -> PyResult<Bound<'py, PyAny>> {
    let functions = functions(py)?;
    let whole = functions.empty.bind(py).call1((words.len() + 8, &functions.int64))?;
    let address = PyUntypedBuffer::get(&whole)?.buf_ptr() as usize;
    let first = isize::try_from(address.wrapping_neg() % 64 / 8).unwrap_or(0);
    let len = isize::try_from(words.len()).unwrap_or(isize::MAX);
    let aligned = whole.get_item(PySlice::new(py, first, first + len, 1))?;
    fill::<i64>(&aligned, bytemuck::cast_slice(words))?;
    as_bytes(&aligned)
}

/// An array over memory that `__array_interface__` describes, which is kept alive by it.
pub fn over<'py>(memory: &Bound<'py, PyAny>) -> PyResult<Bound<'py, PyAny>> {
    numpy(memory.py())?.getattr("asarray")?.call1((memory,))
}

/// A view of an array as uint8.
pub fn as_bytes<'py>(array: &Bound<'py, PyAny>) -> PyResult<Bound<'py, PyAny>> {
    numpy(array.py())?
        .getattr("asarray")?
        .call1((array,))?
        .call_method1("view", ("uint8",))
}

/// A view of an array of `bytes` wide integers as signed ones of native byte order.
pub fn as_signed<'py>(array: &Bound<'py, PyAny>, bytes: usize) -> PyResult<Bound<'py, PyAny>> {
    let functions = functions(array.py())?;
    let dtype = if bytes == 4 { &functions.int32 } else { &functions.int64 };
    numpy(array.py())?
        .getattr("asarray")?
        .call1((array,))?
        .call_method1("view", (dtype,))
}
