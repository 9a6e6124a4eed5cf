import json

from hypothesis import given, settings
from hypothesis import strategies as st
import numpy as np
import pytest

from rlhf_jax.data.pipeline import make_dataset
from rlhf_jax.types import PromptBatch


def rows(num: int) -> PromptBatch:
  index = np.arange(num, dtype=np.int32)
  return PromptBatch(
      prompts=np.stack([index, index * 2], 1),
      prompt_mask=np.ones((num, 2), np.int32),
      index=index,
  )


def order(dataset, count: int) -> list[list[int]]:
  iterator = iter(dataset)
  return [next(iterator).index.tolist() for _ in range(count)]


def test_batches_are_the_same_container_with_whole_rows():
  batch = next(iter(make_dataset(rows(10), batch_size=4, seed=0)))
  assert isinstance(batch, PromptBatch)
  assert batch.prompts.shape == (4, 2) and batch.prompts.dtype == np.int32
  np.testing.assert_array_equal(batch.prompts[:, 1], batch.index * 2)


@settings(max_examples=10)  # to set an iterator up is slow
@given(
    num=st.integers(1, 30), batch=st.integers(1, 30), seed=st.integers(0, 9),
    done=st.integers(0, 12),
)
def test_resumed_iterator_sees_the_same_batches(num, batch, seed, done):
  batch = min(num, batch)
  whole = order(make_dataset(rows(num), batch_size=batch, seed=seed), done + 5)
  first = iter(make_dataset(rows(num), batch_size=batch, seed=seed))
  for _ in range(done):
    next(first)
  state = json.loads(json.dumps(first.get_state()))
  second = iter(make_dataset(rows(num), batch_size=batch, seed=seed))
  second.set_state(state)
  assert [next(second).index.tolist() for _ in range(5)] == whole[done:]


def test_same_seed_same_order_other_seed_other_order():
  first = order(make_dataset(rows(50), batch_size=10, seed=1), 5)
  assert first == order(make_dataset(rows(50), batch_size=10, seed=1), 5)
  assert first != order(make_dataset(rows(50), batch_size=10, seed=2), 5)


def test_every_epoch_has_each_row_once_in_an_order_of_its_own():
  batches = order(make_dataset(rows(40), batch_size=10, seed=3), 12)
  epochs = [sum(batches[i:i + 4], []) for i in (0, 4, 8)]
  assert all(sorted(epoch) == list(range(40)) for epoch in epochs)
  assert epochs[0] != epochs[1] != epochs[2] != epochs[0]


def test_remainder_is_dropped_and_batches_never_mix_epochs():
  dataset = make_dataset(rows(11), batch_size=4, seed=0, num_epochs=3)
  batches = [batch.index.tolist() for batch in dataset]
  assert len(batches) == 6
  for start in (0, 2, 4):
    assert len(set(batches[start] + batches[start + 1])) == 8


def test_sizes_that_do_not_fit_are_named():
  with pytest.raises(ValueError, match="batch_size=8 does not fit 7 rows"):
    make_dataset(rows(7), batch_size=8, seed=0)
  with pytest.raises(ValueError, match="num_epochs=0"):
    make_dataset(rows(7), batch_size=2, seed=0, num_epochs=0)
  with pytest.raises(ValueError, match=r"\.index: 3"):
    bad = PromptBatch(
        prompts=np.zeros((4, 2)), prompt_mask=np.zeros((4, 2)),
        index=np.zeros(3),
    )
    make_dataset(bad, batch_size=2, seed=0)


@pytest.mark.parametrize("num_parts", [2, 4])
def test_parts_of_batches_make_the_batches_and_have_one_state(num_parts):
  whole = iter(make_dataset(rows(20), batch_size=8, seed=1))
  parts = [
      iter(make_dataset(rows(20), batch_size=8, seed=1, local_rows=mine))
      for mine in np.split(np.arange(8), num_parts)
  ]
  for _ in range(5):
    found = [next(part).index for part in parts]
    np.testing.assert_array_equal(np.concatenate(found), next(whole).index)
    states = [part.get_state() for part in parts]
    assert all(state == whole.get_state() for state in states)
