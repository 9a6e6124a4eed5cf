from hypothesis import given
from hypothesis import strategies as st
import numpy as np
import pytest

from rlhf_jax.data.packing import pack

LENGTH = 12

examples_of = st.lists(
    st.lists(
        st.tuples(st.integers(1, 99), st.sampled_from([0.0, 1.0])),
        min_size=1, max_size=LENGTH,
    ).map(lambda pairs: tuple(map(list, zip(*pairs, strict=True)))),
    min_size=1, max_size=20,
)


def unpack(batch):
  """Every segment as (tokens, loss_mask), by a plain loop."""
  found = []
  rows = zip(batch.tokens, batch.segment_ids, batch.loss_mask, strict=True)
  for tokens, segments, mask in rows:
    for segment in range(1, segments.max() + 1):
      where = np.flatnonzero(segments == segment)
      # One piece: a document is never torn within its row.
      assert (np.diff(where) == 1).all()
      found.append((tokens[where].tolist(), mask[where].tolist()))
  return found


@given(examples=examples_of)
def test_packing_loses_nothing_and_never_crosses_documents(examples):
  batch = pack(examples, LENGTH)
  expected = [(ids, [0.0, *mask[1:]]) for ids, mask in examples]
  assert sorted(unpack(batch)) == sorted(expected)


@given(examples=examples_of)
def test_padding_has_no_segment_and_no_loss(examples):
  batch = pack(examples, LENGTH, pad_id=77)
  padding = batch.segment_ids == 0
  assert (batch.tokens[padding] == 77).all()
  assert (batch.loss_mask[padding] == 0).all()
  # Padding only at the end of a row: segment ids fall to 0 once.
  assert (np.diff(padding.astype(int), axis=1) >= 0).all()


@given(examples=examples_of)
def test_rows_are_those_of_first_fit(examples):
  space = []
  for ids, _ in examples:
    row = next((r for r, left in enumerate(space) if left >= len(ids)), None)
    if row is None:
      row = len(space)
      space.append(LENGTH)
    space[row] -= len(ids)
  batch = pack(examples, LENGTH)
  free = (batch.segment_ids == 0).sum(axis=1).tolist()
  assert free == space


def test_dtypes():
  batch = pack([([1, 2], [1, 1])], 4)
  assert batch.tokens.dtype == batch.segment_ids.dtype == np.int32
  assert batch.loss_mask.dtype == np.float32


def test_what_does_not_fit_is_an_error():
  with pytest.raises(ValueError, match="example 1 has 5 tokens; .* 1 to 4"):
    pack([([1], [1]), ([1] * 5, [1] * 5)], 4)
  with pytest.raises(ValueError, match="example 0 has 0 tokens"):
    pack([([], [])], 4)
  with pytest.raises(ValueError, match="3 tokens but a loss mask of 2"):
    pack([([1] * 3, [1] * 2)], 4)
  with pytest.raises(ValueError, match="no examples"):
    pack([], 4)
