"""Stopping on SIGTERM, as machines that are taken back send it.

While a training loop runs, the signal waits for the end of the step under way;
the loop saves and raises `Stopped`. At any other moment there is nothing to
save, and `Stopped` comes at once. Either way the program ends with exit code 0
and the same command goes on.

Several processes must stop at the same step, whichever of them was told: there
jax's preemption service listens to the signal and picks the step, and nothing
but the loop and the start of a stage looks at it.
"""

import contextlib
import itertools
import os
import signal

import jax
from jax.experimental import multihost_utils


class Stopped(BaseException):
  """The run was told to stop. No error: what handles errors lets it pass."""


_told = ""  # the signal's name, once it came
_waiting = False  # whether a loop runs, which will ask
# Processes agree on the number of a call: each makes the same calls.
_calls = itertools.count(1)


def listen() -> None:
  """From here on SIGTERM means `Stopped`. Of the main thread only."""
  if jax.process_count() == 1:
    signal.signal(signal.SIGTERM, _on_signal)


def _on_signal(number, frame) -> None:
  del frame
  global _told
  _told = signal.Signals(number).name
  if not _waiting:
    raise Stopped(f"stopped by {_told}; the same command goes on")
  # Not by logging, which the signal may have interrupted.
  os.write(2, f"\n{_told}: saves and stops after this step\n".encode())


@contextlib.contextmanager
def between_steps():
  """Within, the signal only makes `requested` true."""
  global _waiting
  _waiting = True
  try:
    yield
  finally:
    _waiting = False


def requested() -> bool:
  """Whether to stop here; all processes get the same answer."""
  if jax.process_count() == 1:
    return bool(_told)
  return multihost_utils.reached_preemption_sync_point(next(_calls))


def check() -> None:
  """Raises `Stopped` if the signal came while nobody asked."""
  if requested():
    raise Stopped(f"stopped by {name()}; the same command goes on")


def name() -> str:
  """What asked for it; with several processes it may have been another's."""
  return _told or "SIGTERM"
