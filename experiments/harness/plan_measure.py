"""Runs what was planned, on the devices here, and measures its memory.

Params are zeros: no weights are needed, and none of the programs takes another
path for what is in them, but that completions differ in length.

    CPU    how much the process's resident memory grows (the kernel's own
           count, VmHWM, reset before each program): of all simulated devices
           together
    GPU    the allocator's peak_bytes_in_use, of one device, over the iteration
           as far as it has come: programs after the largest do not show

Memory that the C library keeps for later is given back before each reading, so
that a program's bytes are its own.
"""

import ctypes
import dataclasses
import gc
import pathlib
from typing import Any

import jax
import jax.numpy as jnp

from experiments.harness import plan_programs
from experiments.harness.planner import Plan

_STATUS = pathlib.Path("/proc/self/status")
_MMAP_THRESHOLD = -3  # of mallopt, from malloc.h


@dataclasses.dataclass(frozen=True, kw_only=True)
class Measured:
  """Of one program: bytes a device.

  predicted: for the CPU what a program adds while it runs; for a GPU the peak
    with all that is there.
  """

  name: str
  predicted: float
  measured: float

  @property
  def error(self) -> float:
    """Of the prediction, as a share of what was measured."""
    return self.predicted / self.measured - 1


def measure(config: Any, mesh: jax.sharding.Mesh, plan: Plan) -> list[Measured]:
  """Runs an iteration twice and measures the second.

  Raises:
    ValueError: this platform counts nothing that could be read.
  """
  platform = mesh.devices.flat[0].platform
  if platform == "cpu" and _STATUS.exists():
    return _Cpu(mesh).run(config, plan)
  if mesh.devices.flat[0].memory_stats():
    return _Allocator(mesh).run(config, plan)
  raise ValueError(f"nothing counts the memory of a {platform} here")


class _Iteration:
  """An iteration on zeros; what is measured is for those below to say."""

  def __init__(self, mesh: jax.sharding.Mesh):
    self._mesh = mesh

  def run(self, config: Any, plan: Plan) -> list[Measured]:
    iteration = plan_programs.make_iteration(config, self._mesh)
    self.before_models()
    residents = _zeros(iteration.residents)
    found = [self.after_models(residents, plan)]
    for measured in (False, True):
      outputs = {}
      for program, planned in zip(
          iteration.programs, plan.programs, strict=True
      ):
        args = self._args(program, residents, outputs)
        self.before(program)
        result = jax.block_until_ready(program.call(*args.values()))
        del args
        if measured:
          found.append(self.after(planned))
        if program.name == "update":
          residents["state"] = result[0]
        outputs[program.name] = result
        del result
    return [x for x in found if x is not None]

  def _args(self, program, residents, outputs) -> dict[str, Any]:
    state, frozen = residents["state"], residents["frozen"]
    known = {
        "state": state,
        "frozen": frozen,
        "ref_params": residents["ref_params"],
        "kl_coef": state.kl_coef,
    }
    if program.name == "reward":
      known["params"] = residents["reward_params"]
    elif program.name == "score":
      known["params"] = frozen | state.train.params
      known["rollout"] = outputs["rollout"]
    elif program.name == "update":
      known["scored"] = outputs["score"][0]
    return {
        name: known[name] if name in known else _zeros(x)
        for name, x in program.args.items()
    }


class _Cpu(_Iteration):
  """By the kernel's count of the process."""

  def __init__(self, mesh: jax.sharding.Mesh):
    super().__init__(mesh)
    # Large arrays go back to the kernel when they are freed, as they do by
    # themselves before the C library has learnt that they come again.
    ctypes.CDLL(None).mallopt(_MMAP_THRESHOLD, 2**17)
    self._start = 0

  def before_models(self) -> None:
    self._start = _settle()

  def after_models(self, residents: Any, plan: Plan) -> Measured:
    del residents
    return Measured(
        name="models",
        predicted=sum(plan.residents.values()),
        measured=(_settle() - self._start) / self._mesh.size,
    )

  def before(self, program) -> None:
    del program
    self._start = _settle()
    pathlib.Path("/proc/self/clear_refs").write_text("5")

  def after(self, planned) -> Measured:
    return Measured(
        name=planned.name,
        predicted=planned.outputs + planned.temporaries,
        measured=(_read("VmHWM") - self._start) / self._mesh.size,
    )


def _settle() -> int:
  """Resident bytes, after what nobody holds is given back."""
  gc.collect()
  ctypes.CDLL(None).malloc_trim(0)
  return _read("VmRSS")


def _read(field: str) -> int:
  for line in _STATUS.read_text().splitlines():
    name, _, value = line.partition(":")
    if name == field:
      return int(value.split()[0]) * 1024
  raise ValueError(f"{_STATUS} has no {field}")


class _Allocator(_Iteration):
  """By the allocator of the first device."""

  def before_models(self) -> None:
    pass

  def after_models(self, residents: Any, plan: Plan) -> None:
    del residents, plan

  def before(self, program) -> None:
    del program

  def after(self, planned) -> Measured:
    stats = self._mesh.devices.flat[0].memory_stats()
    return Measured(
        name=planned.name,
        # Code is not the allocator's.
        predicted=planned.peak - planned.code,
        measured=stats["peak_bytes_in_use"],
    )


def _zeros(tree: Any) -> Any:
  """Arrays of these shapes where they lie; keys are keys, numbers stay."""
  return jax.tree.map(_zero, tree)


def _zero(x: Any) -> Any:
  if not isinstance(x, jax.ShapeDtypeStruct):
    return x
  if jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
    return jax.device_put(jax.random.key(0), x.sharding)
  # Masks are of ones: an empty one would be all padding.
  fill = 1 if x.dtype == jnp.int32 else 0
  make = jax.jit(
      lambda: jnp.full(x.shape, fill, x.dtype), out_shardings=x.sharding
  )
  return make()


def worst(found: list[Measured]) -> Measured:
  """The prediction that is furthest off."""
  return max(found, key=lambda x: abs(x.error))
