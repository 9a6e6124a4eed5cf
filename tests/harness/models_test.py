"""Where models are read from: stages, their checkpoints, files of others."""

import dataclasses
import json
import struct

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import sentencepiece

from configs import common
from experiments.harness import models, preflight
from experiments.harness.config import ConfigError
from rlhf_jax import checkpoint
from rlhf_jax.data.tokenizer import Tokenizer
from rlhf_jax.models import functions
from rlhf_jax.models.transformer import TransformerConfig
from rlhf_jax.types import ScoreNormalization

VOCAB_SIZE = 260


@pytest.fixture(scope="module")
def policy():
  tokenizer = Tokenizer.train_byte_level_bpe(["abc"], VOCAB_SIZE)
  config = TransformerConfig(
      vocab_size=VOCAB_SIZE,
      num_layers=1,
      width=8,
      num_heads=1,
      num_kv_heads=1,
      head_dim=8,
      ff_dim=8,
      max_length=16,
  )
  params = functions.init_language_model(jax.random.key(0), config)
  return models.Policy(config, params, tokenizer)


def scaled(policy, factor):
  return jax.tree.map(lambda x: x * factor, policy.params)


def save_checkpoints(stage, policy, scores, init_from):
  """Step k holds the policy's params times k; see `step_of`."""
  stage.mkdir(parents=True)
  settings = {
      "init_from": init_from,
      "train": {"loop": {"best_metric": "eval/score", "best_mode": "max"}},
  }
  (stage / "config.json").write_text(json.dumps(settings))
  with checkpoint.Checkpointer(
      stage / "checkpoints",
      keep_last=9,
      best_metric="eval/score",
      config=settings,
  ) as checkpointer:
    for step, score in scores.items():
      state = {"params": scaled(policy, step)}
      checkpointer.save(step, state, {}, {"eval/score": score})


def step_of(policy, place):
  """The step whose params are at `place`."""
  found = models.load_policy(place)
  ratios = jax.tree.map(np.divide, found.params, policy.params)
  [step] = np.unique(
      np.concatenate([np.round(x).ravel() for x in jax.tree.leaves(ratios)])
  )
  return step


@pytest.fixture
def stage(policy, tmp_path):
  """A stage that has not ended, under a name with an @ in it."""
  run = tmp_path / "me@lab"
  models.save_policy(run / "pretrain", policy)
  stage = run / "sft"
  save_checkpoints(
      stage, policy, {10: 0.5, 20: 0.9, 30: 0.1}, "@run/pretrain"
  )
  return stage


@pytest.mark.parametrize("which, step", [("last", 30), ("best", 20), (10, 10)])
def test_checkpoints_of_a_stage_that_goes_on_are_places(
    policy, stage, which, step
):
  assert step_of(policy, f"{stage}@{which}") == step


def test_a_checkpoint_is_computed_with_as_in_its_stage(policy, tmp_path):
  models.save_policy(tmp_path / "pretrain", policy)
  half = dataclasses.replace(
      policy,
      params=jax.tree.map(lambda x: x.astype("bfloat16"), policy.params),
  )
  stage = tmp_path / "sft"
  save_checkpoints(stage, half, {2: 0.5}, "@run/pretrain")
  path = stage / "config.json"
  section = common.compute(
      dtype="bfloat16", param_dtype="bfloat16", remat=True,
      attention_backend="cudnn",  # which is not on every machine
  )
  path.write_text(json.dumps(
      json.loads(path.read_text()) | {"compute": section.to_dict()}
  ))
  config = models.load_policy(f"{stage}@last").config
  assert config.dtype == config.param_dtype == "bfloat16" and config.remat
  assert config.attention_backend == "auto"


def test_an_unfinished_newest_checkpoint_is_passed_over(policy, stage):
  (stage / "checkpoints/step_00000030/checkpoint.json").unlink()
  assert step_of(policy, f"{stage}@last") == 20


def test_best_of_a_stage_that_keeps_none_is_told(stage):
  path = stage / "config.json"
  path.write_text(path.read_text().replace("eval/score", ""))
  with pytest.raises(FileNotFoundError, match="kept no best checkpoint"):
    models.load_policy(f"{stage}@best")


