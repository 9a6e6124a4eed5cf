"""What a folder or an export cannot be is one error that names it."""

import dataclasses
import json
import shutil

import numpy as np
import pytest

from rlhf_jax.models.families import huggingface, tensor_files
from rlhf_jax.models.families.huggingface import FamilyError
from rlhf_jax.models.families.tensor_files import TensorFileError
from tests.models.families import hf_models


@pytest.fixture
def folder(tmp_path):
  return shutil.copytree(hf_models.GOLDEN / "llama", tmp_path / "llama")


def change_config(folder, **changes):
  path = folder / "config.json"
  config = json.loads(path.read_text()) | changes
  path.write_text(json.dumps(config))


def rewrite(folder, change):
  """The folder's tensors, changed as a dict of arrays."""
  reader = tensor_files.TensorReader(folder)
  arrays = {name: reader.read(name) for name in reader.names()}
  change(arrays)
  tensor_files.write_tensors(
      folder,
      [
          tensor_files.TensorSource(name, x.shape, x.dtype, lambda x=x: x)
          for name, x in arrays.items()
      ],
  )


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"hidden_act": "relu"}, "hidden_act='relu' is not implemented"),
        ({"a_new_field": 3}, "not implemented: a_new_field=3"),
        ({"model_type": "bert"}, "model_type='bert' is none of gemma2, "),
        ({"model_type": "nosuch"}, "'nosuch' is unknown"),
        (
            {"rope_parameters": {"rope_type": "longrope", "rope_theta": 1e4,
                                 "factor": 2.0}},
            "longrope|is not implemented",
        ),
    ],
)
def test_what_a_config_asks_for_and_is_not_there_is_named(
    folder, changes, message
):
  change_config(folder, **changes)
  with pytest.raises(FamilyError, match=message):
    huggingface.load_folder(folder)


@pytest.mark.parametrize(
    "rope",
    [
        {"rope_type": "default", "rope_theta": "x"},
        {"rope_type": "default", "rope_theta": float("inf")},
        {"rope_type": "linear", "rope_theta": 1e4, "factor": 0.5},
        {"rope_type": "linear", "rope_theta": 1e4, "factor": None},
        {"rope_type": "llama3", "rope_theta": 1e4, "factor": 2.0},
    ],
)
def test_rotary_parameters_that_make_no_sense_are_refused(folder, rope):
  change_config(folder, rope_parameters=rope)
  with pytest.raises(FamilyError):
    huggingface.load_folder(folder)


def write_header(path, header):
  text = json.dumps(header).encode() if isinstance(header, dict) else header
  path.write_bytes(len(text).to_bytes(8, "little") + text + bytes(64))


