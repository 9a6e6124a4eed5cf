"""Adapters in peft's folders are the same adapters here, and back there.

The golden folders were written by peft and torch (`peft_adapters.py`) and
always run; what needs them beside runs where they are installed.
"""

import dataclasses
import importlib.util
import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax.models import lora
from rlhf_jax.models.families import (
    huggingface,
    peft_export,
    peft_folder,
    peft_modules,
    tensor_files,
)
from rlhf_jax.models.families.hf_config import FamilyError
from rlhf_jax.models.families.tensor_files import TensorFileError
from rlhf_jax.models.heads import LanguageModel
from tests.models.families import hf_models, peft_adapters

needs_peft = pytest.mark.skipif(
    any(importlib.util.find_spec(x) is None for x in ("torch", "peft")),
    reason="compares with peft: pip install -e '.[torch]'",
)
# peft warns of what it sets right by itself, and of what it leaves to do.
quiet = pytest.mark.filterwarnings(
    "ignore::UserWarning", "ignore::FutureWarning"
)


def _base(name):
  model_name = peft_adapters.ADAPTERS[name][0]
  return model_name, huggingface.load_folder(hf_models.GOLDEN / model_name)


def _load(folder, name):
  model_name, base = _base(name)
  config, adapter = peft_folder.load_adapter(
      folder, hf_models.MODELS[model_name][0], base.params
  )
  return base, config, adapter


def _logits(base, variables, tokens, mask):
  apply = jax.jit(LanguageModel(base.config).apply)
  rows = (jnp.asarray(x, jnp.int32) for x in (tokens, mask))
  return np.asarray(apply(variables, *rows)[0])


def _adapted(base, config, adapter):
  return lora.variables({
      "base": base.params,
      "adapter": adapter,
      "adapter_scale": jnp.float32(config.scale),
  })


def _assert_close(ours, theirs, mask):
  assert np.abs(ours - theirs)[mask == 1].max() < 1e-4


@pytest.mark.parametrize("name", peft_adapters.COMMITTED)
def test_logits_are_those_of_peft_golden(name):
  folder = peft_adapters.GOLDEN / name
  base, config, adapter = _load(folder, name)
  expected = np.load(folder / "expected.npz")
  rows = expected["tokens"], expected["mask"]
  plain = _logits(base, {"params": base.params}, *rows)
  assert np.abs(plain - expected["logits"]).max() > 0.5
  found = _logits(base, _adapted(base, config, adapter), *rows)
  _assert_close(found, expected["logits"], rows[1])
  merged = {"params": lora.merge(base.params, adapter, config.scale)}
  _assert_close(_logits(base, merged, *rows), expected["logits"], rows[1])
  assert config.rank == 2 and config.alpha == 6 and not config.rank_stabilized


@pytest.mark.parametrize("name", peft_adapters.COMMITTED)
def test_import_of_an_export_is_bitwise_the_same(name, tmp_path):
  base, config, adapter = _load(peft_adapters.GOLDEN / name, name)
  family = hf_models.MODELS[peft_adapters.ADAPTERS[name][0]][0]
  peft_export.save_adapter(
      tmp_path, config, adapter, family=family, base=base.params
  )
  again_config, again = peft_folder.load_adapter(
      tmp_path, family, base.params
  )
  assert again_config == config
  jax.tree.map(np.testing.assert_array_equal, again, adapter)
  # What was fused there is one A again, and nothing grew.
  sizes = [
      tensor_files.TensorReader(folder, peft_modules.TENSOR_FILE)
      for folder in (tmp_path, peft_adapters.GOLDEN / name)
  ]
  assert {x: sizes[0].shape(x) for x in sizes[0].names()} == {
      x: sizes[1].shape(x) for x in sizes[1].names()
  }


# ---- With peft ---------------------------------------------------------------


@needs_peft
@quiet
@pytest.mark.parametrize("name", sorted(peft_adapters.ADAPTERS))
def test_theirs_gives_the_same_logits_here_and_merges_to_the_same(
    name, tmp_path
):
  model = peft_adapters.make_peft(name)
  model.save_pretrained(tmp_path)
  base, config, adapter = _load(tmp_path, name)
  tokens, mask = hf_models.rows("right")
  theirs = hf_models.torch_logits(model, tokens, mask)
  found = _logits(base, _adapted(base, config, adapter), tokens, mask)
  _assert_close(found, theirs, mask)
  merged = lora.merge(base.params, adapter, config.scale)
  model.merge_and_unload().save_pretrained(tmp_path / "merged")
  jax.tree.map(
      lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5),
      merged,
      huggingface.load_folder(tmp_path / "merged").params,
  )


