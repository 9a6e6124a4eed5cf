import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from rlhf_jax import metrics as metrics_lib
from rlhf_jax import optim
from rlhf_jax.train_state import create_train_state
from rlhf_jax.updates import gradient
from tests.updates.small import assert_trees_close, assert_trees_equal

ROWS = 12


def _objective(params, batch):
  """A weighted squared error, divided by the whole batch's weight."""
  error = batch["x"] @ params["layer"]["kernel"] + params["bias"] - batch["y"]
  loss = batch["weight"] * jnp.square(error)
  metrics = {
      "loss": metrics_lib.Metric(total=loss.sum(), count=batch["weight"].sum())
  }
  return loss.sum() / batch["total"].sum() * ROWS, metrics


def _params():
  kernel = np.random.default_rng(1).normal(size=(3,))
  return {
      "layer": {"kernel": jnp.asarray(kernel, jnp.float32)},
      "bias": jnp.zeros((), jnp.float32),
  }


def _batch():
  rng = np.random.default_rng(0)
  draw = lambda *shape: jnp.asarray(rng.normal(size=shape), jnp.float32)
  weight = jnp.asarray(rng.integers(0, 4, ROWS), jnp.float32)
  return {
      "x": draw(ROWS, 3),
      "y": draw(ROWS),
      "weight": weight,
      # In every row, so that each microbatch can divide by the whole.
      "total": jnp.full((ROWS,), weight.sum()),
  }


def _share(params, batch):
  loss, metrics = _objective(params, batch)
  rows = jnp.float32(batch["y"].shape[0])
  return loss * rows / ROWS, metrics


accumulate = jax.jit(
    gradient.accumulate_gradients, static_argnums=(0, 3)
)


@pytest.mark.parametrize("num_parts", [2, 4, 12])
def test_microbatches_change_neither_gradients_nor_metrics(num_parts):
  grads, metrics = accumulate(_share, _params(), _batch(), 1)
  parts, part_metrics = accumulate(_share, _params(), _batch(), num_parts)
  assert_trees_close(parts, grads, atol=1e-6)
  assert_trees_close(
      metrics_lib.compute(part_metrics),
      metrics_lib.compute(metrics),
      atol=1e-6,
  )


def test_split_rows_deals_rows_out_in_turn_and_join_rows_undoes_it():
  batch = {"a": jnp.arange(12), "b": jnp.arange(24).reshape(12, 2)}
  parts = gradient.split_rows(batch, 3)
  np.testing.assert_array_equal(parts["a"][1], [1, 4, 7, 10])
  assert parts["b"].shape == (3, 4, 2)
  assert_trees_equal(gradient.join_rows(parts), batch)


def test_rows_that_do_not_divide_are_an_error_that_names_the_numbers():
  with pytest.raises(ValueError, match="12 rows does not divide into 5 parts"):
    gradient.split_rows({"a": jnp.arange(12)}, 5)


@pytest.mark.parametrize("num_parts", [1, 3])
def test_mapping_over_microbatches_keeps_rows_in_their_order(num_parts):
  batch = {"a": jnp.arange(12), "b": jnp.arange(24).reshape(12, 2)}
  out = gradient.map_microbatches(
      lambda part: part["a"][:, None] + part["b"], batch, num_parts
  )
  np.testing.assert_array_equal(out, batch["a"][:, None] + batch["b"])


TX = optim.make_optimizer(
    optim.OptimizerConfig(
        learning_rate=0.1, schedule="linear", weight_decay=0.1
    ),
    num_steps=10,
)


@jax.jit
def _step(state, batch):
  grads, metrics = gradient.accumulate_gradients(
      _share, state.params, batch, 2
  )
  return gradient.apply_gradients(state, grads, metrics, TX)


def test_nan_step_is_not_applied_bitwise_but_counts():
  state = create_train_state(_params(), TX, jax.random.key(0))
  state, metrics = _step(state, _batch())
  assert metrics_lib.compute(metrics)["optimizer/grad_norm"] > 0
  bad = _batch() | {"y": _batch()["y"].at[5].set(jnp.nan)}
  after, metrics = _step(state, bad)
  after, metrics = _step(after, bad)
  assert_trees_equal(after.params, state.params)
  assert_trees_equal(after.opt_state, state.opt_state)
  assert (int(after.step), int(after.skipped_steps)) == (3, 2)
  assert float(metrics["nonfinite/loss"].total) == 1
  # A step that was not applied has no norm: it must not hide the others'.
  assert "optimizer/grad_norm" not in metrics_lib.compute(metrics)
  good, metrics = _step(after, _batch())
  assert (int(good.step), int(good.skipped_steps)) == (4, 0)
  assert float(metrics["nonfinite/loss"].total) == 0
  # It is the step that would have been taken without the bad batches.
  expected, _ = _step(state, _batch())
  assert_trees_equal(good.params, expected.params)
  assert_trees_equal(good.opt_state, expected.opt_state)


