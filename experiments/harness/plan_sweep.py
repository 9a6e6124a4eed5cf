"""All meshes of a slice, by the time that an iteration takes at best."""

from collections.abc import Iterator
import dataclasses
import itertools
import math
import pathlib
from typing import Any

from absl import logging

from experiments.harness import devices, plan_report, planner
from experiments.harness.planner import Plan, Target
from rlhf_jax import device_mesh
from rlhf_jax.device_mesh import MeshConfig

# `replica` is `data` over a slower network, which one slice does not have.
_AXES = ("data", "fsdp", "tensor", "sequence")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Tried:
  """One mesh: a plan of it, or why there is none."""

  mesh: MeshConfig
  plan: Plan | None
  why_not: str


def meshes(num_chips: int) -> Iterator[MeshConfig]:
  """All that have so many chips."""
  sizes = [n for n in range(1, num_chips + 1) if num_chips % n == 0]
  for shape in itertools.product(sizes, repeat=len(_AXES)):
    if math.prod(shape) == num_chips:
      yield MeshConfig(**dict(zip(_AXES, shape, strict=True)))


def sweep(
    config: Any, target: Target, cache_dir: pathlib.Path, limit: int
) -> list[Tried]:
  """Plans of all meshes, the fastest first, then those that do not fit.

  Meshes that sizes rule out, and those whose models alone are too large, are
  not compiled; the others are in the order of what they take without links.

  Args:
    limit: compile so many at the most; 0 for all.
  """
  ruled_out, candidates = [], []
  for mesh_config in meshes(len(target.devices)):
    try:
      changed = with_mesh(config, mesh_config, len(target.devices))
      mesh = device_mesh.make_mesh(mesh_config, target.devices)
      num_bytes, seconds = planner.least(changed, mesh, target.chip)
    except ValueError as error:
      ruled_out.append(_no(mesh_config, str(error)))
      continue
    if target.memory_bytes and num_bytes > target.memory_bytes:
      why_not = f"models alone are {plan_report.gib(num_bytes)} GiB a chip"
      ruled_out.append(_no(mesh_config, why_not))
      continue
    candidates.append((seconds, num_bytes, mesh_config, mesh, changed))
  candidates.sort(key=lambda x: x[:2])
  tried = []
  for i, (_, _, mesh_config, mesh, changed) in enumerate(candidates):
    if limit and i >= limit:
      ruled_out.append(_no(mesh_config, f"not among the first {limit}"))
      continue
    logging.info("plan: %s, %d of %d", mesh_config, i + 1, len(candidates))
    tried.append(_try(changed, mesh_config, mesh, target, cache_dir))
  tried.sort(key=_rank)
  return tried + ruled_out


def with_mesh(config: Any, mesh: MeshConfig, num_devices: int) -> Any:
  """The config on another mesh.

  Raises:
    ValueError: a size does not divide over it.
  """
  with devices.planned_for(num_devices):
    return dataclasses.replace(config, mesh=mesh)


def _try(config, mesh_config, mesh, target, cache_dir) -> Tried:
  plan = planner.make_plan(
      config, mesh, target, cache_dir, stop_when_too_large=True
  )
  if plan.fits:
    return Tried(mesh=mesh_config, plan=plan, why_not="")
  worst = max(plan.too_large, key=lambda x: x.peak)
  at_least = "at least " if worst.refusal else ""
  why_not = f"{worst.name}: {at_least}{plan_report.gib(worst.peak)} GiB a chip"
  return _no(mesh_config, why_not)


def _no(mesh: MeshConfig, why_not: str) -> Tried:
  return Tried(mesh=mesh, plan=None, why_not=why_not)


def _rank(tried: Tried) -> tuple[bool, float]:
  if tried.plan is None:
    return True, 0.0
  # Without figures of the chip: what takes least.
  return False, tried.plan.seconds or tried.plan.peak


def report(found: list[Tried], title: str) -> str:
  """A table of those that fit, and a line for each of the others."""
  rows = [
      [
          plan_report.mesh_name(x.plan.mesh),
          "?" if x.plan.seconds is None else f"{x.plan.seconds:.1f}",
          plan_report.gib(x.plan.peak),
          *("?" if p.roofline is None else f"{p.roofline.seconds:.1f}"
            for p in x.plan.programs),
      ]
      for x in found
      if x.plan is not None
  ]
  parts = [f"# {title}"]
  if rows:
    names = next(x.plan for x in found if x.plan).programs
    header = ["mesh", "seconds", "peak GiB", *(x.name for x in names)]
    parts.append(plan_report.table(header, rows))
  else:
    parts.append("No mesh fits.")
  others = [f"- {x.mesh}: {x.why_not}" for x in found if x.plan is None]
  if others:
    parts.append("\n".join(["Not these:", "", *others]))
  return "\n\n".join(parts) + "\n"
