"""What was compiled once is not compiled again.

A plan needs a compiled program's numbers, not the program. They are kept under
a hash of what the program is before it is compiled (its lowered text, with
shapes and shardings), of what it is compiled for and of what compiles it.
"""

from collections.abc import Callable
import hashlib
import importlib.metadata
import json
import os
import pathlib
from typing import Any

import jax
import jaxlib

FOLDER = pathlib.Path("~/.cache/rlhf_jax/plans")


def key(lowered: jax.stages.Lowered, target: str) -> str:
  """Of a program and what it is compiled for: a topology, or devices here."""
  parts = [
      lowered.as_text(),
      target,
      jax.__version__,
      jaxlib.__version__,
      _libtpu_version(),
      os.environ.get("XLA_FLAGS", ""),
      os.environ.get("LIBTPU_INIT_ARGS", ""),
  ]
  return hashlib.sha256("\0".join(parts).encode()).hexdigest()


def _libtpu_version() -> str:
  try:
    return importlib.metadata.version("libtpu")
  except importlib.metadata.PackageNotFoundError:
    return ""


def numbers(
    folder: pathlib.Path, key: str, compute: Callable[[], dict[str, Any]]
) -> tuple[dict[str, Any], bool]:
  """(what `compute` gives as JSON, whether it was there).

  What cannot be read, as a file that another process is writing, is computed.
  """
  path = folder.expanduser() / f"{key}.json"
  try:
    return json.loads(path.read_text(encoding="utf-8")), True
  except (FileNotFoundError, json.JSONDecodeError):
    pass
  found = compute()
  path.parent.mkdir(parents=True, exist_ok=True)
  # A whole file or none, whoever else writes it.
  partial = path.with_suffix(f".{os.getpid()}")
  partial.write_text(json.dumps(found), encoding="utf-8")
  partial.replace(path)
  return found, False