@pytest.mark.parametrize(
    "header",
    [
        b"[" * 100_000,
        b"{}}",
        b"[1]",
        {"a": {"dtype": ["F32"], "shape": [1], "data_offsets": [0, 4]}},
        {"a": {"dtype": "F32", "shape": [1.5], "data_offsets": [0, 4]}},
        {"a": {"dtype": "F32", "shape": "16", "data_offsets": [0, 4]}},
        {"a": {"dtype": "F32", "shape": [-1], "data_offsets": [0, -4]}},
        {"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 4]}},
        {"a": {"dtype": "F4", "shape": [1], "data_offsets": [0, 1]}},
        {"a": 3},
    ],
)
def test_damaged_headers_are_refused(folder, header):
  write_header(folder / "model.safetensors", header)
  with pytest.raises(TensorFileError, match="model.safetensors: "):
    huggingface.load_folder(folder)


@pytest.mark.parametrize("value", [3, ".", "../../etc/passwd", None])
def test_damaged_indexes_are_refused(folder, value):
  (folder / "model.safetensors").unlink()
  index = {"weight_map": {"model.norm.weight": value}}
  (folder / "model.safetensors.index.json").write_text(json.dumps(index))
  with pytest.raises(TensorFileError, match="model.safetensors.index.json: "):
    huggingface.load_folder(folder)


NORM = "model.layers.1.input_layernorm.weight"
TOO_DEEP = NORM.replace("1", "2")
BIAS = "model.layers.1.self_attn.q_proj.bias"


def test_missing_extra_and_misshapen_tensors_are_named(folder):
  for change, message in (
      (lambda x: x.pop(NORM), f"tensor {NORM} is missing"),
      (lambda x: x.update({NORM: x[NORM][:-1]}), r"has shape \[15\].* \[16\]"),
      (lambda x: x.update({NORM: x[NORM] * np.nan}), "holds NaN or Inf"),
      (lambda x: x.update({"model.new": x[NORM]}), "tensor model.new is none"),
      (lambda x: x.update({TOO_DEEP: x[NORM]}), f"tensor {TOO_DEEP} is none"),
      (lambda x: x.update({BIAS: x[NORM]}), f"tensor {BIAS} is none"),
      (lambda x: x.update({NORM: x[NORM].astype(np.int32)}), "holds int32"),
      (lambda x: x.update({NORM[6:]: x[NORM]}), "is also there as"),
  ):
    shutil.rmtree(folder)
    shutil.copytree(hf_models.GOLDEN / "llama", folder)
    rewrite(folder, change)
    with pytest.raises(TensorFileError, match=message):
      huggingface.load_folder(folder)


@pytest.mark.parametrize("keep", [0, 5, 30, 0.5, 0.99])
def test_a_truncated_file_is_named(folder, keep):
  path = folder / "model.safetensors"
  data = path.read_bytes()
  path.write_bytes(data[: int(keep * len(data)) if keep < 1 else keep])
  with pytest.raises(TensorFileError, match="model.safetensors: .*cut short"):
    huggingface.load_folder(folder)


def test_a_missing_file_of_several_is_named(folder):
  reader = tensor_files.TensorReader(folder)
  arrays = {name: reader.read(name) for name in reader.names()}
  (folder / "model.safetensors").unlink()
  with pytest.raises(TensorFileError, match="holds no .*safetensors"):
    huggingface.load_folder(folder)
  tensor_files.write_tensors(
      folder,
      [
          tensor_files.TensorSource(name, x.shape, x.dtype, lambda x=x: x)
          for name, x in arrays.items()
      ],
      max_file_bytes=4_000,
  )
  first = sorted(folder.glob("*.safetensors"))[1]
  first.unlink()
  with pytest.raises(TensorFileError, match=f"{first.name}: is missing"):
    huggingface.load_folder(folder)


def test_a_family_that_cannot_say_it_is_refused(tmp_path):
  loaded = huggingface.load_folder(hf_models.GOLDEN / "qwen3")
  with pytest.raises(FamilyError, match="llama cannot .* qk_norm='head'"):
    huggingface.save_folder(
        tmp_path, loaded.config, loaded.params, family="llama"
    )


def test_a_head_that_is_tied_and_differs_is_refused(tmp_path):
  name = "llama_tied_scaled"
  folder = shutil.copytree(hf_models.GOLDEN / name, tmp_path / name)
  embedding = "model.embed_tokens.weight"
  rewrite(folder, lambda x: x.update({"lm_head.weight": x[embedding]}))
  huggingface.load_folder(folder)
  rewrite(folder, lambda x: x.update({"lm_head.weight": x[embedding] + 1}))
  with pytest.raises(TensorFileError, match="says that they are tied"):
    huggingface.load_folder(folder)


def test_what_stands_beside_the_model_is_not_read(folder):
  shutil.copy(folder / "model.safetensors", folder / "consolidated.safetensors")
  huggingface.load_folder(folder)


@pytest.mark.parametrize("name", sorted(hf_models.MODELS))
def test_every_family_takes_a_model_as_it_is_or_refuses_it(name, tmp_path):
  loaded = huggingface.load_folder(hf_models.GOLDEN / name)
  taken = []
  for family in huggingface.family_names():
    folder = tmp_path / family
    try:
      huggingface.save_folder(
          folder, loaded.config, loaded.params, family=family
      )
    except FamilyError:
      assert not folder.exists()
      continue
    taken.append(family)
    assert huggingface.load_folder(folder).config == loaded.config
  assert hf_models.MODELS[name][0] in taken


def test_a_query_scale_that_is_the_default_is_no_obstacle(tmp_path):
  # Gemma writes it out: 0 and head_dim are the same model.
  loaded = huggingface.load_folder(hf_models.GOLDEN / "gemma2")
  for dim in (0, loaded.config.head_dim):
    config = dataclasses.replace(loaded.config, query_scale_dim=dim)
    folder = tmp_path / str(dim)
    huggingface.save_folder(folder, config, loaded.params, family="gemma2")
    assert huggingface.load_folder(folder).config == config
