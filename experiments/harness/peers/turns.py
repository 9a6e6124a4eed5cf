"""A trainer's own loop, one step a turn.

Trainers have loops that cannot be called a step at a time. So such a peer has
its loop call `wait` at one place of every step, and the worker lets it go on
when it is its turn. A turn is all from one such place to the next, data and
logging included. Nothing has a thread of its own, which a library might mind.
"""

from collections.abc import Callable
import time
from typing import Any


class Loop:
  """What a peer's `make` gives instead of a function for one turn.

  part: what a turn's seconds are of.
  train: the loop, which calls `wait` once a turn.
  finish: waits for what the device was given.
  """

  def __init__(
      self, part: str, train: Callable[[], Any], finish: Callable[[], Any]
  ):
    self.part, self._train, self._finish = part, train, finish
    self._next: Callable[[float | None], None] | None = None
    self._start: float | None = None

  def wait(self) -> None:
    """In the loop: until it is its turn again."""
    self._finish()
    now = time.perf_counter()
    self._next(None if self._start is None else now - self._start)
    self._start = time.perf_counter()

  def run(self, next_turn: Callable[[float | None], None]) -> None:
    """Trains; before each turn, next_turn(seconds of the one before it).

    Raises:
      RuntimeError: the loop ended by itself.
    """
    self._next = next_turn
    self._train()
    raise RuntimeError("its loop has no more steps")
