"""Seconds of a measure's parts, what was compiled for it, and its memory."""

from collections.abc import Callable, Sequence
import dataclasses
import pathlib
import resource
import statistics
import time
from typing import Any

import jax

from experiments.harness.benchmark_limits import Load

# What jax does before a program can run; each tells its seconds.
_COMPILING = (
    "/jax/core/compile/jaxpr_trace_duration",
    "/jax/core/compile/jaxpr_to_mlir_module_duration",
    "/jax/core/compile/backend_compile_duration",
)
_STATUS = pathlib.Path("/proc/self/status")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Part:
  """One figure of a measure.

  amount: of `unit` in one run; None where the figure is the seconds.
  loads: the work of one run, for its floor; none where there is no floor.
  """

  name: str
  unit: str
  amount: float | None
  loads: tuple[Load, ...] = ()

  def figure(self, seconds: float) -> float:
    """What is told of so many seconds."""
    return seconds if self.amount is None else self.amount / seconds

  @property
  def more_is_better(self) -> bool:
    """Whether the figure is a speed."""
    return self.amount is not None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Measure:
  """What is run again and again: () -> seconds by the parts' names.

  has_warmup: whether it is run before it is measured.
  """

  name: str
  parts: tuple[Part, ...]
  run: Callable[[], dict[str, float]]
  has_warmup: bool = True


@dataclasses.dataclass(frozen=True, kw_only=True)
class Spread:
  """Median, least and most of repeats."""

  median: float
  min: float
  max: float
  values: tuple[float, ...]


def spread(values: Sequence[float]) -> Spread:
  """Of some figures."""
  return Spread(
      median=statistics.median(values),
      min=min(values),
      max=max(values),
      values=tuple(values),
  )


def timed(call: Callable[..., Any], *args: Any) -> tuple[float, Any]:
  """(seconds, what it gave), once that is there."""
  start = time.perf_counter()
  out = jax.block_until_ready(call(*args))
  return time.perf_counter() - start, out


class Compilations:
  """How many programs were compiled, and for how many seconds, since it began.

  One that came from the persistent cache counts too, with the seconds that this
  took. A process needs one: jax keeps what listens.
  """

  def __init__(self):
    self.count, self.seconds = 0, 0.0
    jax.monitoring.register_event_duration_secs_listener(self._listen)

  def _listen(self, event: str, seconds: float, **_) -> None:
    if event in _COMPILING:
      self.seconds += seconds
      self.count += event == _COMPILING[-1]

  def since(self, count: int, seconds: float) -> tuple[int, float]:
    """What came after these two."""
    return self.count - count, self.seconds - seconds


class PeakMemory:
  """The most bytes since it was made, as far as someone counts them.

  kind: 'resident' is the kernel's count of this process, which it sets back
    here; where it may not, 'resident since the start'. 'device' is the
    allocator's of the first device, which only rises.
  """

  def __init__(self):
    self._device = jax.local_devices()[0]
    if self._device.memory_stats():
      self.kind = "device"
      return
    self.kind = "resident since the start"
    try:
      pathlib.Path("/proc/self/clear_refs").write_text("5")
      self.kind = "resident"
    except OSError:
      pass  # The kernel's own high-water mark is read instead.

  def bytes(self) -> int:
    """So far."""
    if self.kind == "device":
      return self._device.memory_stats()["peak_bytes_in_use"]
    if self.kind == "resident":
      for line in _STATUS.read_text().splitlines():
        if line.startswith("VmHWM:"):
          return int(line.split()[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