def _random_adapter(base, config, seed=0):
  rng = np.random.default_rng(seed)
  return jax.tree.map(
      lambda x: jnp.asarray(0.2 * rng.standard_normal(x.shape), x.dtype),
      lora.init(jax.random.key(0), config, base.params),
  )


@needs_peft
@quiet
@pytest.mark.parametrize("stabilized", [False, True])
@pytest.mark.parametrize(
    ("name", "targets"),
    [
        ("llama", ("all-linear",)),
        # Fused there, and each with its own A here: all, some, and beside what
        # is not fused.
        ("gpt2", ("attention/(query|key|value)",)),
        ("gpt2", ("attention/(query|value)", "feed_forward/down")),
        ("gpt_neox", ("all-linear",)),
        ("gpt_neox", ("attention/(key|out)",)),
        ("opt", ("attention/out", "feed_forward/.*")),
        ("phi3", ("attention/(key|value)", "feed_forward/(up|down)")),
        ("mixtral", ("all-linear",)),
    ],
)
def test_ours_gives_the_same_logits_under_peft(
    name, targets, stabilized, tmp_path
):
  import peft

  model_name, base = _base(name)
  config = lora.LoraConfig(
      rank=2, alpha=5.0, targets=targets, rank_stabilized=stabilized
  )
  adapter = _random_adapter(base, config)
  family = hf_models.MODELS[model_name][0]
  peft_export.save_adapter(
      tmp_path, config, adapter, family=family, base=base.params
  )
  model = peft.PeftModel.from_pretrained(
      hf_models.make_torch(model_name), tmp_path
  ).eval()
  tokens, mask = hf_models.rows("left")
  variables = _adapted(base, config, adapter)
  ours = _logits(base, variables, tokens, mask)
  plain = _logits(base, {"params": base.params}, tokens, mask)
  assert np.abs(ours - plain).max() > 0.3
  _assert_close(ours, hf_models.torch_logits(model, tokens, mask), mask)
  # And comes back here.
  again_config, again = peft_folder.load_adapter(
      tmp_path, family, base.params
  )
  found = _logits(base, _adapted(base, again_config, again), tokens, mask)
  _assert_close(found, ours, mask)


@needs_peft
@quiet
def test_old_and_half_precision_adapters_are_read(tmp_path):
  import torch

  model = peft_adapters.make_peft("llama")
  model.to(torch.bfloat16).save_pretrained(tmp_path)
  # As published years ago: fewer fields.
  path = tmp_path / peft_modules.CONFIG_FILE
  old = "r lora_alpha target_modules peft_type bias fan_in_fan_out".split()
  fields = json.loads(path.read_text())
  path.write_text(json.dumps({name: fields[name] for name in old}))
  _, config, adapter = _load(tmp_path, "llama")
  assert config.dropout == 0.0
  _, _, wide = _load(peft_adapters.GOLDEN / "llama", "llama")
  assert jax.tree.leaves(adapter)[0].dtype == jnp.float32
  jax.tree.map(
      lambda a, b: np.testing.assert_allclose(a, b, rtol=0.01), adapter, wide
  )


@needs_peft
@quiet
@pytest.mark.parametrize("name", ["llama", "llama_everywhere", "gpt2"])
def test_gradients_of_the_adapter_are_those_of_peft(name, tmp_path):
  import torch

  model = peft_adapters.make_peft(name)
  model.save_pretrained(tmp_path / "start")
  base, config, adapter = _load(tmp_path / "start", name)
  tokens, _ = hf_models.rows("left")
  tokens = tokens[:1]  # the row without padding
  ids = torch.as_tensor(tokens)
  logprobs = torch.log_softmax(model(input_ids=ids).logits[:, :-1], -1)
  (-logprobs.gather(-1, ids[:, 1:, None]).mean()).backward()
  with torch.no_grad():
    for path, weight in model.named_parameters():
      if "lora_" in path:
        weight.copy_(weight.grad)
  # Their gradients, read as if they were an adapter.
  model.save_pretrained(tmp_path / "gradient")
  _, _, theirs = _load(tmp_path / "gradient", name)

  def loss(adapter):
    rows = jnp.asarray(tokens, jnp.int32)
    variables = _adapted(base, config, adapter)
    logits, _ = LanguageModel(base.config).apply(variables, rows)
    logprobs = jax.nn.log_softmax(logits[:, :-1])
    return -jnp.take_along_axis(logprobs, rows[:, 1:, None], -1).mean()

  ours = lora.by_projection(jax.jit(jax.grad(loss))(adapter))
  theirs = lora.by_projection(theirs)
  scale = max(float(jnp.abs(x).max()) for pair in theirs.values() for x in pair)
  for projection, (_, b) in theirs.items():
    np.testing.assert_allclose(ours[projection][1], b, atol=1e-4 * scale)
  # A fused A gets the sum of what the three copies of it get here.
  fused = [x for x in ours if x in _QKV] if name == "gpt2" else []
  for projection, (a, _) in theirs.items():
    parts = fused if projection in fused else [projection]
    found = sum(ours[part][0] for part in parts)
    np.testing.assert_allclose(found, a, atol=1e-4 * scale)


