"""Reads and writes the tensors of a checkpoint folder one at a time.

The folder holds one or several files in the safetensors format: eight bytes
with the length of a JSON header, the header ({name: {dtype, shape,
data_offsets}}), then the tensors' bytes. Only one tensor is in memory at once,
which is why the files are read here and not as a whole; paths may be local or
whatever else etils reads (gs://).
"""

from collections.abc import Callable, Iterable, Iterator
import dataclasses
import json
import math
import re
from typing import Any

from etils import epath
import ml_dtypes
import numpy as np

MAX_FILE_BYTES = 5 * 10**9
_MAX_HEADER_BYTES = 100_000_000  # as the format's own library has it
_PIECE_BYTES = 2**20  # a multiple of every item's size
_SINGLE = "model.safetensors"
_INDEX = "model.safetensors.index.json"
_FILE_NAME = re.compile(r"[\w-][\w.-]*\.safetensors")
_DTYPES = {
    "F64": np.dtype("<f8"),
    "F32": np.dtype("<f4"),
    "F16": np.dtype("<f2"),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "I64": np.dtype("<i8"),
    "I32": np.dtype("<i4"),
    "I16": np.dtype("<i2"),
    "I8": np.dtype("i1"),
    "U8": np.dtype("u1"),
    "BOOL": np.dtype("bool"),
}
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}


class TensorFileError(ValueError):
  """A checkpoint's file that cannot be read. Names file and tensor."""


@dataclasses.dataclass(frozen=True)
class _Entry:
  file: epath.Path
  dtype: np.dtype
  shape: tuple[int, ...]
  start: int  # in the file
  end: int


class TensorReader:
  """The tensors of a folder by name; `read` reads one.

  Args:
    file_name: the one file to read; None finds those of a model.

  Raises:
    TensorFileError: a file is missing, cut short or no safetensors file, or a
      tensor is in two files.
  """

  def __init__(self, folder: epath.PathLike, file_name: str | None = None):
    self.folder = epath.Path(folder)
    self._entries: dict[str, _Entry] = {}
    for file in _files(self.folder, file_name):
      for name, entry in _read_header(file):
        if name in self._entries:
          raise TensorFileError(
              f"{file}: tensor {name} is also in {self._entries[name].file}"
          )
        self._entries[name] = entry

  def names(self) -> list[str]:
    return sorted(self._entries)

  def file(self, name: str) -> epath.Path:
    return self._entries[name].file

  def shape(self, name: str) -> tuple[int, ...]:
    return self._entries[name].shape

  def dtype(self, name: str) -> np.dtype:
    return self._entries[name].dtype

  def read(self, name: str, dtype: str | None = None) -> np.ndarray:
    """One tensor, converted to `dtype` piece by piece while it is read."""
    entry = self._entries[name]
    out = np.empty(entry.shape, entry.dtype if dtype is None else dtype)
    flat, start = out.reshape(-1), 0
    for piece in self._pieces(entry, name):
      flat[start : start + piece.size] = piece
      start += piece.size
    return out

  def are_equal(self, name: str, other: str) -> bool:
    """Whether two tensors have the same shape and values."""
    mine, its = self._entries[name], self._entries[other]
    pairs = zip(self._pieces(mine, name), self._pieces(its, other))
    return mine.shape == its.shape and all(
        np.array_equal(a, b) for a, b in pairs
    )

  def _pieces(self, entry: _Entry, name: str) -> Iterator[np.ndarray]:
    with entry.file.open("rb") as stream:
      stream.seek(entry.start)
      left = entry.end - entry.start
      while left:
        data = stream.read(min(left, _PIECE_BYTES))
        left -= len(data)
        if len(data) % entry.dtype.itemsize or (left and not data):
          raise TensorFileError(
              f"{entry.file}: tensor {name}: the file changed while it was read"
          )
        yield np.frombuffer(data, entry.dtype)


def _files(folder: epath.Path, file_name: str | None) -> list[epath.Path]:
  if not folder.is_dir():
    raise TensorFileError(f"{folder}: no such folder")
  if file_name is not None and (folder / file_name).exists():
    return [folder / file_name]
  if file_name is not None:
    raise TensorFileError(f"{folder / file_name}: is missing")
  # As transformers looks: what stands beside (consolidated.safetensors, an
  # adapter) is another copy or another thing.
  if (folder / _SINGLE).exists():
    return [folder / _SINGLE]
  index = folder / _INDEX
  if not index.exists():
    files = sorted(folder.glob("model-*.safetensors"))
    files = files or sorted(folder.glob("*.safetensors"))
    if files:
      return files
    other = sorted(x.name for x in folder.glob("*.bin"))
    hint = (
        f"; {other[0]} is PyTorch's own format: save it with "
        "save_pretrained(..., safe_serialization=True)"
        if other
        else ""
    )
    raise TensorFileError(f"{folder}: holds no *.safetensors{hint}")
  try:
    names = set(json.loads(index.read_text())["weight_map"].values())
    strange = [x for x in names if not _FILE_NAME.fullmatch(x)]
  except (
      ValueError, KeyError, AttributeError, TypeError, RecursionError
  ) as error:
    raise TensorFileError(f"{index}: no index of tensors: {error!r}") from error
  if strange:
    raise TensorFileError(f"{index}: {strange[0]!r} is no file of this folder")
  for name in sorted(names):
    if not (folder / name).exists():
      raise TensorFileError(f"{folder / name}: is missing; {index} names it")
  return [folder / name for name in sorted(names)]


