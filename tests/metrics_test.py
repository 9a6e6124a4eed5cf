import hypothesis
from hypothesis.extra import numpy as hnp
import hypothesis.strategies as st
import jax.numpy as jnp
import numpy as np

from rlhf_jax import metrics


@hypothesis.given(
    values=hnp.arrays(
        np.float32, (6, 4), elements=st.integers(-99, 99).map(float)
    ),
    mask=hnp.arrays(np.int32, (6, 4), elements=st.integers(0, 1)),
    cuts=st.lists(st.integers(0, 6), max_size=3),
)
def test_mean_of_any_parts_is_the_mean_of_the_whole(values, mask, cuts):
  edges = [0, *sorted(cuts), 6]
  total = {}
  for start, end in zip(edges, edges[1:]):
    part = metrics.average(
        jnp.asarray(values[start:end]), jnp.asarray(mask[start:end])
    )
    total = metrics.add(total, {"x": part})
  if not mask.sum():
    assert metrics.compute(total) == {}
    return
  kept = values[mask == 1].astype(np.float64)
  # Whole numbers: exact, so equal and not merely close.
  assert metrics.compute(total)["x"] == np.float32(
      np.float32(kept.sum()) / np.float32(kept.size)
  )


def test_average_ignores_nan_where_masked_and_keeps_it_where_not():
  values = jnp.asarray([1.0, jnp.nan, 3.0], jnp.float32)
  masked = metrics.average(values, jnp.asarray([1, 0, 1], jnp.int32))
  assert metrics.compute({"x": masked}) == {"x": 2.0}
  assert np.isnan(metrics.compute({"x": metrics.average(values)})["x"])


def test_average_takes_any_dtype_of_values_and_mask():
  for values in ([True, False], [1, 0]):
    for mask in ([True, True], [1.0, 1.0]):
      metric = metrics.average(jnp.asarray(values), jnp.asarray(mask))
      assert metric.total.dtype == metric.count.dtype == jnp.float32
      assert metrics.compute({"x": metric}) == {"x": 0.5}


def test_combine_sums_the_leading_axis_of_a_scan():
  stacked = {
      "x": metrics.Metric(
          total=jnp.asarray([1.0, 5.0]), count=jnp.asarray([1.0, 3.0])
      )
  }
  assert metrics.compute(metrics.combine(stacked)) == {"x": 1.5}


def test_add_keeps_names_that_only_one_side_has():
  a = {"a": metrics.scalar(1.0), "both": metrics.scalar(2.0)}
  b = {"b": metrics.scalar(3.0), "both": metrics.scalar(4.0)}
  added = metrics.compute(metrics.add(a, b))
  assert added == {"a": 1.0, "b": 3.0, "both": 3.0}
  assert list(added) == sorted(added)


def test_metric_that_nothing_was_counted_in_is_left_out():
  empty = metrics.average(jnp.ones((2,)), jnp.zeros((2,)))
  assert metrics.compute({"x": empty, "y": metrics.scalar(2)}) == {"y": 2.0}
