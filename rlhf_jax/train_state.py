"""The state of a supervised stage: everything that decides its next step."""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int
import optax

from rlhf_jax.types import pytree_dataclass


@pytree_dataclass
class TrainState:
  """What one checkpoint holds.

  step: optimizer steps taken or skipped, so also how far the data has moved.
  skipped_steps: steps in a row that were not applied because a loss or a
    gradient was not finite.
  rng: the stage's base key; step k uses `fold_in(rng, k)`, so nothing else
    about randomness needs saving.
  """

  step: Int[Array, ""]
  skipped_steps: Int[Array, ""]
  params: Any
  opt_state: optax.OptState
  rng: jax.Array


def to_float32(tree: Any) -> Any:
  """Every array of the tree as float32."""
  return jax.tree.map(lambda x: x.astype(jnp.float32), tree)


def create_train_state(
    params: Any, tx: optax.GradientTransformation, rng: jax.Array
) -> TrainState:
  """A state at step 0 for `params` as they are (no copy is made).

  The optimizer's state is float32 whatever the params are.
  """
  return TrainState(
      step=jnp.zeros((), jnp.int32),
      skipped_steps=jnp.zeros((), jnp.int32),
      params=params,
      opt_state=tx.init(to_float32(params)),
      rng=rng,
  )