def _read_header(file: epath.Path) -> Iterator[tuple[str, _Entry]]:
  size = file.stat().length
  with file.open("rb") as stream:
    length = int.from_bytes(stream.read(8), "little")
    if size < 8 or not 0 < length <= min(size - 8, _MAX_HEADER_BYTES):
      raise TensorFileError(
          f"{file}: no safetensors file, or cut short within its header"
      )
    try:
      header = json.loads(stream.read(length))
      tensors = {k: v for k, v in header.items() if k != "__metadata__"}
    except (ValueError, AttributeError, RecursionError) as error:
      raise TensorFileError(f"{file}: damaged header: {error}") from error
  for name, value in tensors.items():
    entry = _entry(file, name, value, 8 + length)
    if entry.end > size:
      raise TensorFileError(
          f"{file}: tensor {name}: the file ends at byte {size}, the tensor at "
          f"{entry.end}: it was cut short. Fetch or write it again."
      )
    yield name, entry


def _entry(file: epath.Path, name: str, value: Any, base: int) -> _Entry:
  try:
    shape, (start, end) = tuple(value["shape"]), value["data_offsets"]
    dtype_name = str(value["dtype"])
    if not all(type(x) is int and x >= 0 for x in (*shape, start, end)):
      raise ValueError("numbers that are no counts")
  except (KeyError, TypeError, ValueError) as error:
    raise TensorFileError(
        f"{file}: tensor {name}: damaged header: {error!r}"
    ) from error
  if dtype_name not in _DTYPES:
    raise TensorFileError(
        f"{file}: tensor {name}: dtype {dtype_name} is not implemented"
    )
  dtype = _DTYPES[dtype_name]
  if end - start != math.prod(shape) * dtype.itemsize:
    raise TensorFileError(
        f"{file}: tensor {name}: {end - start} bytes are not {dtype_name} of "
        f"shape {list(shape)}"
    )
  return _Entry(file, dtype, shape, base + start, base + end)


@dataclasses.dataclass(frozen=True)
class TensorSource:
  """A tensor to be written: `make()` gives its values when they are needed."""

  name: str
  shape: tuple[int, ...]
  dtype: np.dtype
  make: Callable[[], np.ndarray]

  @property
  def num_bytes(self) -> int:
    return math.prod(self.shape) * self.dtype.itemsize


def write_tensors(
    folder: epath.PathLike,
    tensors: Iterable[TensorSource],
    max_file_bytes: int = MAX_FILE_BYTES,
) -> None:
  """Writes one file, or several with their index, a tensor at a time."""
  folder = epath.Path(folder)
  folder.mkdir(parents=True, exist_ok=True)
  # Of an earlier model, which would be read instead of this one.
  stale = [folder / _SINGLE, folder / _INDEX]
  for old in [*stale, *folder.glob("model-*-of-*.safetensors")]:
    old.unlink(missing_ok=True)
  groups: list[list[TensorSource]] = [[]]
  for tensor in tensors:
    held = sum(x.num_bytes for x in groups[-1])
    if groups[-1] and held + tensor.num_bytes > max_file_bytes:
      groups.append([])
    groups[-1].append(tensor)
  if len(groups) == 1:
    write_file(folder / _SINGLE, groups[0])
    return
  places = {}
  for i, group in enumerate(groups):
    name = f"model-{i + 1:05}-of-{len(groups):05}.safetensors"
    write_file(folder / name, group)
    places |= {tensor.name: name for tensor in group}
  total = sum(x.num_bytes for group in groups for x in group)
  index = {"metadata": {"total_size": total}, "weight_map": places}
  (folder / _INDEX).write_text(json.dumps(index, indent=2) + "\n")


def write_file(path: epath.Path, tensors: list[TensorSource]) -> None:
  """Writes one file, a tensor at a time; whole or not at all."""
  header, offset = {"__metadata__": {"format": "pt"}}, 0
  for tensor in tensors:
    header[tensor.name] = {
        "dtype": _NAMES[tensor.dtype],
        "shape": list(tensor.shape),
        "data_offsets": [offset, offset + tensor.num_bytes],
    }
    offset += tensor.num_bytes
  text = json.dumps(header, separators=(",", ":")).encode()
  text += b" " * (-len(text) % 8)  # tensors start on a multiple of 8 bytes
  temporary = path.parent / f"{path.name}.writing"
  with temporary.open("wb") as stream:
    stream.write(len(text).to_bytes(8, "little") + text)
    for tensor in tensors:
      array = np.asarray(tensor.make(), order="C")
      assert array.shape == tensor.shape and array.dtype == tensor.dtype
      # Its own bytes, not a copy of them.
      stream.write(array.reshape(-1).view(np.uint8).data)
      del array
  temporary.replace(path)
