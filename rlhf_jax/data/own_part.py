"""Encoding texts, of which each process of a run does its own part.

The order of batches, packing and what is held out are of all records, so every
process reads them all. What takes the time is to make ids of them: process p of
N encodes the texts p, p + N, ... and gets the others' ids. Everything after
that is on every process what it is on one that runs alone, bit by bit.

All processes must call these functions alike. A process that fails in its part
says so to the others, instead of leaving them to wait.
"""

from collections.abc import Callable, Sequence
import itertools
from typing import TypeVar
import zlib

import jax
from jax.experimental import multihost_utils
import numpy as np

from rlhf_jax.data.tokenizer import Tokenizer

Item = TypeVar("Item")
# Of the ids of all processes, how many are on a device at a time.
_BLOCK = 2**26


class OwnPartError(RuntimeError):
  """Another process could not do its part, or has read other records."""


def encode_batch(tokenizer: Tokenizer, texts: Sequence[str]) -> list[list[int]]:
  """`tokenizer.encode_batch(texts)`."""
  if _is_alone():
    return tokenizer.encode_batch(texts)
  return _divided(tokenizer.encode_batch, texts, [1] * len(texts), 1)


def encode_rows(
    tokenizer: Tokenizer, rows: Sequence[Sequence[str]], *, together: int = 1
) -> list[list[list[int]]]:
  """`tokenizer.encode_rows(rows)`.

  Args:
    together: so many rows in a row are one process's, because they share texts,
      of which the tokenizer encodes each once.
  """
  if _is_alone():
    return tokenizer.encode_rows(rows)

  def encode(part: Sequence[Sequence[str]]) -> list[list[int]]:
    return list(itertools.chain.from_iterable(tokenizer.encode_rows(part)))

  counts = [len(row) for row in rows]
  ids = iter(_divided(encode, rows, counts, together))
  return [list(itertools.islice(ids, count)) for count in counts]


def of_all(make: Callable[[], list[list[int]]]) -> list[list[list[int]]]:
  """What `make()` gives in each process, in their order, known to all.

  Raises:
    OwnPartError: it raised in another process. What it raised in this one is
      raised as it is.
  """
  if _is_alone():
    return [make()]
  error = None
  try:
    values = _flattened(make())
  except Exception as e:  # pylint: disable=broad-except
    # Whatever it is, the others wait.
    error = e
    message = f"{type(e).__name__}: {e}".encode(errors="replace")
    values = np.frombuffer(message, np.uint8).astype(np.int32)
  has_failed, found = _exchanged(error is not None, values)
  if error is not None:
    raise error
  failed = [
      f"process {i} of {len(found)} could not encode its part of the texts:"
      f" {bytes(found[i].astype(np.uint8)).decode(errors='replace')}"
      for i in np.flatnonzero(has_failed)
  ]
  if failed:
    raise OwnPartError("; ".join(failed))
  return [_restored(x) for x in found]


def _is_alone() -> bool:
  # The first question starts no device where there is nobody to ask.
  return not jax.distributed.is_initialized() or jax.process_count() == 1


def _divided(
    encode: Callable[[Sequence[Item]], list[list[int]]],
    items: Sequence[Item],
    counts: Sequence[int],
    together: int,
) -> list[list[int]]:
  """`encode(items)`, which gives counts[i] lists of ids for items[i]."""
  num, this = jax.process_count(), jax.process_index()
  owners = [i // together % num for i in range(len(items))]
  mine = [x for x, owner in zip(items, owners, strict=True) if owner == this]
  # All compare what all have read, so that all end where one differs.
  parts = of_all(lambda: [[len(items), _checksum(items)], *encode(mine)])
  read = [tuple(part.pop(0)) for part in parts]
  if len(set(read)) > 1:
    told = ", ".join(f"{n} with checksum {x:08x}" for n, x in read)
    raise OwnPartError(
        f"the {num} processes have read different texts: {told}. All processes"
        " must see the same files"
    )
  ids = [iter(part) for part in parts]
  return [
      next(ids[owner])
      for owner, count in zip(owners, counts, strict=True)
      for _ in range(count)
  ]


def _checksum(items: Sequence[str | Sequence[str]]) -> int:
  """Of all texts and how they are divided; 31 bits."""
  found = 0
  for item in items:
    texts = (item,) if isinstance(item, str) else item
    found = zlib.crc32(len(texts).to_bytes(8, "little"), found)
    for text in texts:
      # What cannot be encoded is an error of whoever encodes it.
      raw = text.encode("utf-8", "surrogatepass")
      found = zlib.crc32(len(raw).to_bytes(8, "little") + raw, found)
  return found & 0x7FFFFFFF


def _flattened(rows: list[list[int]]) -> np.ndarray:
  """How many there are, their lengths, and their ids."""
  lengths = [len(row) for row in rows]
  values = itertools.chain([len(rows)], lengths, *rows)
  return np.fromiter(values, np.int32, 1 + len(rows) + sum(lengths))


def _restored(values: np.ndarray) -> list[list[int]]:
  """The rows that `_flattened` was given."""
  num = int(values[0])
  ids = iter(values[1 + num :].tolist())
  return [list(itertools.islice(ids, n)) for n in values[1 : 1 + num].tolist()]


def _exchanged(
    failed: bool, values: np.ndarray
) -> tuple[np.ndarray, list[np.ndarray]]:
  """Of each process, whether it has failed, and its values."""
  heads = multihost_utils.process_allgather(
      np.asarray([failed, len(values)], np.int32)
  )
  sizes = heads[:, 1].tolist()
  # What all send has one shape. Powers of two: few programs are compiled.
  size = 1 << (max(sizes) - 1).bit_length()
  size = min(size, max(_BLOCK // len(sizes), 1))
  blocks = []
  for start in range(0, max(sizes), size):
    block = np.zeros(size, np.int32)
    part = values[start : start + size]
    block[: len(part)] = part
    blocks.append(multihost_utils.process_allgather(block))
  whole = np.concatenate(blocks, axis=1)
  return heads[:, 0], [whole[i, :n] for i, n in enumerate(sizes)]
