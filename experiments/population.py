"""Runs PPO many times at once: several seeds, several coefficients.

    python -m experiments.population --config=configs/population.py \
        --workdir=DIR

Every member is what `experiments.ppo` would be with its config, up to rounding:
its own prompts in their order, its own random numbers, its own coefficients.
They are one program on stacked arrays, so that a small model keeps a machine
busy that it would not by itself.

  1. Loads what is the same in all once: policy, reference policy, reward model.
  2. Stacks the members' states, and iterates with all at once.
  3. Leaves DIR/<member>/ppo as that of a lone run, but for checkpoints:
     config.json (its own), metrics.jsonl, samples.jsonl, model/, tokenizer/.
     DIR/checkpoints holds the state of all; the same command goes on from it.
"""

import dataclasses
import functools
import pathlib

import jax
from jax.sharding import NamedSharding, PartitionSpec

from experiments import ppo as lone
from experiments.harness import (
    adapters,
    cli,
    devices,
    evaluator,
    loop,
    models,
    population_iteration,
    population_programs,
    ppo_config,
    stage,
    value_network,
)
from experiments.harness.member_writer import MemberWriter
from experiments.harness.population_config import Config
from experiments.harness.reference import Reference
from rlhf_jax import optim
from rlhf_jax.updates import ppo


def run(config: Config, workdir: str) -> None:
  """Runs all members, or what is left of them."""
  # ---- models ----------------------------------------------------------------
  out = stage.Stage(workdir, config)
  if out.finished:
    return
  members = config.members()
  folders = {name: f"{name}/ppo" for name in members}
  stages = {
      name: stage.Stage(str(out.dir / folders[name]), member)
      for name, member in members.items()
  }
  shared = config.ppo
  meshes = devices.make_meshes(shared.mesh, shared.placement)
  mesh = meshes["policy"]
  whole = NamedSharding(mesh, PartitionSpec())
  policy, ref_policy, reward_model, reward_fn = lone.load_models(
      shared, meshes
  )
  reference = Reference(ref_policy)
  starts = [
      _start(member, policy, reward_model) for member in members.values()
  ]
  value_config, _, frozen = starts[0]
  frozen = jax.device_put(frozen, whole)
  state = jax.device_put(
      population_programs.stack([x for _, x, _ in starts]), whole
  )
  # What nobody else reads of the members as they were is let go.
  del starts
  policy = dataclasses.replace(policy, params=None)

  # ---- data ------------------------------------------------------------------
  data = _read_data(members, policy, out.dir / "skipped")
  programs = population_programs.make_programs(
      policy.config,
      ref_policy.config,
      value_config,
      optim.make_optimizer(shared.optimizer, shared.num_updates),
      mesh,
      shared.samples.make_generate(policy.config),
  )
  heldout = [data[x.seed].heldout_prompts for x in members.values()]
  evaluation = population_iteration.Evaluation(
      members,
      heldout,
      programs,
      evaluator.Evaluator(
          policy.config,
          policy.tokenizer,
          heldout[0],
          shared.samples,
          reference=reference,
          reward_fn=reward_fn,
          judge=evaluator.make_judge(shared.judge),
          seed=shared.seed,
          batch_size=shared.rollout_batch_size,
      ),
      policy,
      frozen,
  )
  evaluate = lambda state: evaluation(state.train.params["policy"])

  # ---- loop ------------------------------------------------------------------
  task = loop.Task(
      name="population",
      state=state,
      step=population_iteration.Step(
          list(members.values()),
          programs,
          policy,
          reference,
          reward_fn,
          mesh,
          frozen,
      ),
      batches=population_iteration.MemberBatches([
          lone.make_batches(x, data[x.seed], mesh) for x in members.values()
      ]),
      evaluate=evaluate,
      skipped_steps=lambda state: state.train.skipped_steps,
      unit="iteration",
      inputs={
          f"{name} of seed {seed}": rows
          for seed, own in data.items()
          for name, rows in own.inputs().items()
      }
      | lone.model_inputs(ref_policy, reward_model)
      | adapters.inputs(frozen),
      make_writer=functools.partial(MemberWriter, folders=folders),
      named=functools.partial(
          population_iteration.named_metrics, tuple(members)
      ),
  )
  state = loop.run_loop(
      task, shared.loop, workdir=str(out.dir), config=out.config
  )
  numbers, _ = evaluate(state)
  for i, (name, own) in enumerate(stages.items()):
    trained = population_programs.member(state.train.params["policy"], i)
    params = adapters.merged(shared.lora, frozen, trained)
    adapters.save(own.dir, shared.lora, frozen, trained)
    models.save_policy(own.dir, dataclasses.replace(policy, params=params))
    prefix = f"{name}/"
    own.finish({
        number.removeprefix(prefix): value
        for number, value in numbers.items()
        if number.startswith(prefix)
    })
  out.finish(numbers)


def _start(
    config: ppo_config.Config,
    policy: models.Policy,
    reward_model: models.RewardModel | None,
):
  """(value network's shape, a member's state, what is frozen beside it)."""
  rng_state, rng_value = jax.random.split(jax.random.key(config.seed))
  value_config, params, frozen = value_network.init_params(
      config, policy, reward_model, rng_value
  )
  tx = optim.make_optimizer(config.optimizer, config.num_updates)
  state = ppo.create_ppo_state(params, tx, rng_state, config.ppo)
  return value_config, state, frozen


def _read_data(
    members: dict[str, ppo_config.Config],
    policy: models.Policy,
    skipped_dir: pathlib.Path,
) -> dict[int, lone.Data]:
  """By seed, as it is the seed alone that the data depends on."""
  data = {}
  for member in members.values():
    if member.seed not in data:
      own = skipped_dir / f"seed{member.seed}"
      data[member.seed] = lone.read_data(member, policy.tokenizer, own)
  return data


if __name__ == "__main__":
  cli.launch(Config, run)