def test_nonfinite_metric_names_the_tensor_of_a_finite_loss():
  def objective(params, batch):
    # The root's derivative is infinite at 0, its value is not.
    value = jnp.sqrt(params["layer"]["kernel"]).sum() + params["bias"]
    return value * batch.sum(), {}

  params = {
      "layer": {"kernel": jnp.asarray([1.0, 0.0], jnp.float32)},
      "bias": jnp.ones((), jnp.float32),
  }
  tx = optax.sgd(0.1)
  state = create_train_state(params, tx, jax.random.key(0))
  grads, metrics = gradient.accumulate_gradients(
      objective, params, jnp.ones((2,), jnp.float32), 1
  )
  after, metrics = gradient.apply_gradients(state, grads, metrics, tx)
  flags = {
      name: float(metric.total)
      for name, metric in metrics.items()
      if name.startswith(gradient.NONFINITE)
  }
  assert flags == {
      "nonfinite/loss": 0,
      "nonfinite/layer/kernel": 1,
      "nonfinite/bias": 0,
      "nonfinite/update": 0,
      "nonfinite/steps": 1,
  }
  assert_trees_equal(after.params, params)


@pytest.mark.parametrize("learning_rate, bias", [
    (np.inf, 1.0),
    (np.inf, 0.0),
    (3e38, -3e38),  # the sum overflows, no factor of it is infinite
])
def test_an_update_that_is_not_finite_is_not_applied(learning_rate, bias):
  tx = optax.sgd(learning_rate, momentum=0.9)
  params = {"bias": jnp.asarray(bias, jnp.float32)}
  state = create_train_state(params, tx, jax.random.key(0))
  grads, metrics = gradient.accumulate_gradients(
      lambda params, batch: (params["bias"] * batch.sum(), {}),
      params,
      jnp.ones((1,), jnp.float32),
      1,
  )
  after, metrics = gradient.apply_gradients(state, grads, metrics, tx)
  assert_trees_equal(after.params, params)
  assert_trees_equal(after.opt_state, state.opt_state)
  assert (int(after.step), int(after.skipped_steps)) == (1, 1)
  flags = {name: float(metric.total) for name, metric in metrics.items()}
  assert flags["nonfinite/update"] == flags["nonfinite/steps"] == 1
  assert flags["nonfinite/loss"] == flags["nonfinite/bias"] == 0
  assert "optimizer/grad_norm" not in metrics_lib.compute(metrics)


def test_infinite_loss_with_finite_gradients_is_not_applied():
  def objective(params, batch):
    constant = jax.lax.stop_gradient(jnp.log(batch.min()))
    return params["bias"] - constant, {}

  params = {"bias": jnp.ones((), jnp.float32)}
  tx = optax.sgd(0.1)
  state = create_train_state(params, tx, jax.random.key(0))
  grads, metrics = gradient.accumulate_gradients(
      objective, params, jnp.zeros((2,), jnp.float32), 1
  )
  after, _ = gradient.apply_gradients(state, grads, metrics, tx)
  assert float(after.params["bias"]) == 1
  assert int(after.skipped_steps) == 1


def test_bfloat16_params_have_a_float32_optimizer():
  """The second moment of a constant gradient tends to its square."""
  params = {"w": jnp.ones((4,), jnp.bfloat16)}
  tx = optim.make_optimizer(optim.OptimizerConfig(learning_rate=1e-2), 3000)
  state = create_train_state(params, tx, jax.random.key(0))
  assert all(
      x.dtype == jnp.float32
      for x in jax.tree.leaves(state.opt_state)
      if jnp.issubdtype(x.dtype, jnp.floating)
  )

  def objective(params, batch):
    return (params["w"][None] * batch).sum().astype(jnp.float32), {}

  @jax.jit
  def run(state):
    def step(state, _):
      grads, metrics = gradient.accumulate_gradients(
          objective, state.params, jnp.full((6, 4), 0.1, jnp.bfloat16), 3
      )
      return gradient.apply_gradients(state, grads, metrics, tx)[0], None

    return jax.lax.scan(step, state, length=3000)[0]

  state = run(state)
  assert state.params["w"].dtype == jnp.bfloat16
  assert float(state.params["w"][0]) < 0
  second = [
      leaf
      for path, leaf in jax.tree_util.tree_leaves_with_path(state.opt_state)
      if "nu" in jax.tree_util.keystr(path)
  ]
  # The gradient of six rows of 0.1, clipped to a norm of 1 over four weights.
  np.testing.assert_allclose(second[0], 0.25 * (1 - 0.999**3000), rtol=1e-3)
