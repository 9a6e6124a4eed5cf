"""Hypothesis strategies for padded arrays over hostile padding."""

from hypothesis.extra import numpy as hnp
import hypothesis.strategies as st
import numpy as np

BATCH, LENGTH = 3, 5
JUNK = (float("nan"), float("inf"), float("-inf"), 3e38, 0.0)


def floats(shape, largest=4.0):
  return hnp.arrays(
      np.float32, shape, elements=st.floats(-largest, largest, width=32)
  )


@st.composite
def masks(draw, side="right", min_length=0):
  """int32 [BATCH, LENGTH], contiguous ones; side is where the padding is."""
  mask = np.zeros((BATCH, LENGTH), np.int32)
  for row in mask:
    n = draw(st.integers(min_length, LENGTH))
    start = {
        "right": 0,
        "left": LENGTH - n,
        "any": draw(st.integers(0, LENGTH - n)),
    }[side]
    row[start : start + n] = 1
  return mask


def spoil(x, mask, junk):
  """x with the same junk on every masked entry."""
  return np.where(mask != 0, x, np.asarray(junk, x.dtype))


def rows(x, mask):
  """The real entries of each row, as lists of float64."""
  return [
      [float(v) for v in row[m != 0]] for row, m in zip(x, mask, strict=True)
  ]


def pad(ragged, mask):
  """The inverse of `rows`, with zeros on padding."""
  out = np.zeros(mask.shape, np.float64)
  out[mask != 0] = [v for row in ragged for v in row]
  return out
