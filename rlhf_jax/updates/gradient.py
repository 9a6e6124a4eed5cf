"""What every update shares: exact accumulation and the guard against NaN.

Accumulation is exact because an objective divides by a count that was taken
over the whole batch before it was split: each microbatch's scalar is its share
of the total, so the sum over microbatches is the same number however many there
are. `num_microbatches` changes memory and nothing else. Sums, optimizer state
and the step itself are float32 whatever the params are: bfloat16 has 8 bits, in
which a moving average with b2 = 0.999 does not move.

With `jax.pmap` a device accumulates its own rows' share, and the shares are
summed over the devices here, once, whatever the algorithm (`collectives.py`).
"""

from collections.abc import Callable
import math
from typing import Any

import jax
import jax.numpy as jnp
import optax

from rlhf_jax import collectives
from rlhf_jax import metrics as metrics_lib
from rlhf_jax.metrics import Metrics
from rlhf_jax.train_state import TrainState, to_float32

# (params, microbatch) -> (the microbatch's share of the loss, metrics)
Objective = Callable[[Any, Any], tuple[jax.Array, Metrics]]

NONFINITE = "nonfinite/"
NONFINITE_STEPS = NONFINITE + "steps"


def split_rows(batch: Any, num_parts: int) -> Any:
  """[B, ...] -> [num_parts, B / num_parts, ...], row r going to part r mod n.

  Interleaved, so that with rows sharded over devices every part is spread over
  all of them.

  Raises:
    ValueError: if the rows do not divide into the parts.
  """

  def split(x):
    rows = x.shape[0]
    if rows % num_parts:
      raise ValueError(
          f"a batch of {rows} rows does not divide into {num_parts} parts"
      )
    return x.reshape(rows // num_parts, num_parts, *x.shape[1:]).swapaxes(0, 1)

  return jax.tree.map(split, batch)


def join_rows(parts: Any) -> Any:
  """The inverse of `split_rows`: [num_parts, N, ...] -> [B, ...]."""
  return jax.tree.map(
      lambda x: x.swapaxes(0, 1).reshape(-1, *x.shape[2:]), parts
  )


def map_microbatches(
    fn: Callable[[Any], Any], batch: Any, num_microbatches: int
) -> Any:
  """`fn(batch)` in `num_microbatches` turns, so that less is alive at once.

  `fn` maps rows to rows: arrays of leading axis B to arrays of leading axis B.
  """
  if num_microbatches == 1:
    return fn(batch)
  return join_rows(jax.lax.map(fn, split_rows(batch, num_microbatches)))


def dropout_rngs(
    frozen: dict[str, Any], state: TrainState, shape: tuple[int, ...]
) -> dict[str, Any]:
  """{"row_rngs": keys of `shape`} for this step, {} where nothing drops out.

  A key is that of the step and of the row's number in the whole batch, so that
  microbatches and devices change no mask. They go through `split_rows` beside
  the batch.

  Args:
    frozen: with "adapter_dropout" or without; see `models/lora.py`.
  """
  if "adapter_dropout" not in frozen:
    return {}
  rng = jax.random.fold_in(state.rng, state.step)
  fold = jax.vmap(jax.random.fold_in, (None, 0))
  rows = jnp.arange(collectives.num_devices() * math.prod(shape))
  rngs = fold(rng, collectives.own_rows(rows))
  # A key of the older kind is two numbers.
  return {"row_rngs": rngs.reshape(*shape, *rngs.shape[1:])}


def accumulate_gradients(
    objective: Objective, params: Any, batch: Any, num_microbatches: int
) -> tuple[Any, Metrics]:
  """Float32 gradients and metrics of `objective`, summed over microbatches.

  And over the devices, where each has rows of its own.

  Metrics gain 'nonfinite/loss', 1 where the summed loss is NaN or infinite.
  """
  grad_fn = jax.value_and_grad(objective, has_aux=True)
  if num_microbatches == 1:
    (loss, metrics), grads = grad_fn(params, batch)
  else:

    def body(total, microbatch):
      (loss, metrics), grads = grad_fn(params, microbatch)
      return jax.tree.map(jnp.add, total, (loss, to_float32(grads))), metrics

    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, jnp.float32), params)
    (loss, grads), metrics = jax.lax.scan(
        body,
        (jnp.zeros((), jnp.float32), zeros),
        split_rows(batch, num_microbatches),
    )
    metrics = metrics_lib.combine(metrics)
  loss, grads, metrics = collectives.sum_over_devices(
      (loss, to_float32(grads), metrics)
  )
  bad = (~jnp.isfinite(loss)).astype(jnp.float32)
  metrics = {**metrics, NONFINITE + "loss": metrics_lib.scalar(bad)}
  return grads, metrics


def apply_gradients(
    state: TrainState,
    grads: Any,
    metrics: Metrics,
    tx: optax.GradientTransformation,
) -> tuple[TrainState, Metrics]:
  """One optimizer step, or none where something in it is not finite.

  That is the loss, a gradient, or the params that it would lead to. A step that
  is not applied leaves params and optimizer state bitwise as they were and adds
  one to `skipped_steps`; `step` advances either way, because the data has.

  Metrics gain 'nonfinite/<parameter path>' (1 where that gradient is not
  finite), 'nonfinite/update' (1 where all these are, the new params not),
  'nonfinite/steps' (1 where the step was not applied, for whatever reason) and
  'optimizer/grad_norm', before clipping.
  """
  bad_leaves = {
      NONFINITE + jax.tree_util.keystr(path, simple=True, separator="/"): (
          ~jnp.isfinite(grad).all()
      )
      for path, grad in jax.tree_util.tree_leaves_with_path(grads)
  }
  bad = jnp.stack(list(bad_leaves.values())).any()
  bad |= metrics[NONFINITE + "loss"].total > 0
  wide = to_float32(state.params)
  updates, opt_state = tx.update(grads, state.opt_state, wide)
  params = jax.tree.map(
      lambda old, new: new.astype(old.dtype),
      state.params,
      optax.apply_updates(wide, updates),
  )
  finite = jnp.stack([jnp.isfinite(x).all() for x in jax.tree.leaves(params)])
  # After a bad gradient the params say nothing new.
  bad_update = ~bad & ~finite.all()
  bad |= bad_update
  flags = bad_leaves | {NONFINITE + "update": bad_update, NONFINITE_STEPS: bad}
  keep = lambda old, new: jnp.where(bad, old, new)
  grad_norm = optax.tree.norm(grads)
  metrics = metrics | {
      name: metrics_lib.scalar(flag.astype(jnp.float32))
      for name, flag in flags.items()
  }
  # The mean over the steps that were applied: one NaN must not hide the rest.
  applied = 1 - bad.astype(jnp.float32)
  metrics["optimizer/grad_norm"] = metrics_lib.Metric(
      total=jnp.where(bad, jnp.float32(0), grad_norm), count=applied
  )
  return (
      TrainState(
          step=state.step + 1,
          skipped_steps=jnp.where(bad, state.skipped_steps + 1, 0),
          params=jax.tree.map(keep, state.params, params),
          opt_state=jax.tree.map(keep, state.opt_state, opt_state),
          rng=state.rng,
      ),
      metrics,
  )
