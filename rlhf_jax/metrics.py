"""Metrics as (total, count), so that means of means stay exact.

A metric is summed over microbatches, minibatches, devices and steps before it
is divided, so every average weighs each token (or episode) once, wherever it
was computed.
"""

from collections.abc import Mapping

import jax
import jax.numpy as jnp
from jaxtyping import Array
import numpy as np

from rlhf_jax.types import pytree_dataclass


@pytree_dataclass
class Metric:
  """A running mean: `total / count`. Both are float32 scalars."""

  total: Array
  count: Array


Metrics = dict[str, Metric]


def average(values: Array, mask: Array | None = None) -> Metric:
  """The mean of `values` where `mask` is 1 (everywhere without one).

  Masked entries may hold NaN: they are replaced, not multiplied away.
  """
  values = values.astype(jnp.float32)
  if mask is None:
    return Metric(
        total=values.sum(), count=jnp.asarray(values.size, jnp.float32)
    )
  kept = jnp.where(mask.astype(bool), values, jnp.float32(0))
  return Metric(total=kept.sum(), count=mask.astype(jnp.float32).sum())


def scalar(value: Array | float) -> Metric:
  """One number, such as a coefficient or a norm; averaged over steps."""
  return Metric(
      total=jnp.asarray(value, jnp.float32), count=jnp.ones((), jnp.float32)
  )


def combine(metrics: Metrics) -> Metrics:
  """Sums each metric over a leading axis, as `lax.scan` stacks it."""
  return jax.tree.map(lambda x: x.sum(axis=0), metrics)


def add(a: Metrics, b: Metrics) -> Metrics:
  """Adds two sets of metrics; a name that only one has is kept."""
  both = {
      name: jax.tree.map(lambda x, y: x + y, a[name], b[name])
      for name in a.keys() & b.keys()
  }
  return {**a, **b, **both}


def compute(metrics: Mapping[str, Metric]) -> dict[str, float]:
  """Divides, on the host. A metric that nothing was counted in is left out."""
  host = jax.device_get(dict(metrics))
  return {
      name: float(np.float32(m.total) / np.float32(m.count))
      for name, m in sorted(host.items())
      if m.count > 0
  }
