"""Models taken away in Hugging Face's layout, and brought back."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments import export, sft
from experiments.harness import cli, models
from experiments.harness.config import from_config
from rlhf_jax.models import functions
from rlhf_jax.models.families import huggingface
from tests.experiments import tiny
from tests.models.families import hf_models


def test_a_trained_policy_comes_back_bitwise_with_its_tokenizer(
    finished_run, tmp_path
):
  folder = tmp_path / "out"
  export.export(str(finished_run / "ppo"), "llama", str(folder), "policy")
  ours = models.load_policy(str(finished_run / "ppo"))
  back = models.load_policy(f"hf:{folder}")
  assert back.config == ours.config
  jax.tree.map(np.testing.assert_array_equal, back.params, ours.params)
  text = "What color is the cat?\n"
  assert back.tokenizer.encode(text) == ours.tokenizer.encode(text)
  config = json.loads((folder / "config.json").read_text())
  assert config["architectures"] == ["LlamaForCausalLM"]
  assert config["eos_token_id"] == ours.tokenizer.eos_id
  with pytest.raises(cli.UserError, match="holds a model already"):
    export.export(str(finished_run / "ppo"), "llama", str(folder), "policy")


def test_a_reward_model_keeps_the_differences_of_its_scores(
    finished_run, tmp_path
):
  folder = tmp_path / "out"
  export.export(
      str(finished_run / "reward"), "llama", str(folder), "reward_model"
  )
  ours = models.load_reward_model(str(finished_run / "reward"))
  back = models.load_reward_model(f"hf:{folder}")
  tokens = np.random.default_rng(0).integers(3, tiny.VOCAB_SIZE, (5, 9))
  rows = jnp.asarray(tokens, jnp.int32)
  raw = [
      functions.make_score_fn(x.config)(x.params, rows, jnp.ones_like(rows))
      for x in (ours, back)
  ]
  scores = raw[0] * float(ours.normalization.gain)
  np.testing.assert_allclose(
      np.diff(raw[1]), np.diff(scores), rtol=1e-4, atol=1e-6
  )
  with pytest.raises(FileNotFoundError, match="a policy is needed here"):
    models.load_policy(f"hf:{folder}")


@pytest.mark.parametrize("name", ["llama", "gpt_neox", "gpt2"])
def test_sft_of_an_imported_model_and_its_way_back(
    finished_run, tmp_path, name
):
  """Of a golden model's shape, with a vocabulary that a tokenizer has."""
  golden = huggingface.load_folder(hf_models.GOLDEN / name)
  config = dataclasses.replace(golden.config, vocab_size=tiny.VOCAB_SIZE)
  params = functions.init_language_model(jax.random.key(0), config)
  start = tmp_path / "start"
  huggingface.save_folder(start, config, params, family=name)
  tokenizer = models.load_policy(str(finished_run / "sft")).tokenizer
  tokenizer.save(start)

  settings = tiny.stage("sft", finished_run)
  settings.init_from = f"hf:{start}"
  sft.run(from_config(sft.Config, settings), str(tmp_path / "sft"))
  export.export(str(tmp_path / "sft"), name, str(tmp_path / "out"), "policy")
  trained = models.load_policy(str(tmp_path / "sft"))
  back = models.load_policy(f"hf:{tmp_path / 'out'}")
  assert back.config == trained.config == config
  jax.tree.map(np.testing.assert_array_equal, back.params, trained.params)
  first = jax.tree.leaves(params)[0]
  assert not np.array_equal(first, jax.tree.leaves(trained.params)[0])
