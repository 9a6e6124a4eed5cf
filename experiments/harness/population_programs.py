"""The programs of PPO's iteration for many runs at once, by `jax.vmap`.

Those of `ppo_programs.py` over a leading axis N of members. State, batch and
coefficients are stacked; reference policy and base of adapters are there once.

What vmap makes otherwise of a program: the loop of a rollout goes on until the
last completion of all members has ended, and each `cond` computes both sides.
So an update that `max_update_kl` cuts short takes the time of a whole one.
"""

from collections.abc import Callable
import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec
import numpy as np
import optax

from experiments.harness import ppo_programs
from rlhf_jax import collectives, device_mesh
from rlhf_jax.models import functions
from rlhf_jax.models.transformer import TransformerConfig
from rlhf_jax.updates import ppo


@dataclasses.dataclass(frozen=True)
class Programs:
  """Jitted; [N, ...] is stacked.

  rollout: (state, prompt batch, sampling, frozen) -> Rollout, all but frozen
    stacked.
  flat: rows of all members, [N, B, ...] -> [N * B, ...].
  score: (frozen, params, ref_params, rollout, score, kl_coef, cfg) -> (scored,
    metrics), all but frozen and ref_params stacked.
  update: (state, scored, ptx, cfg, frozen) -> (state, metrics), all but frozen
    stacked; the state is donated.
  sample: (frozen, params, prompts, prompt_mask, rng, sampling, rows) ->
    Rollout, of an evaluation; all but frozen and sampling stacked.
  """

  rollout: Callable[..., Any]
  flat: Callable[..., Any]
  score: Callable[..., Any]
  update: Callable[..., Any]
  sample: Callable[..., Any]


def stack(trees: list[Any]) -> Any:
  """Arrays, numbers and keys of trees alike, each on a leading axis."""

  def leaves(*xs):
    if isinstance(xs[0], float):
      return jnp.asarray(xs, jnp.float32)
    own = np if isinstance(xs[0], np.ndarray) else jnp
    return own.stack(xs)

  return jax.tree.map(leaves, *trees)


def member(tree: Any, i: int) -> Any:
  """One member's part of what is stacked."""
  return jax.tree.map(lambda x: x[i], tree)


def member_rows(mesh: Mesh) -> NamedSharding:
  """[N, B, ...]: the rows of every member split over the mesh's row axes."""
  return NamedSharding(mesh, PartitionSpec(None, device_mesh.ROWS))


def make_programs(
    policy_config: TransformerConfig,
    ref_config: TransformerConfig,
    value_config: TransformerConfig | None,
    tx: optax.GradientTransformation,
    mesh: Mesh,
    generate: Callable[..., Any],
) -> Programs:
  """The programs of members that have these shapes.

  Args:
    value_config: None where the value network shares the policy's trunk.
    tx: any member's; what they differ in is in its state.
    generate: what samples, see `decode.make_generate`.
  """
  model = functions.make_policy_value(policy_config, value_config)
  score_rollout = ppo.make_score_rollout(
      model, functions.make_language_model(ref_config)
  )

  def score(frozen, params, *args):
    return score_rollout(frozen | params, *args)

  def sample(frozen, params, *args):
    return generate(frozen | params, *args)

  def each(program, in_axes):
    return jax.vmap(program, in_axes, axis_name=collectives.MEMBERS)

  rows, whole = member_rows(mesh), NamedSharding(mesh, PartitionSpec())
  return Programs(
      rollout=jax.jit(
          each(ppo_programs.make_rollout(generate), (0, 0, 0, None)),
          out_shardings=rows,
      ),
      flat=jax.jit(
          lambda tree: jax.tree.map(
              lambda x: x.reshape(-1, *x.shape[2:]), tree
          ),
          out_shardings=device_mesh.rows(mesh),
      ),
      score=jax.jit(
          each(score, (None, 0, None, 0, 0, 0, 0)),
          out_shardings=(rows, None),
      ),
      update=jax.jit(
          each(ppo.make_ppo_update(model, tx), (0, 0, 0, 0, None)),
          donate_argnums=0,
          out_shardings=(whole, None),
      ),
      sample=jax.jit(each(sample, (None, 0, 0, 0, 0, None, 0))),
  )
