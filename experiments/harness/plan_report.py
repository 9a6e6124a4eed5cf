"""A plan in words: tables, and what to change where it does not fit."""

from collections.abc import Sequence
import math
from typing import Any

from experiments.harness.planner import Plan, ProgramPlan
from rlhf_jax.planning import topologies

_GIB = 2**30
_SECONDS_A_DAY = 86_400


def gib(num_bytes: float) -> str:
  """'11.3'; small numbers keep a digit that says something."""
  value = num_bytes / _GIB
  return f"{value:.2f}" if value < 10 else f"{value:.1f}"


def mesh_name(mesh: dict[str, int]) -> str:
  """'fsdp 16, tensor 4'; 'one chip'."""
  named = [f"{name} {size}" for name, size in mesh.items() if size > 1]
  return ", ".join(named) or "one chip"


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
  """Markdown that also reads well in a terminal; numbers to the right."""
  widths = [max(len(x) for x in column) for column in zip(header, *rows)]
  line = lambda cells: "| " + " | ".join(
      cell.ljust(width) if i == 0 else cell.rjust(width)
      for i, (cell, width) in enumerate(zip(cells, widths, strict=True))
  ) + " |"
  rule = ["-" * widths[0], *("-" * (w - 1) + ":" for w in widths[1:])]
  return "\n".join([line(header), line(rule), *map(line, rows)])


def heading(plan: Plan, name: str) -> str:
  """'llama3_8b on v5e:8x8 (v5e-64): 64 chips, mesh fsdp 64'."""
  try:
    target = f"{plan.target} ({topologies.accelerator_type(plan.target)})"
  except topologies.TopologyError:
    target = plan.target
  return (
      f"{name} on {target}: {plan.num_chips} chips, mesh "
      f"{mesh_name(plan.mesh)}"
  )


def report(plan: Plan, name: str, config: Any, num_episodes: int) -> str:
  """Everything, as Markdown."""
  parts = [
      f"# {heading(plan, name)}",
      "GiB a chip:",
      memory_table(plan),
      _residents(plan),
      "A chip's work and, at the roofline, its seconds:",
      work_table(plan),
  ]
  if any(x.kinds for x in plan.programs):
    parts += ["GB that a chip sends:", _sent_table(plan)]
  parts.append(_verdict(plan, num_episodes))
  if not plan.fits:
    parts.append(refusal(plan, config))
  return "\n\n".join(parts) + "\n"


def memory_table(plan: Plan) -> str:
  """Programs by bytes."""
  rows = []
  for x in plan.programs:
    parts = (x.arguments, x.others, x.outputs, x.temporaries, x.code)
    cells = [gib(part) for part in parts]
    if x.refusal:
      cells[2] = cells[4] = "?"
    at_least = "at least " if x.refusal else ""
    share = "" if plan.memory_bytes is None else (
        f"{x.peak / plan.memory_bytes:.0%}"
    )
    rows.append([x.name, *cells, at_least + gib(x.peak), share])
  limit = "" if plan.memory_bytes is None else f"of {gib(plan.memory_bytes)}"
  header = (
      "program", "arguments", "others", "outputs", "temporaries", "code",
      "peak", limit,
  )
  return table(header, rows)


def _residents(plan: Plan) -> str:
  named = ", ".join(
      f"{name} {gib(num)}" for name, num in plan.residents.items() if num
  )
  return f"There the whole time: {named}."


def work_table(plan: Plan) -> str:
  """Programs by FLOPs and seconds."""
  rows = []
  for x in plan.programs:
    roof = x.roofline
    seconds = ["?"] * 4 if roof is None else [
        f"{value:.2f}"
        for value in (roof.compute, roof.memory, roof.links, roof.seconds)
    ]
    bound = "?" if roof is None else roof.bound
    rows.append([x.name, f"{x.flops / 1e12:,.1f}", *seconds, bound])
  header = (
      "program", "matmul TFLOPs", "compute", "memory", "links", "seconds",
      "waits for",
  )
  return table(header, rows)


def _sent_table(plan: Plan) -> str:
  kinds = sorted({kind for x in plan.programs for kind in x.kinds})
  rows = [
      [kind, *(f"{x.kinds.get(kind, 0.0) / 1e9:,.2f}" for x in plan.programs)]
      for kind in kinds
  ]
  return table(["axis, operation", *(x.name for x in plan.programs)], rows)


