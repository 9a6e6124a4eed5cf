"""The compiled programs of one PPO iteration, before any of them has run.

They depend on shapes, rules and coefficients alone, so that a plan compiles
the very programs that a run will run.
"""

from collections.abc import Callable
import dataclasses
from typing import Any

import jax
import optax

from experiments.harness.devices import PPOSharding
from experiments.harness.parallelism import Parallelism, compile_step
from rlhf_jax import device_mesh, sharding
from rlhf_jax.models import functions
from rlhf_jax.models.transformer import TransformerConfig
from rlhf_jax.updates import ppo


@dataclasses.dataclass(frozen=True)
class Programs:
  """Jitted, so that each can be called, or lowered for shapes.

  rollout: (state, prompt batch, sampling, frozen, ahead) -> Rollout, of the
    iteration that comes `ahead` after the state's.
  score: (params, ref_params, rollout, score, kl_coef, cfg, ref_hidden=None) ->
    (scored, metrics)
  update: (state, scored, ptx, cfg, frozen) -> (state, metrics); the state is
    donated.
  """

  rollout: Callable[..., Any]
  score: Callable[..., Any]
  update: Callable[..., Any]


def state_rules(rules: PPOSharding) -> dict[str, sharding.Rules]:
  """Those of the two models that PPO's state holds."""
  return {name: rules.rules_of(name) for name in ("policy", "value")}


def make_programs(
    policy_config: TransformerConfig,
    ref_config: TransformerConfig,
    value_config: TransformerConfig | None,
    tx: optax.GradientTransformation,
    state: ppo.PPOState,
    mesh: jax.sharding.Mesh,
    rules: PPOSharding,
    parallelism: Parallelism,
    generate: Callable[..., Any],
) -> Programs:
  """The three programs of an iteration.

  Sampling has no sums over rows: it is split by jit whatever the parallelism.

  Args:
    value_config: None where the value network shares the policy's trunk.
    state: or its shapes.
    generate: what samples, see `decode.make_generate`.
  """
  model = functions.make_policy_value(policy_config, value_config)
  ref_model = functions.make_language_model(ref_config)
  rows = device_mesh.rows(mesh)
  places = sharding.shardings_of(state, state_rules(rules), mesh)
  return Programs(
      rollout=jax.jit(make_rollout(generate), out_shardings=rows),
      score=compile_step(
          ppo.make_score_rollout(model, ref_model),
          parallelism,
          mesh,
          # The rollout, its score, and what the reference made of it.
          rows=(2, 3, 6),
          gives_rows=True,
          out_shardings=(rows, None),
      ),
      update=compile_step(
          ppo.make_ppo_update(model, tx),
          parallelism,
          mesh,
          rows=(1, 2),
          donate=(0,),
          out_shardings=(
              # Of a rollout, if there is one.
              dataclasses.replace(places, pending=rows),
              None,
          ),
      ),
  )


def make_rollout(generate: Callable[..., Any]) -> Callable[..., Any]:
  """Returns the rollout of `Programs`, before it is compiled."""

  def rollout(state, batch, sampling, frozen, ahead=0):
    rng = jax.random.fold_in(ppo.iteration_rng(state, ahead), 0)
    params = frozen | state.train.params["policy"]
    return generate(params, batch.prompts, batch.prompt_mask, rng, sampling)

  return rollout
