"""A trainer's own loop, one step a turn.

Trainers have loops that cannot be called a step at a time. So the loop runs in
a thread of its own and waits, at one place of every step, until its next turn.
A turn is all from one such place to the next, data and logging included.
"""

from collections.abc import Callable
import threading
import time
from typing import Any


class Turns:
  """train() is to call `wait` once a step, before or after its work."""

  def __init__(self, train: Callable[[], Any], finish: Callable[[], Any]):
    self._train, self._finish = train, finish
    self._go, self._done = threading.Semaphore(0), threading.Semaphore(0)
    self._error: BaseException | None = None
    self._thread = threading.Thread(target=self._run, daemon=True)

  def wait(self) -> None:
    """In the loop: until it is its turn again."""
    self._done.release()
    self._go.acquire()

  def turn(self) -> float:
    """Seconds of the next turn.

    Raises:
      RuntimeError: the loop ended or broke.
    """
    if not self._thread.is_alive() and self._error is None:
      self._thread.start()
      self._done.acquire()  # It has come to its first step.
      self._check()
    self._finish()
    start = time.perf_counter()
    self._go.release()
    self._done.acquire()
    self._finish()
    seconds = time.perf_counter() - start
    self._check()
    return seconds

  def _run(self) -> None:
    try:
      self._train()
      self._error = RuntimeError("its loop has no more steps")
    except BaseException as error:  # pylint: disable=broad-except
      self._error = error
    self._done.release()

  def _check(self) -> None:
    if self._error is not None:
      raise RuntimeError(f"its loop broke off: {self._error}") from self._error
