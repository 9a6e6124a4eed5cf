"""Folders in buckets (gs://), for libraries that read and write disks alone."""

from collections.abc import Iterator
import contextlib
import pathlib
import tempfile

from etils import epath

# What is read piece by piece where it is, and too large to be copied.
_LARGE = (".safetensors", ".bin", ".pt", ".pth", ".gguf", ".h5", ".msgpack")


@contextlib.contextmanager
def local_copy(folder: str) -> Iterator[pathlib.Path]:
  """A folder on disk with all but the weights: itself, if it is on disk.

  Raises:
    FileNotFoundError: it is in a bucket and not there.
  """
  if _is_on_disk(folder):
    yield pathlib.Path(folder)
    return
  source = epath.Path(folder)
  if not source.exists():
    raise FileNotFoundError(f"{folder}: no such folder")
  with tempfile.TemporaryDirectory() as local:
    for path in source.iterdir():
      if path.suffix not in _LARGE and not path.is_dir():
        (pathlib.Path(local) / path.name).write_bytes(path.read_bytes())
    yield pathlib.Path(local)


@contextlib.contextmanager
def local_output(folder: str) -> Iterator[pathlib.Path]:
  """A folder on disk whose files are then in `folder`: itself, if on disk."""
  if _is_on_disk(folder):
    yield pathlib.Path(folder)
    return
  with tempfile.TemporaryDirectory() as local:
    yield pathlib.Path(local)
    target = epath.Path(folder)
    target.mkdir(parents=True, exist_ok=True)
    for path in sorted(pathlib.Path(local).iterdir()):
      (target / path.name).write_bytes(path.read_bytes())


def _is_on_disk(folder: str) -> bool:
  return "://" not in folder
