"""How much memory loading takes beside the result, in a process of its own.

    python -m tests.models.families.load_memory [--limit] FOLDER=DTYPE ...

loads each folder with parameters of DTYPE and prints a JSON list of {"above",
"params", "largest"}, in bytes: the peak of resident memory over what there was
before and over the parameters; these; and their largest tensor (a layer's).
--limit forbids the process more data than the parameters, two such tensors and
SLACK, so that loading fails if it takes more.
"""

import gc
import json
import math
import pathlib
import resource
import sys

import jax
import numpy as np

from rlhf_jax.models import functions
from rlhf_jax.models.families import huggingface, tensor_files
from rlhf_jax.models.transformer_config import TransformerConfig
from tests.models.families import hf_models

SLACK = 24 * 2**20


def write_folder(folder, config: TransformerConfig, dtype) -> None:
  """A Llama all of whose values are equal, written without being held."""
  shapes = jax.eval_shape(
      lambda key: functions.init_language_model(key, config), jax.random.key(0)
  )
  value = np.asarray(0.01, dtype)
  params = jax.tree.map(lambda x: np.broadcast_to(value, x.shape), shapes)
  huggingface.save_folder(folder, config, params, family="llama")


def _status(field: str) -> int:
  for line in pathlib.Path("/proc/self/status").read_text().splitlines():
    name, _, value = line.partition(":")
    if name == field:
      return int(value.split()[0]) * 1024
  raise KeyError(field)


def _sizes(folder: str, dtype: str) -> tuple[int, int]:
  """(bytes of all parameters, of the largest tensor)."""
  reader = tensor_files.TensorReader(folder)
  counts = [math.prod(reader.shape(name)) for name in reader.names()]
  size = np.dtype(dtype).itemsize
  return size * sum(counts), size * max(counts)


def measure(folder: str, dtype: str, limited: bool) -> dict[str, int]:
  params, largest = _sizes(folder, dtype)
  gc.collect()
  pathlib.Path("/proc/self/clear_refs").write_text("5")  # forgets the peak
  before = _status("VmRSS")
  if limited:
    allowed = _status("VmData") + params + 2 * largest + SLACK
    resource.setrlimit(resource.RLIMIT_DATA, (allowed, allowed))
  loaded = huggingface.load_folder(folder, param_dtype=dtype)
  jax.block_until_ready(loaded.params)
  held = sum(x.nbytes for x in jax.tree.leaves(loaded.params))
  assert held == params
  above = _status("VmHWM") - before - params
  return {"above": above, "params": params, "largest": largest}


def main(*args: str) -> None:
  limited = "--limit" in args
  pairs = [x.split("=") for x in args if x != "--limit"]
  # Imports and compiles, which takes memory too; of 2 GB it is a small part.
  golden = [(hf_models.GOLDEN / "llama", "float32")]
  for folder, dtype in golden if limited else pairs:
    huggingface.load_folder(folder, param_dtype=dtype)
  print(json.dumps([measure(*pair, limited) for pair in pairs]))


if __name__ == "__main__":
  main(*sys.argv[1:])
