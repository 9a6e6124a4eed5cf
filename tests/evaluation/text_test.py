"""Signs of degenerate text."""

from hypothesis import given
from hypothesis import strategies as st
import pytest

from rlhf_jax.evaluation import text

short_texts = st.lists(st.sampled_from(["a", "B", "c "]), max_size=12).map(
    " ".join
)


def naive_ngrams(words, n):
  return [
      tuple(words[i:i + n]) for i in range(len(words)) if i + n <= len(words)
  ]


@given(st.lists(short_texts, max_size=4), st.integers(1, 4))
def test_distinct_n_matches_a_loop(texts, n):
  ngrams = []
  for each in texts:
    ngrams += naive_ngrams(each.lower().split(), n)
  distinct = []
  for ngram in ngrams:
    if ngram not in distinct:
      distinct.append(ngram)
  expected = len(distinct) / len(ngrams) if ngrams else 0.0
  assert text.distinct_n(texts, n) == pytest.approx(expected)


def test_ngrams_do_not_cross_from_one_text_to_the_next():
  assert text.distinct_n(["a b", "c d"], 2) == 1.0
  assert text.distinct_n(["a", "b"], 2) == 0.0


@given(short_texts)
def test_one_text_repeats_what_is_not_distinct(each):
  ngrams = naive_ngrams(each.lower().split(), 3)
  repeated = sum(ngram in ngrams[:i] for i, ngram in enumerate(ngrams))
  expected = repeated / len(ngrams) if ngrams else 0.0
  assert text.repetition(each) == pytest.approx(expected)


def test_a_loop_is_told_from_prose():
  prose = "the cow eats grass and lives on the farm near the lake"
  assert text.repetition(prose) == 0.0
  assert text.repetition("you are so clever! " * 20) > 0.9


def test_n_must_be_positive():
  with pytest.raises(ValueError, match="n: want at least 1, got 0"):
    text.distinct_n(["a"], 0)