_QKV = ("attention/query", "attention/key", "attention/value")


# ---- What is refused ---------------------------------------------------------


@pytest.fixture
def folder(tmp_path):
  return shutil.copytree(peft_adapters.GOLDEN / "llama", tmp_path / "adapter")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"peft_type": "IA3"}, "peft_type='IA3' is not implemented"),
        ({"use_dora": True}, "not implemented: use_dora=True"),
        ({"bias": "lora_only"}, "bias='lora_only' is not implemented"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save=.'lm_head'"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights='pissa'"),
        ({"layers_to_transform": [0]}, "layers_to_transform=.0."),
        ({"task_type": "SEQ_CLS"}, "task_type='SEQ_CLS'"),
        ({"a_feature_of_tomorrow": 7}, "a_feature_of_tomorrow=7"),
        ({"target_modules": ["nosuch"]}, "'nosuch'.*matches no projection"),
        ({"target_modules": r".*layers\.0\..*q_proj"}, "some layers only"),
        ({"r": 0}, "0 is no rank"),
        ({"rank_pattern": {"q_proj": 2.5}}, "2.5 is no rank"),
        ({"lora_alpha": "much"}, "config.json: could not convert .*'much'"),
        ({"target_modules": "("}, "config.json: missing \\)"),
        ({"lora_dropout": 2.0}, "dropout=2.0 must be in"),
    ],
)
def test_what_a_config_asks_for_and_is_not_there_is_named(
    folder, changes, message
):
  path = folder / peft_modules.CONFIG_FILE
  path.write_text(json.dumps(json.loads(path.read_text()) | changes))
  with pytest.raises(FamilyError, match=message):
    _load(folder, "llama")


def _rewrite(folder, change):
  reader = tensor_files.TensorReader(folder, peft_modules.TENSOR_FILE)
  arrays = {name: reader.read(name) for name in reader.names()}
  change(arrays)
  tensor_files.write_file(
      folder / peft_modules.TENSOR_FILE,
      [
          tensor_files.TensorSource(name, x.shape, x.dtype, lambda x=x: x)
          for name, x in arrays.items()
      ],
  )


_Q1 = "base_model.model.model.layers.1.self_attn.q_proj.lora_A.weight"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda x: x.pop(_Q1), "layers.1.self_attn.q_proj.*is missing"),
        (
            lambda x: x.update({_Q1: x[_Q1][:1]}),
            r"has shape \[1, 16\].* it is \[2, 16\]",
        ),
        (
            lambda x: x.update({_Q1: x[_Q1] * np.nan}),
            "holds NaN or Inf",
        ),
        (
            lambda x: x.update({_Q1.replace("q_proj", "o_proj"): x[_Q1]}),
            "o_proj.* belongs to no projection",
        ),
    ],
)
def test_tensors_that_do_not_fit_are_named(folder, change, message):
  _rewrite(folder, change)
  with pytest.raises(TensorFileError, match=message):
    _load(folder, "llama")


def test_folder_without_its_files_is_told(tmp_path, folder):
  with pytest.raises(FamilyError, match="adapter_config.json: No such file"):
    _load(tmp_path, "llama")
  (folder / peft_modules.TENSOR_FILE).unlink()
  with pytest.raises(TensorFileError, match="adapter_model.safetensors: is mi"):
    _load(folder, "llama")


def test_family_that_has_no_such_projection_is_told(tmp_path):
  _, base = _base("llama")
  config = lora.LoraConfig(rank=1, alpha=1.0, targets=("feed_forward/gate",))
  adapter = lora.init(jax.random.key(0), config, base.params)
  with pytest.raises(FamilyError, match="gpt2 has no module.*feed_forward/ga"):
    peft_export.save_adapter(
        tmp_path, config, adapter, family="gpt2", base=base.params
    )
  other = dataclasses.replace(config, targets=("attention/query",))
  adapter = lora.init(jax.random.key(0), other, base.params)
  with pytest.raises(FamilyError, match="'nosuch' is none of"):
    peft_export.save_adapter(
        tmp_path, config, adapter, family="nosuch", base=base.params
    )
