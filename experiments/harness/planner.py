"""From the programs of an iteration to a plan: do they fit, how long at best.

A plan is data; `plan_report.py` writes it down. On a chip, while a program
runs, are

    arguments    of the program
    others       what stays there between programs and is none of its arguments,
                 and the code of all programs
    outputs      what it gives back, beside what it writes over its arguments
    temporaries  what it needs meanwhile

and the peak is their sum.
"""

import dataclasses
import pathlib
from typing import Any

from absl import logging
import jax
import numpy as np

from experiments.harness import plan_programs
from experiments.harness.plan_programs import Iteration, Program
from rlhf_jax.planning import cache, collectives, memory, roofline
from rlhf_jax.planning.cache import Compiled
from rlhf_jax.planning.chips import Chip
from rlhf_jax.planning.roofline import Roofline


@dataclasses.dataclass(frozen=True, kw_only=True)
class Target:
  """What is planned for.

  name: a topology, or the devices here.
  chip: None where there are no figures, as for CPUs.
  memory_bytes: of a chip; None where nothing says.
  """

  name: str
  devices: Any
  chip: Chip | None
  memory_bytes: float | None


@dataclasses.dataclass(frozen=True, kw_only=True)
class ProgramPlan:
  """One program; bytes and FLOPs a chip.

  refusal: the compiler's, '' if it compiled; then there are no bytes but those
    that it named.
  sent: 'fsdp' or 'data+fsdp' -> bytes that a chip sends along these axes.
  kinds: the same by operation: 'fsdp all-gather'.
  """

  name: str
  arguments: float
  others: float
  outputs: float
  temporaries: float
  code: float
  refusal: str
  flops: float
  sent: dict[str, float]
  kinds: dict[str, float]
  roofline: Roofline | None

  @property
  def peak(self) -> float:
    """Bytes on a chip while it runs."""
    return (
        self.arguments
        + self.others
        + self.outputs
        + self.temporaries
        + self.code
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plan:
  """All programs of an iteration.

  residents: name -> bytes a chip of what is there the whole time.
  largest: (name of an array, bytes a chip) of the largest residents.
  seconds: an iteration's at the roofline; None without figures of the chip.
  """

  target: str
  num_chips: int
  memory_bytes: float | None
  mesh: dict[str, int]
  programs: list[ProgramPlan]
  residents: dict[str, float]
  largest: list[tuple[str, float]]
  seconds: float | None
  num_episodes: int
  num_tokens: int

  @property
  def peak(self) -> float:
    """The largest program's."""
    return max(x.peak for x in self.programs)

  @property
  def fits(self) -> bool:
    """Whether every program does, as far as anything says."""
    return not self.too_large

  @property
  def too_large(self) -> list[ProgramPlan]:
    """Programs that do not fit, or that the compiler refused."""
    limit = self.memory_bytes
    return [
        x
        for x in self.programs
        if x.refusal or (limit is not None and x.peak > limit)
    ]


def make_plan(
    config: Any,
    mesh: jax.sharding.Mesh,
    target: Target,
    cache_dir: pathlib.Path,
    *,
    stop_when_too_large: bool = False,
) -> Plan:
  """Compiles the programs of `experiments.ppo`'s Config, and counts.

  Args:
    stop_when_too_large: leave out the programs after the first that does not
      fit; the one that takes most comes first.

  Raises:
    As `plan_programs.make_iteration`.
  """
  iteration = plan_programs.make_iteration(config, mesh)
  found = {}
  for program in reversed(iteration.programs):
    found[program.name] = _compile(program, target, cache_dir)
    plan = assemble(config, mesh, target, iteration, found)
    if stop_when_too_large and plan.too_large:
      return plan
  return plan


def _compile(
    program: Program, target: Target, cache_dir: pathlib.Path
) -> Compiled:
  logging.info("plan: %s for %s", program.name, target.name)
  found = cache.compiled(program.lower(), target.name, cache_dir)
  if found.was_cached:
    logging.info("plan: %s was compiled before", program.name)
  return found


def assemble(
    config: Any,
    mesh: jax.sharding.Mesh,
    target: Target,
    iteration: Iteration,
    found: dict[str, Compiled],
) -> Plan:
  """The plan of programs that were compiled."""
  residents = {
      name: memory.tree_bytes(x) for name, x in iteration.residents.items()
  }
  if _shares_base(config):
    residents["ref_params"] = 0
  code = sum(x.memory.code for x in found.values() if x.memory)
  programs = [
      _program_plan(config, x, found[x.name], residents, code, mesh, target)
      for x in iteration.programs
      if x.name in found
  ]
  rooflines = [x.roofline for x in programs]
  known = all(rooflines) and not any(x.refusal for x in programs)
  return Plan(
      target=target.name,
      num_chips=mesh.size,
      memory_bytes=target.memory_bytes,
      mesh=dict(mesh.shape),
      programs=programs,
      residents=residents,
      largest=memory.largest(
          {k: v for k, v in iteration.residents.items() if residents[k]}
      ),
      seconds=sum(x.seconds for x in rooflines) if known else None,
      num_episodes=config.rollout_batch_size,
      num_tokens=(
          config.rollout_batch_size * config.samples.max_completion_length
      ),
  )


def _shares_base(config: Any) -> bool:
  """Whether the reference policy is the frozen base that the policy is on."""
  return bool(config.lora.rank) and not config.ref_policy


def _program_plan(
    config, program, compiled, residents, code, mesh, target
) -> ProgramPlan:
  always = sum(residents.values()) + program.input_bytes
  common = dict(
      name=program.name,
      flops=sum(x.flops for x in program.phases),
  )
  if compiled.memory is None:
    # What it named is all that it needs, or its temporaries alone.
    needed = compiled.refusal.needed or 0.0
    return ProgramPlan(
        arguments=always, others=code, outputs=0.0, temporaries=needed,
        code=0.0, refusal=str(compiled.refusal), sent={}, kinds={},
        roofline=None, **common,
    )
  use = compiled.memory
  arguments = use.arguments
  if _shares_base(config) and "ref_params" in program.args:
    # One array that is two arguments.
    arguments -= memory.tree_bytes(program.args["ref_params"])
  found = collectives.collectives(
      compiled.text, mesh.shape, unknown_trip_count=program.max_trip_count
  )
  sent = collectives.bytes_by_axes(found)
  return ProgramPlan(
      arguments=arguments,
      others=max(always - arguments, 0) + code - use.code,
      outputs=use.outputs,
      temporaries=use.temporaries,
      code=use.code,
      refusal="",
      sent={"+".join(axes): num for axes, num in sent.items()},
      kinds={f"{'+'.join(x.axes)} {x.kind}": x.num_bytes for x in found},
      roofline=_roofline(program, sent, mesh, target.chip),
      **common,
  )


def _roofline(program, sent, mesh, chip) -> Roofline | None:
  if chip is None:
    return None
  places = None
  if hasattr(mesh.devices.flat[0], "coords"):
    coords = [device.coords for device in mesh.devices.flat]
    places = np.asarray(coords).reshape(*mesh.devices.shape, -1)
  bandwidths = {
      axes: roofline.axes_bandwidth(chip, places, mesh.axis_names, axes)
      for axes in sent
  }
  return roofline.roofline(program.phases, sent, bandwidths, chip)


def least(
    config: Any, mesh: jax.sharding.Mesh, chip: Chip | None
) -> tuple[float, float]:
  """(bytes a chip of models alone, seconds without links), uncompiled.

  A plan will say no less. Seconds are 0 without figures of the chip.

  Raises:
    As `plan_programs.make_iteration`.
  """
  iteration = plan_programs.make_iteration(config, mesh)
  trees = dict(iteration.residents)
  if _shares_base(config):
    del trees["ref_params"]
  num_bytes = sum(memory.tree_bytes(x) for x in trees.values())
  if chip is None:
    return num_bytes, 0.0
  seconds = sum(
      roofline.roofline(x.phases, {}, {}, chip).seconds
      for x in iteration.programs
  )
  return num_bytes, seconds
