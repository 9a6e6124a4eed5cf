"""Packs documents of different lengths into rows of one length.

Segment ids keep the documents apart: attention stays within a segment and
positions restart there, so a packed row computes what its documents would
compute alone. Nothing is cut and nothing crosses into another row.
"""

from collections.abc import Sequence

import numpy as np

from rlhf_jax.types import LMBatch

Example = tuple[Sequence[int], Sequence[float]]


def pack(
    examples: Sequence[Example], length: int, *, pad_id: int = 0
) -> LMBatch:
  """First-fit: each example goes into the first row that has room for it.

  Args:
    examples: (tokens, loss_mask) pairs, each of 1 to `length` tokens.
    length: T, tokens a row.
    pad_id: fills the rest of a row; segment id 0 marks it.

  Returns:
    An LMBatch of numpy arrays [rows, T]. Segments are numbered from 1 in each
    row. The loss mask is 0 on a segment's first token, which nothing predicts.

  Raises:
    ValueError: no examples, or one is empty, too long or has a mask of another
      length.
  """
  lengths = [_checked_length(i, e, length) for i, e in enumerate(examples)]
  if not lengths:
    raise ValueError("there are no examples to pack.")
  row_of, num_rows = _first_fit(lengths, length)
  tokens = np.full((num_rows, length), pad_id, np.int32)
  segment_ids = np.zeros((num_rows, length), np.int32)
  loss_mask = np.zeros((num_rows, length), np.float32)
  start = [0] * num_rows
  segment = [0] * num_rows
  placed = zip(row_of, examples, lengths, strict=True)
  for row, (ids, mask), size in placed:
    begin, end = start[row], start[row] + size
    segment[row] += 1
    start[row] = end
    tokens[row, begin:end] = ids
    segment_ids[row, begin:end] = segment[row]
    loss_mask[row, begin + 1:end] = mask[1:]
  return LMBatch(tokens=tokens, segment_ids=segment_ids, loss_mask=loss_mask)


def _checked_length(index: int, example: Example, length: int) -> int:
  ids, mask = example
  if len(ids) != len(mask):
    raise ValueError(
        f"example {index}: {len(ids)} tokens but a loss mask of {len(mask)}."
    )
  if not 1 <= len(ids) <= length:
    raise ValueError(
        f"example {index} has {len(ids)} tokens; a row holds 1 to {length}."
        " Encode with max_length so that nothing has to be cut here."
    )
  return len(ids)


def _first_fit(lengths: Sequence[int], length: int) -> tuple[list[int], int]:
  """The row of each example, and the number of rows."""
  space = np.zeros(len(lengths), np.int64)
  num_rows = 0
  first_open = 0  # rows before it are full: no need to look at them again
  row_of = []
  for size in lengths:
    fits = space[first_open:num_rows] >= size
    row = first_open + int(fits.argmax()) if fits.any() else num_rows
    if row == num_rows:
      space[row] = length
      num_rows += 1
    space[row] -= size
    row_of.append(row)
    while first_open < num_rows and space[first_open] == 0:
      first_open += 1
  return row_of, num_rows
