"""Several processes as one run: joined at the start, told who is missing.

jax's distributed runtime does the work: it finds the others, carries what they
exchange, and ends a process whose coordinator is gone. What it does not do in
words is say who is missing, and a collective whose peer was killed may fail
with an error of its own, or wait for ever. So here every process counts up a
key of the runtime's store; process 0 sees whose count stands still, or who has
failed, and leaves its verdict there, which ends all.
"""

from collections.abc import Iterator
import contextlib
import dataclasses
import json
import os
import socket
import sys
import threading
import time
import traceback

from absl import logging
import jax
from jax._src import distributed  # The store has no public name.

from rlhf_jax import checkpoint

_ALIVE, _FAILED = "rlhf_jax/alive", "rlhf_jax/failed"
_VERDICT = "rlhf_jax/verdict"
_GO_ON = "The same command on all hosts goes on from the last checkpoint."


class HostsError(RuntimeError):
  """The processes of a run do not come together."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Hosts:
  """What `jax.distributed.initialize` is told; None is what it finds itself.

  heartbeat_timeout_seconds: within so long of one's end all others end.
  """

  coordinator_address: str | None
  num_processes: int | None
  process_id: int | None
  heartbeat_timeout_seconds: int

  def __post_init__(self):
    if self.heartbeat_timeout_seconds < 1:
      raise HostsError(
          f"--heartbeat_timeout_seconds={self.heartbeat_timeout_seconds} must "
          "be at least 1"
      )


@contextlib.contextmanager
def joined(hosts: Hosts | None) -> Iterator[None]:
  """One process of several within; None is a run of one process.

  Nothing of jax may have been computed before. Whatever ends one process ends
  all, and the program does not go on after an error here: waiting for peers
  that are gone, it could not even exit.
  """
  if hosts is None:
    yield
    return
  _initialize(hosts)
  watch = _Watch(hosts)
  watch.start()
  try:
    yield
  except SystemExit as end:
    if end.code:
      # What was told already; but peers that are gone can be behind it too.
      error = end.__context__
      certain = not isinstance(error, checkpoint.CheckpointError)
      watch.fail(str(error or end), certain=certain)
  except BaseException as error:  # pylint: disable=broad-except
    traceback.print_exc()
    # Of what a missing peer leads to there are many kinds.
    certain = isinstance(error, KeyboardInterrupt)
    watch.fail(f"{type(error).__name__}: {error}", certain=certain)
  watch.expect_the_end()
  jax.distributed.shutdown()  # Waits for all: they are watched on.
  watch.join(1.0)


def _initialize(hosts: Hosts) -> None:
  # Of the CPU, where jax has several ways and only this one goes by itself.
  jax.config.update("jax_cpu_collectives_implementation", "gloo")
  try:
    jax.distributed.initialize(
        coordinator_address=hosts.coordinator_address,
        num_processes=hosts.num_processes,
        process_id=hosts.process_id,
        # It misses one after half of this or later, and ends without names.
        heartbeat_timeout_seconds=2 * hosts.heartbeat_timeout_seconds,
    )
  except (ValueError, RuntimeError) as error:
    raise HostsError(
        f"--distributed: jax.distributed.initialize says: {error}. Where it "
        "cannot find the other processes by itself (TPUs, Slurm), give "
        "--coordinator_address=HOST:PORT (of process 0), --num_processes and "
        "--process_id"
    ) from error
  logging.info(
      "process %d of %d, on %d of %d devices",
      jax.process_index(),
      jax.process_count(),
      jax.local_device_count(),
      jax.device_count(),
  )


class _Watch(threading.Thread):
  """Says that this process is there, and hears who is not.

  Its words come before those of the runtime, which is given more time.
  """

  def __init__(self, hosts: Hosts):
    super().__init__(daemon=True, name="watch")
    timeout = hosts.heartbeat_timeout_seconds
    self._limit, self._interval = 0.75 * timeout, min(1.0, 0.05 * timeout)
    self._client = distributed.global_state.client
    self._coordinator = distributed.global_state.coordinator_address
    self._id, self._num = jax.process_index(), jax.process_count()
    self._ending = False
    self._told = False  # what is wrong is on the screen already
    self._ended = threading.Lock()  # whoever has it says the last words
    # process -> (what it last said, when that was heard)
    self._heard = {
        i: ("0 no word yet", time.monotonic()) for i in range(self._num)
    }
    self._failed: dict[int, float] = {}

  def run(self) -> None:
    me = f"{socket.gethostname()}, pid {os.getpid()}"
    count = 0
    while True:
      try:
        count += 1
        self._set(f"{_ALIVE}/{self._id}", f"{count} {me}")
        if self._id == 0:
          self._judge()
        verdict = self._wait_for_verdict()
      except Exception as error:  # pylint: disable=broad-except
        if not self._ending:
          self._end(
              f"process 0 of {self._num}, the coordinator at "
              f"{self._coordinator}, is not there any more "
              f"({str(error).partition(chr(10))[0]})"
          )
        return
      if verdict:
        self._end(verdict)

  def fail(self, reason: str, *, certain: bool) -> None:
    """Tells the others, and ends when it is known what was the matter."""
    with contextlib.suppress(Exception):  # The coordinator may be gone.
      self._set(
          f"{_FAILED}/{self._id}",
          json.dumps({"reason": reason, "certain": certain}),
      )
      self._told = certain
      self.join(2 * self._limit)
    self._end(f"process {self._id} of {self._num} failed: {reason}")

  def expect_the_end(self) -> None:
    """From here on a coordinator that is not there has ended well."""
    self._ending = True

  def _judge(self) -> None:
    """Of process 0: a verdict, if one is missing or has failed."""
    now = time.monotonic()
    for key, said in self._client.key_value_dir_get(_ALIVE):
      process = int(key.rpartition("/")[2])
      if said != self._heard[process][0]:
        self._heard[process] = said, now
    missing = [
        f"process {i} of {self._num} ({said.partition(' ')[2]})"
        for i, (said, when) in self._heard.items()
        if now - when > self._limit
    ]
    if missing:
      self._set(
          _VERDICT,
          f"missing: {', '.join(missing)}; not heard of for "
          f"{self._limit:.0f} s",
      )
      return
    for key, told in self._client.key_value_dir_get(_FAILED):
      process, told = int(key.rpartition("/")[2]), json.loads(told)
      since = now - self._failed.setdefault(process, now)
      # Most often it has failed because another is missing: wait for that.
      if told["certain"] or since > self._limit:
        self._set(
            _VERDICT,
            f"process {process} of {self._num} failed: {told['reason']}",
        )
        return

  def _wait_for_verdict(self) -> str:
    """The verdict, or '' after an interval without one."""
    try:
      return self._client.blocking_key_value_get(
          _VERDICT, int(1000 * self._interval)
      )
    except Exception as error:  # pylint: disable=broad-except
      if "DEADLINE_EXCEEDED" not in str(error):
        raise
      return ""

  def _set(self, key: str, value: str) -> None:
    self._client.key_value_set(key, value, allow_overwrite=True)

  def _end(self, message: str) -> None:
    """Says why and ends this process, whatever its other threads wait for."""
    if not self._ended.acquire(blocking=False):
      time.sleep(60)  # until the other thread has ended us
    sys.stdout.flush()
    sys.stderr.flush()
    if not self._told:
      os.write(2, f"\nerror: {message}. {_GO_ON}\n".encode())
    if self._id == 0:
      time.sleep(2 * self._interval)  # while others hear it: it keeps the store
    os._exit(1)
