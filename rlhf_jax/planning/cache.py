"""What was compiled once is not compiled again.

A plan needs what the compiler said of a program, not the program. That is kept
under a hash of what the program is before it is compiled (its lowered text,
with shapes and shardings), of what it is compiled for and of what compiles it:

    <key>.json     its memory, or why the compiler refused it
    <key>.txt.gz   its text, in which the collectives are
"""

import dataclasses
import gzip
import hashlib
import importlib.metadata
import json
import os
import pathlib

import jax
import jaxlib

from rlhf_jax.planning import memory
from rlhf_jax.planning.memory import MemoryUse, TooLarge

FOLDER = pathlib.Path("~/.cache/rlhf_jax/plans")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Compiled:
  """What a plan takes of a compiled program.

  memory: None where the compiler refused it, for the reason in `refusal`.
  text: compiled; '' where it was refused.
  was_cached: it was not compiled now.
  """

  memory: MemoryUse | None
  text: str
  refusal: TooLarge | None
  was_cached: bool


def compiled(
    lowered: jax.stages.Lowered, target: str, folder: pathlib.Path
) -> Compiled:
  """Compiles, or finds what was.

  Args:
    target: what it is compiled for: a topology, or the devices here.
  """
  name = key(lowered, target)
  folder = folder.expanduser()
  try:
    return _read(folder, name)
  except (OSError, EOFError, ValueError, TypeError):
    pass  # Not there, or not whole.
  try:
    program, text = memory.compile_program(lowered)
  except TooLarge as error:
    found = Compiled(memory=None, text="", refusal=error, was_cached=False)
  else:
    found = Compiled(
        memory=memory.memory_use(program),
        text=text,
        refusal=None,
        was_cached=False,
    )
  _write(folder, name, found)
  return found


def key(lowered: jax.stages.Lowered, target: str) -> str:
  """Of a program, what it is compiled for and what compiles it."""
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


def _read(folder: pathlib.Path, name: str) -> Compiled:
  info = json.loads((folder / f"{name}.json").read_text(encoding="utf-8"))
  if info["refusal"] is not None:
    return Compiled(
        memory=None, text="", refusal=TooLarge(info["refusal"]), was_cached=True
    )
  text = gzip.decompress((folder / f"{name}.txt.gz").read_bytes()).decode()
  return Compiled(
      memory=MemoryUse(**info["memory"]),
      text=text,
      refusal=None,
      was_cached=True,
  )


def _write(folder: pathlib.Path, name: str, found: Compiled) -> None:
  info = {
      "memory": found.memory and dataclasses.asdict(found.memory),
      "refusal": found.refusal and str(found.refusal),
  }
  folder.mkdir(parents=True, exist_ok=True)
  # The text first: what has a .json has all.
  files = {
      f"{name}.txt.gz": gzip.compress(found.text.encode(), mtime=0),
      f"{name}.json": json.dumps(info).encode(),
  }
  for file, data in files.items():
    partial = folder / f"{file}.{os.getpid()}"
    partial.write_bytes(data)
    partial.replace(folder / file)
