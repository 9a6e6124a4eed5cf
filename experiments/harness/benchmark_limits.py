"""What the machine can do, measured: the floor under every figure.

A floor is the shortest time in which the work could be done: its matmuls at the
rate that XLA reaches on each of their shapes by itself, and its bytes at the
rate of copying. Of each load the larger counts, for the two can overlap, and
loads follow one another.

    matmuls   those of `planning/flops.py`, each once: what a run computes again
              is no part of it. Training takes three, of which the two backward
              ones are measured in their own layouts. Multiplications between
              activations (attention) count at the best of these rates.
    bytes     operands and results of the matmuls, each once, in the compute
              dtype, and what a load names beside

Shapes are multiplied in a loop inside one program, so that neither a call nor a
fresh buffer is measured; the operands then lie in caches, as far as they fit.
So a floor is one: nothing real gets below, and small models not near.
"""

from collections.abc import Iterable
import dataclasses
import functools
import time

import jax
import jax.numpy as jnp

from rlhf_jax.planning import flops
from rlhf_jax.planning.flops import Matmul

_TRIES = 5  # the best counts: others may use the machine
_SECONDS = 0.05  # that one try is to take at least
_COPIES = 4
# Products between two questions whether the loop goes on, which an accelerator
# asks its host.
_UNROLLED_ON_ACCELERATORS = 16
# Which axes of [m, k] x [k, n] and of its two gradients are summed over.
_LAYOUTS = {
    "forward": ((1,), (0,)),
    "inputs": ((1,), (1,)),
    "weights": ((0,), (0,)),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Load:
  """Matmuls that run together, `times` over.

  trained: with both gradients.
  other_bytes: read and written beside the matmuls, in each of the times.
  """

  matmuls: tuple[Matmul, ...]
  times: float = 1.0
  trained: bool = False
  other_bytes: float = 0.0

  @property
  def flops(self) -> float:
    """Of all of it."""
    passes = 3 if self.trained else 1
    return flops.total(self.matmuls).flops * passes * self.times


@dataclasses.dataclass(frozen=True, kw_only=True)
class Floor:
  """Seconds that some loads take at least.

  compute, memory: if there were nothing else.
  matmul_rate: FLOP/s of these shapes, weighted by their FLOPs.
  """

  seconds: float
  compute: float
  memory: float
  flops: float
  bytes: float
  matmul_rate: float
  bandwidth: float

  @property
  def bound(self) -> str:
    """What it waits for."""
    return "memory" if self.memory > self.compute else "compute"


class Limits:
  """Measures each shape once, when it is asked for."""

  def __init__(self, dtype: str, copy_mib: int):
    self._dtype = jnp.dtype(dtype)
    self._copy_mib = copy_mib
    self._rates: dict[tuple[tuple[int, int, int], str], float] = {}

  def rate(self, shape: tuple[int, int, int], layout: str) -> float:
    """FLOP/s of one shape; 'forward', or the gradient of one operand."""
    if (shape, layout) not in self._rates:
      m, k, n = shape
      self._rates[shape, layout] = 2.0 * m * k * n / _seconds_each(
          *_operands(shape, layout, self._dtype), layout
      )
    return self._rates[shape, layout]

  @functools.cached_property
  def bandwidth(self) -> float:
    """Bytes a second, read and written, of adding to a large array in place."""
    step = jax.jit(lambda x: x + 1, donate_argnums=0)
    x = step(jnp.zeros((self._copy_mib * 2**18,), jnp.float32))
    best = float("inf")
    for _ in range(_TRIES):
      x.block_until_ready()
      start = time.perf_counter()
      # Several, or an accelerator would wait for its next.
      for _ in range(_COPIES):
        x = step(x)
      x.block_until_ready()
      best = min(best, time.perf_counter() - start)
    return 2.0 * _COPIES * x.nbytes / best

  def floor(self, loads: Iterable[Load]) -> Floor:
    """Of loads one after the other."""
    total = dict(seconds=0.0, compute=0.0, memory=0.0, flops=0.0, bytes=0.0)
    for load in loads:
      num_bytes = self._bytes(load)
      compute, memory = self._compute(load), num_bytes / self.bandwidth
      found = (max(compute, memory), compute, memory, load.flops, num_bytes)
      for name, value in zip(total, found, strict=True):
        total[name] += value
    rate = total["flops"] / total["compute"] if total["compute"] else 0.0
    return Floor(**total, matmul_rate=rate, bandwidth=self.bandwidth)

  def _compute(self, load: Load) -> float:
    layouts = tuple(_LAYOUTS) if load.trained else ("forward",)
    seconds, best = 0.0, 0.0
    for x in load.matmuls:
      # A head of one column is a product with a vector.
      if x.shape is not None and x.shape[2] > 1:
        rates = [self.rate(x.shape, layout) for layout in layouts]
        seconds += sum(x.flops / rate for rate in rates)
        best = max(best, *rates)
    rest = [x for x in load.matmuls if x.shape is None or x.shape[2] == 1]
    if rest and best:
      seconds += len(layouts) * flops.total(rest).flops / best
    return seconds * load.times

  def _bytes(self, load: Load) -> float:
    work = flops.total(load.matmuls)
    passes = 3 if load.trained else 1
    elements = (work.weights + work.activations) * passes
    each = elements * self._dtype.itemsize + load.other_bytes
    return each * load.times


def _operands(shape, layout, dtype):
  m, k, n = shape
  sizes = {
      "forward": ((m, k), (k, n), (m, n)),
      "inputs": ((m, n), (k, n), (m, k)),
      "weights": ((m, k), (m, n), (k, n)),
  }[layout]
  # Not constants, which a product could be spared.
  left, right = (
      jax.random.normal(jax.random.key(i), size, dtype)
      for i, size in enumerate(sizes[:2])
  )
  return left, right, jnp.zeros(sizes[2], dtype)


def _seconds_each(left, right, out, layout: str) -> float:
  """Of one product, in a loop long enough to be timed."""
  axes = (_LAYOUTS[layout], ((), ()))
  is_cpu = jax.default_backend() == "cpu"
  unrolled = 1 if is_cpu else _UNROLLED_ON_ACCELERATORS

  def multiply(num, left, right, out):
    def body(_, carry):
      left, out = carry
      for _ in range(unrolled):
        # The next one waits for it, or one would do for all.
        left = jax.lax.dynamic_update_slice(left, out[:1, :1] * 0.5, (0, 0))
        out = jax.lax.dot_general(left, right, axes)
      return left, out

    return jax.lax.fori_loop(0, num, body, (left, out))

  run = jax.jit(multiply, donate_argnums=(1, 3))

  def timed(num, left, out):
    start = time.perf_counter()
    left, out = jax.block_until_ready(run(num, left, right, out))
    return time.perf_counter() - start, left, out

  _, left, out = timed(1, left, out)  # compiles
  num, best = 1, float("inf")
  while True:
    seconds, left, out = timed(num, left, out)
    if seconds >= _SECONDS or num >= 2**20:
      break
    num = max(2 * num, int(1.2 * num * _SECONDS / max(seconds, 1e-9)))
    num = min(num, 2**20)
  for _ in range(_TRIES):
    best = min(best, seconds)
    seconds, left, out = timed(num, left, out)
  return min(best, seconds) / (num * unrolled)
