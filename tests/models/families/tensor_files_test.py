import jax
import numpy as np
import pytest

from rlhf_jax.models.families import tensor_files


def test_files_are_those_of_the_formats_own_library(tmp_path):
  safetensors = pytest.importorskip("safetensors.numpy")
  rng = np.random.default_rng(0)
  arrays = {
      "a": rng.normal(size=(3, 5)).astype(np.float32),
      "b": rng.integers(0, 9, (4,)).astype(np.int64),
      "c": np.array(3.0, np.float32),
      "d": np.zeros((0, 2), np.float16),
  }
  sources = [
      tensor_files.TensorSource(k, x.shape, x.dtype, lambda x=x: x)
      for k, x in arrays.items()
  ]
  tensor_files.write_tensors(tmp_path / "ours", sources)
  read = safetensors.load_file(tmp_path / "ours" / "model.safetensors")
  jax.tree.map(np.testing.assert_array_equal, read, arrays)
  (tmp_path / "theirs").mkdir()
  safetensors.save_file(arrays, tmp_path / "theirs" / "model.safetensors")
  reader = tensor_files.TensorReader(tmp_path / "theirs")
  for name, x in arrays.items():
    np.testing.assert_array_equal(reader.read(name), x)
