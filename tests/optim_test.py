import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from rlhf_jax import optim
from rlhf_jax.models.heads import ScalarModel
from tests.models.small import GPT2, random_params, small_config

B1, B2 = 0.9, 0.999


def _gradients(num_steps=6):
  rng = np.random.default_rng(0)
  scale = 10.0 ** rng.integers(-3, 3, (num_steps, 4))
  return rng.normal(size=(num_steps, 4)) * scale


def _run(tx, gradients):
  """The updates of each step, [num_steps, 4]."""
  params = {"kernel": jnp.zeros((4,), jnp.float32)}
  state = tx.init(params)
  update = jax.jit(tx.update)
  out = []
  for g in gradients:
    grads = {"kernel": jnp.asarray(g, jnp.float32)}
    # optax's own Adam mixes dtypes.
    with jax.numpy_dtype_promotion("standard"):
      updates, state = update(grads, state, params)
    out.append(np.asarray(updates["kernel"]))
  return np.stack(out)


def test_tf_adam_matches_a_numpy_loop():
  epsilon = 0.01
  m, v, expected = np.zeros(4), np.zeros(4), []
  for t, g in enumerate(_gradients(), start=1):
    m = B1 * m + (1 - B1) * g
    v = B2 * v + (1 - B2) * g**2
    rate = np.sqrt(1 - B2**t) / (1 - B1**t)
    expected.append(rate * m / (np.sqrt(v) + epsilon))
  actual = _run(optim.scale_by_tf_adam(B1, B2, epsilon), _gradients())
  np.testing.assert_allclose(actual, np.stack(expected), rtol=2e-4)


def test_tf_adam_equals_optax_adam_as_epsilon_vanishes():
  tiny = 1e-12
  np.testing.assert_allclose(
      _run(optim.scale_by_tf_adam(B1, B2, tiny), _gradients()),
      _run(optax.scale_by_adam(B1, B2, tiny), _gradients()),
      rtol=2e-4,
  )


def test_large_epsilon_damps_the_first_tf_step_and_not_that_of_optax():
  g = np.full((1, 4), 0.01)
  epsilon = 0.01
  ours = _run(optim.scale_by_tf_adam(B1, B2, epsilon), g)
  theirs = _run(optax.scale_by_adam(B1, B2, epsilon), g)
  # On the first step m_hat = g and v_hat = g^2.
  np.testing.assert_allclose(theirs, 0.01 / (0.01 + epsilon), rtol=2e-4)
  np.testing.assert_allclose(
      ours, 0.01 / (0.01 + epsilon / np.sqrt(1 - B2)), rtol=2e-4
  )


def _shape(num_steps=10, **fields):
  cfg = optim.OptimizerConfig(learning_rate=1.0, **fields)
  schedule = optim.schedule_shape(cfg, num_steps)
  return [float(schedule(jnp.asarray(i))) for i in range(num_steps + 1)]


def test_constant_schedule_stays_and_warms_up():
  assert _shape() == [1.0] * 11
  np.testing.assert_allclose(
      _shape(warmup_steps=4), [0, 0.25, 0.5, 0.75, *[1] * 7]
  )


def test_linear_schedule_falls_to_the_final_fraction():
  np.testing.assert_allclose(
      _shape(schedule="linear"), np.linspace(1, 0, 11), atol=1e-6
  )
  np.testing.assert_allclose(
      _shape(schedule="linear", warmup_steps=2, final_fraction=0.2),
      [0, 0.5, *np.linspace(1, 0.2, 9)],
      atol=1e-6,
  )


def test_cosine_schedule_falls_to_the_final_fraction():
  phase = np.pi * np.arange(9) / 8
  np.testing.assert_allclose(
      _shape(schedule="cosine", warmup_steps=2, final_fraction=0.1),
      [0, 0.5, *(0.1 + 0.9 * (1 + np.cos(phase)) / 2)],
      atol=1e-6,
  )


def _apply(cfg, params, grads, num_steps=10):
  tx = optim.make_optimizer(cfg, num_steps)
  return jax.jit(tx.update)(grads, tx.init(params), params)


