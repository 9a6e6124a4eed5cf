"""Sums and rows over devices that each run a program on their own rows."""

import functools

import hypothesis
from hypothesis import strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax import collectives
from rlhf_jax.losses import masking

NUM, ROWS, WIDTH = 8, 3, 4


pmap = functools.partial(jax.pmap, axis_name=collectives.AXIS)


def test_without_pmap_nothing_is_computed():
  x = jnp.arange(6.0).reshape(3, 2)

  def fn(x):
    x = collectives.own_rows(collectives.gather_rows(x))
    x = collectives.sum_over_devices({"x": x})["x"]
    return x * collectives.num_devices()

  plain = jax.make_jaxpr(lambda x: x * 1)(x)
  assert str(jax.make_jaxpr(fn)(x)) == str(plain)
  # Nor where an axis of another name is mapped, or split by a mesh.
  np.testing.assert_array_equal(jax.vmap(fn, axis_name="other")(x), x)
  with jax.set_mesh(jax.make_mesh((8,), (collectives.AXIS,))):
    np.testing.assert_array_equal(jax.jit(fn)(x), x)


def test_any_member_is_of_all_runs_side_by_side_and_of_a_lone_one_its_own():
  flags = jnp.asarray([False, True, False])
  of = functools.partial(jax.vmap, axis_name=collectives.MEMBERS)
  np.testing.assert_array_equal(of(collectives.any_member)(flags), [True] * 3)
  assert not of(collectives.any_member)(jnp.zeros(3, bool)).any()
  for flag in flags:
    assert collectives.any_member(flag) == flag
  np.testing.assert_array_equal(jax.vmap(collectives.any_member)(flags), flags)


def test_every_device_has_the_sum():
  tree = {"a": jnp.arange(8.0), "b": (jnp.ones((8, 2)),)}
  total = pmap(collectives.sum_over_devices)(tree)
  np.testing.assert_array_equal(total["a"], np.full(8, 28.0))
  np.testing.assert_array_equal(total["b"][0], np.full((8, 2), 8.0))


def test_gathered_rows_stand_in_the_order_of_the_devices():
  rows = {
      "ids": jnp.arange(NUM * ROWS).reshape(NUM, ROWS),
      "flags": jnp.arange(NUM * ROWS).reshape(NUM, ROWS) % 3 == 0,
  }

  def fn(tree):
    whole = collectives.gather_rows(tree)
    return whole, collectives.own_rows(whole)

  whole, own = pmap(fn)(rows)
  for name, x in rows.items():
    np.testing.assert_array_equal(whole[name][5], x.reshape(-1))
    np.testing.assert_array_equal(own[name], x)
  assert own["flags"].dtype == bool


def test_rows_that_do_not_divide_are_an_error():
  with pytest.raises(ValueError, match="12 rows do not divide over 8 devices"):
    pmap(lambda _: collectives.own_rows(jnp.arange(12)))(jnp.zeros(8))


def _moments(x, mask):
  return (
      masking.masked_mean(x, mask),
      masking.masked_var(x, mask),
      masking.masked_whiten(x, mask),
      # Of each row: no other device's business.
      masking.masked_mean(x, mask, axis=1),
      masking.masked_sum(x, mask),
  )


whole_moments, own_moments = jax.jit(_moments), pmap(_moments)


@hypothesis.given(
    seed=st.integers(0, 2**32 - 1),
    # How many entries of a device are real, on average: also none at all.
    density=st.lists(st.sampled_from([0.0, 0.3, 1.0]), min_size=8, max_size=8),
    offset=st.sampled_from([0.0, 5.0]),
)
def test_masked_moments_are_those_of_the_whole_batch(seed, density, offset):
  rng = np.random.default_rng(seed)
  shape = (NUM, ROWS, WIDTH)
  mask = rng.random(shape) < np.asarray(density)[:, None, None]
  x = np.where(mask, rng.normal(size=shape) + offset, np.nan)
  x, mask = jnp.asarray(x, jnp.float32), jnp.asarray(mask)
  join = lambda x: x.reshape(-1, WIDTH)
  mean, var, whitened, row_means, total = whole_moments(join(x), join(mask))
  own = own_moments(x, mask)
  close = functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-5)
  close(own[0], np.full(NUM, mean))
  close(own[1], np.full(NUM, var))
  # A single real entry has variance 0: whitened, its rounding is divided by
  # 1e-4.
  if mask.sum() != 1:
    close(join(own[2]), whitened, atol=1e-4)
  close(own[3].reshape(-1), row_means)
  close(own[4].sum(), total)