def test_an_at_sign_in_a_path_is_part_of_it(policy, stage):
  assert step_of(policy, str(stage.parent / "pretrain")) == 1
  with pytest.raises(FileNotFoundError, match="me@lab/sft@lst holds .*@last"):
    models.load_policy(f"{stage}@lst")


@pytest.mark.parametrize("place, message", [
    ("peft:adapter:base", "adapter is peft:ADAPTER:hf:FOLDER"),
    ("peft:adapter:hf:", "adapter is peft:ADAPTER:hf:FOLDER"),
    ("hf:", "'hf:' names no folder"),
])
def test_what_is_no_place_is_told(place, message):
  load = (models.load_policy, models.load_reward_model, models.load_tokenizer)
  for function in load:
    with pytest.raises(ConfigError, match=message):
      function(place)
  [problem] = preflight.problems("ppo", Named(place))
  assert message.strip("'") in problem


@dataclasses.dataclass
class Named:
  """A section with a place."""

  init_from: str


def test_a_folder_of_others_is_told_from_a_stage_that_goes_on(tmp_path, stage):
  (tmp_path / "config.json").write_text('{"model_type": "llama"}')
  message = f"did you mean hf:{tmp_path}"
  load = (models.load_policy, models.load_reward_model, models.load_tokenizer)
  for function in load:
    with pytest.raises(FileNotFoundError, match=message):
      function(str(tmp_path))
    with pytest.raises(FileNotFoundError, match="name the workdir"):
      function(str(stage.parent))
  with pytest.raises(FileNotFoundError, match="or for a policy one of its"):
    models.load_policy(str(stage))
  [problem] = preflight.problems("ppo", Named(str(tmp_path)))
  assert message in problem


# ---- The model and its tokenizer ---------------------------------------------


def assert_refused(load, place, *, tokenizer, model):
  with pytest.raises(checkpoint.CheckpointError) as error:
    load(place)
  message = str(error.value)
  assert message.startswith(place)
  assert f"tokenizer has {tokenizer} tokens" in message
  assert f"model's vocabulary {model}" in message


def test_a_tokenizer_that_is_larger_than_the_model_is_refused(
    policy, stage, tmp_path
):
  larger = Tokenizer.train_byte_level_bpe(["abcd efgh " * 9], VOCAB_SIZE + 3)
  sizes = dict(tokenizer=larger.vocab_size, model=VOCAB_SIZE)
  assert larger.vocab_size > VOCAB_SIZE
  models.save_policy(stage.parent / "odd", policy)
  larger.save(stage.parent / "odd" / "tokenizer")
  assert_refused(models.load_policy, str(stage.parent / "odd"), **sizes)

  normalization = ScoreNormalization(gain=jnp.float32(1), bias=jnp.float32(0))
  reward_model = models.RewardModel(
      policy.config, policy.params, normalization, larger
  )
  models.save_reward_model(tmp_path / "reward", reward_model)
  assert_refused(models.load_reward_model, str(tmp_path / "reward"), **sizes)


def test_a_llama2c_model_with_another_tokenizer_is_refused(tmp_path):
  # dim, hidden_dim, n_layers, n_heads, n_kv_heads, vocab_size, seq_len
  header = (8, 12, 1, 2, 1, 300, 16)
  num_weights = 300 * 8 + (2 * 8 + 2 * 64 + 2 * 32 + 3 * 96) + 8 + 16 * 4
  (tmp_path / "model.bin").write_bytes(
      struct.pack("<7i", *header) + bytes(4 * num_weights)
  )
  texts = [" ".join(map(str, range(i, i + 30))) for i in range(999)]
  for size in (290, 310):
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(texts),
        model_prefix=str(tmp_path / str(size)),
        vocab_size=size,
        model_type="bpe",
        minloglevel=2,
    )
  place = f"llama2c:{tmp_path}/model.bin:{tmp_path}/{{}}.model"
  # Padded vocabularies are common.
  assert models.load_policy(place.format(290)).tokenizer.vocab_size == 290
  assert_refused(
      models.load_policy, place.format(310), tokenizer=310, model=300
  )