def _verdict(plan: Plan, num_episodes: int) -> str:
  if plan.memory_bytes is None:
    fit = f"Takes {gib(plan.peak)} GiB a device."
  elif plan.fits:
    fit = (
        f"Fits: {gib(plan.peak)} of {gib(plan.memory_bytes)} GiB a chip at the "
        "most."
    )
  else:
    fit = "Does not fit."
  if plan.seconds is None:
    return fit
  return (
      f"{fit} An iteration of {plan.num_episodes} episodes takes no less than "
      f"{plan.seconds:.1f} s: {plan.num_tokens / plan.seconds:,.0f} completion "
      f"tokens a second, {days(plan, num_episodes):.2f} days for "
      f"{num_episodes:,} episodes. That is the roofline, where everything "
      "overlaps and nothing idles; programs reach a part of it."
  )


def days(plan: Plan, num_episodes: int) -> float:
  """For so many episodes, at the roofline."""
  iterations = math.ceil(num_episodes / plan.num_episodes)
  return iterations * plan.seconds / _SECONDS_A_DAY


# ---- What does not fit -------------------------------------------------------


def refusal(plan: Plan, config: Any) -> str:
  """What is too large by how much, what is largest, what to change."""
  lines = ["What does not fit:", ""]
  lines += [f"- {_excess(plan, x)}" for x in plan.too_large]
  lines += ["", "The largest arrays that are there the whole time:", ""]
  lines += [f"- {name}: {gib(num)} GiB a chip" for name, num in plan.largest]
  lines += ["", "What to change, the cheapest first:", ""]
  lines += [f"- {line}" for line in advice(plan, config)]
  return "\n".join(lines)


def _excess(plan: Plan, x: ProgramPlan) -> str:
  if x.refusal:
    needed = f"{gib(x.temporaries)} GiB" if x.temporaries else "more"
    return (
        f"{x.name}: the compiler needs {needed} a chip for the program alone, "
        f"and {gib(x.others)} GiB and {gib(x.arguments)} GiB of models and "
        "batch are there besides"
    )
  return (
      f"{x.name}: {gib(x.peak)} GiB a chip, "
      f"{gib(x.peak - plan.memory_bytes)} GiB too much"
  )


def advice(plan: Plan, config: Any) -> list[str]:
  """Changes that make it smaller, with what is known of their effect."""
  names = {x.name for x in plan.too_large}
  always = sum(plan.residents.values())
  state = plan.residents["state"]
  shards = math.prod(plan.mesh[axis] for axis in ("replica", "data", "fsdp"))
  cfg, found = config.ppo, []
  parts = cfg.num_minibatches * cfg.num_microbatches
  most = config.rollout_batch_size // shards // cfg.num_minibatches
  if names & {"update", "score"} and cfg.num_microbatches < most:
    found.append(
        f"--config.ppo.num_microbatches={2 * cfg.num_microbatches} (at most "
        f"{most} here): half the activations of now, "
        f"{config.rollout_batch_size // shards // parts} rows a chip at a time"
    )
  if "update" in names and not config.compute.remat:
    found.append("--config.compute.remat=True: activations of one layer alone")
  if config.compute.dtype != "bfloat16":
    found.append("--config.compute.dtype=bfloat16: half the activations")
  copies = plan.mesh["data"] * plan.mesh["replica"]
  if copies > 1:
    found.append(
        f"--config.mesh.fsdp=-1 and data=1: each model is there {copies} "
        f"times; once, {gib(always * (1 - 1 / copies))} GiB a chip less"
    )
  if "rollout" in names and config.rollout_batch_size > shards:
    found.append(
        f"--config.rollout_batch_size={config.rollout_batch_size // 2}: half "
        "the cache of keys and values"
    )
  if config.value_network == "separate" and not config.lora.rank:
    found.append(
        "--config.value_network=shared --config.value_init=zero: no network "
        f"for values, about {gib(state / 2)} GiB a chip less"
    )
  if not config.lora.rank:
    found.append(
        "--config.lora.rank=64: an adapter's moments and gradients for all "
        f"weights', most of {gib(state)} GiB a chip less"
    )
  if config.compute.param_dtype != "bfloat16":
    found.append(
        "--config.compute.param_dtype=bfloat16: half the params of every "
        "model; small steps round away"
    )
  found.append(_more_chips(plan, always))
  return found


def _more_chips(plan: Plan, always: float) -> str:
  needed = max(x.peak for x in plan.programs)
  num = math.ceil(plan.num_chips * needed / plan.memory_bytes)
  return (
      f"more chips: models alone are {gib(always * plan.num_chips)} GiB, all "
      f"of now {gib(needed * plan.num_chips)}, which {num} chips hold if all "
      "of it splits"
  )
