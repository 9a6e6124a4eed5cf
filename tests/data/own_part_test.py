"""Of one process; `faults/hosts_test.py` has several."""

from hypothesis import given
from hypothesis import strategies as st
import jax
from jax.experimental import multihost_utils
import numpy as np
import pytest

from rlhf_jax.data import own_part
from rlhf_jax.data.tokenizer import Tokenizer

TOKENIZER = Tokenizer.train_byte_level_bpe(["abc abd"] * 4, 262)


def _refused(*args, **kwargs):
  raise AssertionError("there is nobody to ask")


def test_alone_nobody_and_no_device_is_asked(monkeypatch):
  for name in ("process_count", "process_index", "devices"):
    monkeypatch.setattr(jax, name, _refused)
  monkeypatch.setattr(multihost_utils, "process_allgather", _refused)
  texts = ["abc", "", "b"]
  assert own_part.encode_batch(TOKENIZER, texts) == TOKENIZER.encode_batch(
      texts
  )
  rows = [["ab", "c"], [], ["a"]]
  assert own_part.encode_rows(
      TOKENIZER, rows, together=2
  ) == TOKENIZER.encode_rows(rows)
  assert own_part.of_all(lambda: [[1], []]) == [[[1], []]]
  with pytest.raises(KeyError, match="as it is"):
    own_part.of_all(lambda: {}["as it is"])


def test_texts_of_another_number_order_or_division_have_another_checksum():
  texts = (
      ["ab", "c"], ["a", "bc"], ["c", "ab"], ["", "ab", "c"], ["abc"],
      [["a", "", "b"], ["c"]], [["a"], ["b", "", "c"]],
      [["ab", "c"]], [["ab"], [], ["c"]], [], ["\ud800"],
  )
  assert len({own_part._checksum(x) for x in texts}) == len(texts)
  assert own_part._checksum(texts[0]) == own_part._checksum(tuple(texts[0]))


@given(
    st.lists(st.lists(st.lists(st.integers(0, 2**31 - 1)))).filter(len),
    st.integers(1, 40),
)
def test_what_is_sent_arrives_in_blocks_of_any_size(parts, block):
  sent = [own_part._flattened(rows) for rows in parts]
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(own_part, "_BLOCK", block)
    for i, values in enumerate(sent):
      gather = _gathering(sent, i)
      patch.setattr(multihost_utils, "process_allgather", gather)
      failed, found = own_part._exchanged(False, values)
      assert not failed.any()
      assert [own_part._restored(x) for x in found] == parts


def _gathering(sent, this):
  """process_allgather, where each process sends its own of `sent`."""
  start = None

  def gather(x):
    nonlocal start
    if start is None:
      start = 0
      return np.asarray([[0, len(values)] for values in sent], np.int32)
    blocks = [np.pad(v[start:], (0, len(x)))[: len(x)] for v in sent]
    start += len(x)
    np.testing.assert_array_equal(x, blocks[this])
    return np.stack(blocks)

  return gather
