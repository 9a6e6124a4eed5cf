"""One run a workdir: a lock that goes with whoever holds it.

It is the kernel's lock (flock) on `lock` in the folder, so it ends with its
process whichever way that ends, SIGKILL too. The file stays and says who was
last; what counts is who holds it. Within one process a folder may be taken
again: a second run there comes after the first.
"""

import errno
import fcntl
import json
import os
import pathlib
import socket
import sys
import weakref

from absl import logging

FILE = "lock"

_UNSUPPORTED = (errno.ENOTSUP, errno.ENOLCK, errno.ENOSYS, errno.EINVAL)


class WorkdirError(RuntimeError):
  """A workdir cannot be written to, or another run is in it."""


class Lock:
  """Held while the object lives; see `hold`."""

  def __init__(self, folder: pathlib.Path):
    self._release = lambda: None
    fd = _open(folder)
    try:
      fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
      owner = _owner(fd)
      os.close(fd)
      raise WorkdirError(
          f"{folder} is in use by {owner}: two runs would overwrite one "
          "another. Wait for its end or stop it, or give another --workdir"
      ) from None
    except OSError as error:
      if error.errno not in _UNSUPPORTED:
        os.close(fd)
        raise
      logging.warning(
          "%s cannot be locked (%s): see that no other run writes there",
          folder,
          error.strerror,
      )
    else:
      _sign(fd)
    self._release = weakref.finalize(self, os.close, fd)

  def release(self) -> None:
    """Lets others in; happens by itself when nothing refers to the lock."""
    self._release()


_held: weakref.WeakValueDictionary[pathlib.Path, Lock] = (
    weakref.WeakValueDictionary()
)


def hold(folder: str | os.PathLike) -> Lock:
  """The lock of `folder`, which is made if it is not there.

  Raises:
    WorkdirError: another process has it (with which, and where it runs), or the
      folder cannot be written to.
  """
  folder = pathlib.Path(folder)
  try:
    folder.mkdir(parents=True, exist_ok=True)
  except OSError as error:
    raise _not_writable(folder, error.strerror) from error
  # Two names of one folder are one folder.
  folder = folder.resolve()
  lock = _held.get(folder)
  if lock is None:
    lock = _held[folder] = Lock(folder)
  return lock


def _open(folder: pathlib.Path) -> int:
  # A file that is there already may be open to us in a folder that is not.
  if not os.access(folder, os.W_OK | os.X_OK):
    raise _not_writable(folder, "read-only, or another user's")
  try:
    return os.open(folder / FILE, os.O_RDWR | os.O_CREAT, 0o644)
  except OSError as error:
    raise _not_writable(folder, error.strerror) from error


def _not_writable(folder: pathlib.Path, reason: str) -> WorkdirError:
  return WorkdirError(
      f"cannot write to the workdir {folder}: {reason}; give another "
      "--workdir, or make this one writable"
  )


def _sign(fd: int) -> None:
  """Says who holds the lock, for the message to others alone."""
  mine = {
      "pid": os.getpid(),
      "host": socket.gethostname(),
      "command": " ".join([pathlib.Path(sys.argv[0]).name, *sys.argv[1:]]),
  }
  try:
    os.ftruncate(fd, 0)
    os.pwrite(fd, json.dumps(mine).encode() + b"\n", 0)
  except OSError:  # A full disk says so where it matters.
    pass


def _owner(fd: int) -> str:
  try:
    found = json.loads(os.pread(fd, 1 << 16, 0))
    return f"process {found['pid']} on {found['host']} ({found['command']})"
  except (ValueError, TypeError, KeyError):
    return "another process"  # which is about to say who it is
