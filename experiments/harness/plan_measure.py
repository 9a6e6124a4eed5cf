"""Runs what was planned, on the devices here, and measures its memory.

Params are zeros: no weights are needed, and none of the programs takes another
path for what is in them, but that completions differ in length.

    CPU    by how much the process's resident memory grew when the models came,
           and rises while a program runs: the kernel's own counts (VmRSS, and
           VmHWM reset before each program), of all simulated devices together.
           What the C library keeps for later is given back before each.
           Scratch of matrix libraries, which no compiler lays out, is in it;
           memory that compiling took is not.
    GPU    the allocator's peak_bytes_in_use, of one device, over the iteration
           as far as it has come: programs after the largest do not show

What is compared is the peak of a plan, without its code.
"""

import ctypes
import dataclasses
import gc
import pathlib
from typing import Any

import jax
import jax.numpy as jnp

from experiments.harness import plan_programs
from experiments.harness.plan_programs import Program
from experiments.harness.planner import Plan

_STATUS = pathlib.Path("/proc/self/status")
_MMAP_THRESHOLD = -3  # of mallopt, from malloc.h


@dataclasses.dataclass(frozen=True, kw_only=True)
class Measured:
  """The peak of one program: bytes a device."""

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
  counter = _counter(mesh)
  iteration = plan_programs.make_iteration(config, mesh)
  _zeros(iteration.residents)  # compiled now, and not where it counts
  counter.start()
  residents = _zeros(iteration.residents)
  counter.placed()
  found = []
  for counts in (False, True):
    outputs = {}
    for program, planned in zip(
        iteration.programs, plan.programs, strict=True
    ):
      args = _args(program, residents, outputs)
      counter.before()
      result = jax.block_until_ready(program.call(*args.values()))
      del args
      if counts:
        found.append(
            Measured(
                name=program.name,
                predicted=planned.peak - planned.code,
                measured=counter.peak(),
            )
        )
      if program.name == "update":
        residents["state"] = result[0]
      outputs[program.name] = result
      del result
  return found


def _args(
    program: Program, residents: dict[str, Any], outputs: dict[str, Any]
) -> dict[str, Any]:
  """What the program takes: of the programs before it where that is known."""
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


# ---- What counts -------------------------------------------------------------


def _counter(mesh: jax.sharding.Mesh):
  first = mesh.devices.flat[0]
  if first.platform == "cpu" and _STATUS.exists():
    return _Process(mesh.size)
  if first.memory_stats():
    return _Allocator(first)
  raise ValueError(f"nothing counts the memory of a {first.platform} here")


class _Process:
  """The kernel's count of this process, for each of its devices."""

  def __init__(self, num_devices: int):
    # Large arrays go back to the kernel when they are freed, as they do by
    # themselves before the C library has learnt that they come again.
    ctypes.CDLL(None).mallopt(_MMAP_THRESHOLD, 2**17)
    self._num_devices = num_devices
    self._start = self._models = self._before = 0

  def start(self) -> None:
    self._start = _settle()

  def placed(self) -> None:
    self._models = _settle() - self._start

  def before(self) -> None:
    self._before = _settle()
    pathlib.Path("/proc/self/clear_refs").write_text("5")

  def peak(self) -> float:
    rise = _read("VmHWM") - self._before
    return (self._models + rise) / self._num_devices


class _Allocator:
  """The allocator's count of one device, which only rises."""

  def __init__(self, device: jax.Device):
    self._device = device

  def start(self) -> None:
    """Nothing: it counts arrays alone, and there are none."""

  def placed(self) -> None:
    """Nothing: they are in every peak."""

  def before(self) -> None:
    """Nothing: it cannot be reset."""

  def peak(self) -> float:
    return self._device.memory_stats()["peak_bytes_in_use"]


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
  return jnp.full(x.shape, fill, x.dtype, device=x.sharding)
