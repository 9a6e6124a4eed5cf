"""What loading costs in memory, and where the parameters go."""

import json
import os
import subprocess
import sys

import jax
import numpy as np
import pytest

from rlhf_jax.models.families import huggingface
from rlhf_jax.models.transformer_config import TransformerConfig
from tests.models.families import bucket, hf_models, load_memory

needs_linux = pytest.mark.skipif(
    not os.path.exists("/proc/self/clear_refs"),
    reason="reads the peak of memory from Linux's /proc",
)
SHAPE = dict(
    vocab_size=8_000,
    num_layers=3,
    width=512,
    num_heads=8,
    num_kv_heads=8,
    head_dim=64,
    ff_dim=2_048,
    max_length=64,
    tie_head=False,
)


def memory_of(*args):
  # So that what is freed goes back to the system and is not counted.
  malloc = {"MALLOC_MMAP_THRESHOLD_": "131072", "XLA_FLAGS": ""}
  done = subprocess.run(
      [sys.executable, "-m", "tests.models.families.load_memory", *args],
      capture_output=True,
      text=True,
      timeout=500,
      env=os.environ | malloc,
  )
  assert done.returncode == 0, done.stderr[-2000:]
  return json.loads(done.stdout.splitlines()[-1])


@needs_linux
def test_loading_holds_two_tensors_at_most_beside_the_result(tmp_path):
  args = []
  for given, wanted in (
      ("float32", "float32"),
      ("float16", "float32"),
      ("float32", "bfloat16"),
  ):
    load_memory.write_folder(
        tmp_path / given, TransformerConfig(**SHAPE), given
    )
    args.append(f"{tmp_path / given}={wanted}")
  for arg, found in zip(args, memory_of(*args), strict=True):
    assert found["params"] > 5 * found["largest"]
    bound = 2 * found["largest"] + load_memory.SLACK // 8
    assert found["above"] < bound, (arg, found)


@needs_linux
@pytest.mark.skipif(
    not os.environ.get("RLHF_JAX_LARGE_TESTS"),
    reason="writes and loads 2 GB: set RLHF_JAX_LARGE_TESTS=1",
)
def test_two_gigabytes_load_under_a_limit(tmp_path):
  config = TransformerConfig(
      **SHAPE
      | dict(vocab_size=32_000, num_layers=8, width=2_048, ff_dim=5_632)
      | dict(num_heads=16, num_kv_heads=16, head_dim=128)
  )
  load_memory.write_folder(tmp_path, config, "float32")
  (found,) = memory_of("--limit", f"{tmp_path}=float32")
  assert found["params"] > 2 * 10**9
  assert found["above"] < 2 * found["largest"] + load_memory.SLACK


@pytest.mark.parametrize("name", ["gpt_neox", "mixtral"])
def test_parameters_go_straight_to_their_sharded_places(name):
  """Along the width of kernels and tables, and along the layers of norms."""
  folder = hf_models.GOLDEN / name
  mesh = jax.sharding.Mesh(np.asarray(jax.devices()[:2]), ("data",))

  def sharding(path, shape):
    spec = [None] * len(shape)
    spec[0 if path.endswith("scale") or len(shape) == 1 else -1] = "data"
    return jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(*spec))

  expected = huggingface.load_folder(folder).params
  params = huggingface.load_folder(folder, sharding=sharding).params
  jax.tree.map(np.testing.assert_array_equal, params, expected)
  for path, leaf in jax.tree_util.tree_leaves_with_path(params):
    key = jax.tree_util.keystr(path, simple=True, separator="/")
    assert leaf.sharding.is_equivalent_to(
        sharding(key, leaf.shape), leaf.ndim
    ), (key, leaf.sharding)
    half = leaf.addressable_shards[0].data
    assert half.size * 2 == leaf.size, key


def test_folders_in_a_bucket_are_read_and_written(tmp_path):
  written = huggingface.load_folder(hf_models.GOLDEN / "llama")
  with bucket.mocked(tmp_path):
    huggingface.save_folder(
        "gs://bucket/model", written.config, written.params, family="llama"
    )
    loaded = huggingface.load_folder("gs://bucket/model")
  assert (tmp_path / "model" / "config.json").exists()
  assert loaded.config == written.config
  jax.tree.map(np.testing.assert_array_equal, loaded.params, written.params)