@pytest.mark.parametrize("variant", [{}, GPT2], ids=["llama", "gpt2"])
def test_weight_decay_is_on_kernels_and_embeddings_alone(variant):
  params = random_params(ScalarModel(small_config(**variant)))
  cfg = optim.OptimizerConfig(learning_rate=1.0, weight_decay=0.5)
  updates, _ = _apply(cfg, params, jax.tree.map(jnp.zeros_like, params))
  kinds = set()
  for path, update in jax.tree_util.tree_leaves_with_path(updates):
    name = path[-1].key
    kinds.add(name)
    param = params
    for entry in path:
      param = param[entry.key]
    decayed = name.endswith("embedding") or name == "kernel"
    # Norms and biases of stacked layers are matrices and are left alone.
    expected = -0.5 * param if decayed else jnp.zeros_like(param)
    np.testing.assert_allclose(update, expected, err_msg=str(path))
  assert {"token_embedding", "kernel", "scale", "bias"} <= kinds


@pytest.mark.parametrize("max_grad_norm, norm", [(0.5, 0.5), (np.inf, 20.0)])
def test_gradients_are_clipped_by_their_global_norm_before_adam(
    max_grad_norm, norm
):
  params = {"a": {"kernel": jnp.zeros((2,))}, "b": {"kernel": jnp.zeros((2,))}}
  grads = jax.tree.map(lambda x: x + 10.0, params)
  cfg = optim.OptimizerConfig(
      learning_rate=1.0, max_grad_norm=max_grad_norm
  )
  _, state = _apply(cfg, params, grads)
  mu = next(
      x.mu
      for x in state.inner_state
      if isinstance(x, optax.ScaleByAdamState)
  )
  np.testing.assert_allclose(optax.tree.norm(mu), 0.1 * norm, rtol=1e-5)


@pytest.mark.parametrize("placement", ["optax", "tf"])
def test_learning_rate_decay_and_clipping_are_data_and_compile_nothing(
    placement,
):
  cfg = optim.OptimizerConfig(
      learning_rate=0.5, epsilon_placement=placement, epsilon=1e-5
  )
  params = {"kernel": jnp.ones((4,), jnp.float32)}
  grads = {"kernel": jnp.asarray([1.0, -2.0, 3.0, 4.0], jnp.float32)}
  update = jax.jit(optim.make_optimizer(cfg, 10).update)

  def first(**changes):
    changed = dataclasses.replace(cfg, **changes)
    state = optim.make_optimizer(changed, 10).init(params)
    return np.asarray(update(grads, state, params)[0]["kernel"])

  plain = first()
  np.testing.assert_allclose(first(learning_rate=0.25), plain / 2, rtol=1e-6)
  np.testing.assert_allclose(
      first(weight_decay=0.1), plain - 0.05, rtol=1e-5
  )
  assert not np.array_equal(first(max_grad_norm=1e-4), plain)
  assert update._cache_size() == 1


def test_schedule_moves_with_the_steps_that_were_taken():
  cfg = optim.OptimizerConfig(learning_rate=1.0, schedule="linear")
  updates = _run(optim.make_optimizer(cfg, 4), np.ones((4, 4)))
  np.testing.assert_allclose(
      updates[:, 0], [-1, -0.75, -0.5, -0.25], rtol=1e-4
  )


@pytest.mark.parametrize("placement", ["optax", "tf"])
def test_bfloat16_parameters_keep_their_dtype(placement):
  params = {"kernel": jnp.ones((4,), jnp.bfloat16)}
  cfg = optim.OptimizerConfig(
      learning_rate=0.5,
      schedule="linear",
      weight_decay=0.1,
      epsilon_placement=placement,
  )
  tx = optim.make_optimizer(cfg, 10)
  state = tx.init(params)
  updates, after = jax.jit(tx.update)(params, state, params)
  dtypes = lambda tree: jax.tree.map(lambda x: x.dtype, tree)
  assert dtypes(after) == dtypes(state)
  assert updates["kernel"].dtype == jnp.bfloat16
