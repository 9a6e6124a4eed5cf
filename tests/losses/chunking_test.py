import functools

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax import device_mesh
from rlhf_jax.losses import chunking, kl, masking
from rlhf_jax.losses import language_modeling as lm
from tests.losses import ragged
from tests.reference import losses as reference

B, N, D, V = ragged.BATCH, ragged.LENGTH, 3, 6


def _draw(seed, *shape):
  rng = np.random.default_rng(seed)
  return jnp.asarray(rng.normal(size=shape), jnp.float32)


def _measure(kernels, hidden, ref_hidden, ids):
  logits, ref_logits = (
      x @ kernel for x, kernel in zip((hidden, ref_hidden), kernels)
  )
  return (
      lm.selected_logprobs(logits, ids, temperature=0.7),
      lm.entropy(logits),
      kl.kl_exact(logits, ref_logits),
      lm.cross_entropy_loss(logits, ids, z_loss_coef=0.1),
  )


@functools.partial(jax.jit, static_argnames="chunk_size")
def _total(params, hiddens, ids, mask, weights, chunk_size):
  """(a sum in which every number has its own weight, the numbers)."""
  out = chunking.map_positions(
      functools.partial(_measure, params),
      (*hiddens, ids),
      mask,
      chunk_size=chunk_size,
  )
  return sum((w * x).sum() for w, x in zip(weights, out)), out


def _inputs(seed):
  ids = np.random.default_rng(seed).integers(0, V, (B, N))
  return (
      (_draw(seed, D, V), _draw(seed + 1, D, V)),
      (_draw(seed + 2, B, N, D), _draw(seed + 3, B, N, D)),
      jnp.asarray(ids, jnp.int32),
  )


@hypothesis.given(
    seed=st.integers(0, 2**16),
    mask=ragged.masks(side="any"),
    chunk_size=st.sampled_from([1, 2, 3, 4, N]),
)
def test_chunks_match_a_loop_over_real_positions(seed, mask, chunk_size):
  kernels, hiddens, ids = _inputs(seed)
  _, out = _total(
      kernels, hiddens, ids, jnp.asarray(mask), _draw(0, 4, B, N), chunk_size
  )
  logits, ref_logits = (
      np.asarray(x, np.float64) @ np.asarray(kernel, np.float64)
      for x, kernel in zip(hiddens, kernels)
  )
  for row, column in np.ndindex(B, N):
    actual = [float(x[row, column]) for x in out]
    if not mask[row, column]:
      assert actual == [0.0] * 4
      continue
    x, y = logits[row, column], ref_logits[row, column]
    token = int(ids[row, column])
    expected = [
        reference.log_softmax(x / 0.7)[token],
        reference.entropy(x),
        reference.kl_exact(x, y),
        0.1 * reference.log_normalizer(x) ** 2
        - reference.log_softmax(x)[token],
    ]
    np.testing.assert_allclose(actual, expected, atol=2e-5)


@hypothesis.given(
    seed=st.integers(0, 2**16),
    mask=ragged.masks(side="any"),
    chunk_size=st.sampled_from([1, 2, 3]),
)
def test_gradients_are_those_of_all_positions_at_once(seed, mask, chunk_size):
  kernels, hiddens, ids = _inputs(seed)
  mask, weights = jnp.asarray(mask), _draw(seed + 4, 4, B, N)

  def whole(kernels, hiddens):
    out = _measure(kernels, *hiddens, ids)
    return sum(
        (w * masking.zero_masked(x, mask)).sum() for w, x in zip(weights, out)
    )

  chunked = lambda kernels, hiddens: _total(
      kernels, hiddens, ids, mask, weights, chunk_size
  )[0]
  wanted = jax.grad(whole, (0, 1))(kernels, hiddens)
  actual = jax.grad(chunked, (0, 1))(kernels, hiddens)
  jax.tree.map(
      functools.partial(np.testing.assert_allclose, atol=5e-5), actual, wanted
  )


def test_chunks_without_a_real_position_are_passed_over():
  calls = []

  def count(x):
    jax.debug.callback(lambda: calls.append(1))
    return x

  x = jnp.ones((2, 8))
  # Three at most in a row, wherever they are: two chunks of the four.
  mask = jnp.array([[1, 0, 0, 1, 0, 0, 0, 1], [0, 0, 0, 0, 0, 0, 1, 0]])
  out = jax.jit(
      lambda x: chunking.map_positions(count, (x,), mask, chunk_size=2)
  )(x)
  jax.effects_barrier()
  np.testing.assert_array_equal(out, mask)
  assert len(calls) == 2


def test_devices_change_nothing_and_gather_no_rows():
  rows, positions = 16, 20
  mask = np.random.default_rng(0).random((rows, positions)) < 0.3
  ids = np.random.default_rng(1).integers(0, V, (rows, positions))
  batch = (
      _draw(0, rows, positions, D),
      jnp.asarray(ids, jnp.int32),
      jnp.asarray(mask, jnp.int32),
  )

  @jax.jit
  @functools.partial(jax.value_and_grad, argnums=(0, 1))
  def loss(kernel, hidden, ids, mask):
    measure = lambda hidden, ids: lm.cross_entropy_loss(hidden @ kernel, ids)
    return chunking.map_positions(
        measure, (hidden, ids), mask, chunk_size=7
    ).sum()

  kernel = _draw(2, D, V)
  mesh = device_mesh.make_mesh(device_mesh.MeshConfig(data=8))
  args = (
      device_mesh.replicate(kernel, mesh),
      *device_mesh.shard_rows(batch, mesh),
  )
  compiled = loss.lower(*args).compile()
  jax.tree.map(
      functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-5),
      compiled(*args),
      loss(kernel, *batch),
  )
  assert "all-gather" not in compiled.as_text()


@pytest.mark.parametrize("chunk_size", [16, 64])
def test_the_logits_of_a_large_vocabulary_never_exist(chunk_size):
  rows, positions, width, vocabulary = 2, 256, 8, 128 * 1024
  kernel = jax.ShapeDtypeStruct((width, vocabulary), jnp.float32)
  hidden = jax.ShapeDtypeStruct((rows, positions, width), jnp.float32)
  ids = jax.ShapeDtypeStruct((rows, positions), jnp.int32)
  logits_bytes = rows * positions * vocabulary * 4

  def loss(kernel, hidden, ids, size):
    def measure(hidden, ids):
      logits = hidden @ kernel
      return lm.cross_entropy_loss(logits, ids), lm.entropy(logits)

    out = chunking.map_positions(
        measure, (hidden, ids), jnp.ones_like(ids), chunk_size=size
    )
    return sum(x.sum() for x in out)

  def compile(size):
    grad = jax.jit(jax.grad(functools.partial(loss, size=size), (0, 1)))
    return grad.lower(kernel, hidden, ids).compile()

  whole, chunked = compile(positions), compile(chunk_size)
  temporary = lambda x: x.memory_analysis().temp_size_in_bytes
  assert temporary(whole) > logits_bytes
  # A chunk's share of what the whole takes, and the gradient of the kernel.
  share = chunk_size / positions
  kernel_bytes = width * vocabulary * 4
  assert temporary(chunked) < share * temporary(whole) + 4 * kernel_bytes
  assert f"[{rows},{positions},{vocabulary}]" in whole.as_text()
  assert f"[{rows},{positions},{vocabulary}]" not in chunked.as_text()
