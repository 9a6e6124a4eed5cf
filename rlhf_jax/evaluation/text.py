"""Cheap signs of degenerate text: sameness across texts, loops within one.

Words are what is left between white space, in lower case. These numbers see
what a reward model may not: a policy that answers everything alike, or that
repeats a phrase the reward model likes.
"""

from collections.abc import Iterator, Sequence


def words(text: str) -> list[str]:
  return text.lower().split()


def _ngrams(text: str, n: int) -> Iterator[tuple[str, ...]]:
  tokens = words(text)
  return zip(*(tokens[i:] for i in range(n)))


def distinct_n(texts: Sequence[str], n: int) -> float:
  """Distinct n-grams over all n-grams of `texts` together, in [0, 1].

  1: no n-gram occurs twice; near 0: the texts say the same thing. Texts
  without any n-gram give 0. Falls as texts grow in number and in length, so
  compare at equal numbers of texts.

  Reference: Li et al. (2016), arXiv 1510.03055, section 5.
  """
  _check_n(n)
  seen, total = set(), 0
  for text in texts:
    for ngram in _ngrams(text, n):
      seen.add(ngram)
      total += 1
  return len(seen) / total if total else 0.0


def repetition(text: str, n: int = 3) -> float:
  """Share of the text's n-grams that it had said before, in [0, 1).

  0: no phrase of n words comes twice, or there are fewer than n words.

  Reference: "seq-rep-n" of Welleck et al. (2020), arXiv 1908.04319, equation
    10.
  """
  _check_n(n)
  ngrams = list(_ngrams(text, n))
  return 1 - len(set(ngrams)) / len(ngrams) if ngrams else 0.0


def _check_n(n: int) -> None:
  if n < 1:
    raise ValueError(f"n: want at least 1, got {n}")
