"""How a stage computes with models that it did not make."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import common
from experiments.harness import models
from experiments.harness.compute import ComputeConfig
from experiments.harness.config import ConfigError, from_config
from rlhf_jax.data.tokenizer import Tokenizer
from rlhf_jax.models import functions, heads
from rlhf_jax.types import ScoreNormalization
from tests.models.small import random_params, small_config

TOKENIZER = Tokenizer.train_byte_level_bpe(["abc"], 260)
CONFIG = small_config(vocab_size=260)


@pytest.fixture(scope="module")
def places(tmp_path_factory):
  """A policy and a reward model on disk, beside what loads them."""
  folder = tmp_path_factory.mktemp("models")
  policy = models.Policy(
      CONFIG, random_params(heads.LanguageModel(CONFIG)), TOKENIZER
  )
  models.save_policy(folder / "policy", policy)
  one = ScoreNormalization(gain=jnp.float32(1), bias=jnp.float32(0))
  models.save_reward_model(
      folder / "reward",
      models.RewardModel(
          CONFIG, random_params(heads.ScalarModel(CONFIG)), one, TOKENIZER
      ),
  )
  return {
      str(folder / "policy"): models.load_policy,
      str(folder / "reward"): models.load_reward_model,
  }


def _compute(**changes) -> ComputeConfig:
  return from_config(ComputeConfig, common.compute(**changes))


def test_nothing_given_is_the_model_as_it_was_saved(places):
  for place, load in places.items():
    saved, loaded = load(place), load(place, _compute())
    assert loaded.config == saved.config
    jax.tree.map(np.testing.assert_array_equal, loaded.params, saved.params)


def test_policy_and_reward_model_compute_as_the_stage_says(places):
  compute = _compute(
      dtype="bfloat16",
      param_dtype="bfloat16",
      remat=True,
      scan_unroll=2,
      head_chunk_size=7,
      attention_backend="xla",
  )
  for place, load in places.items():
    saved, loaded = load(place), load(place, compute)
    assert loaded.config == dataclasses.replace(
        saved.config, **dataclasses.asdict(compute)
    )
    dtypes = {x.dtype for x in jax.tree.leaves(loaded.params)}
    assert dtypes == {jnp.dtype("bfloat16")}
  assert functions.make_language_model(loaded.config).chunk_size == 7


def test_layers_that_do_not_divide_are_told_with_the_place(places):
  for place, load in places.items():
    with pytest.raises(ConfigError, match=f"{place}: scan_unroll=5 must"):
      load(place, _compute(scan_unroll=5))


def test_a_kernel_of_another_platform_is_refused_when_it_is_loaded(places):
  for place, load in places.items():
    with pytest.raises(ConfigError, match=f"{place}: .*splash.*needs a tpu"):
      load(place, _compute(attention_backend="splash"))


@pytest.mark.parametrize(
    "changes,message",
    [
        ({"dtype": "float16"}, "dtype"),
        ({"attention_backend": "flash"}, "attention_backend"),
        ({"head_chunk_size": 0}, "head_chunk_size=0"),
    ],
)
def test_what_is_no_way_to_compute_is_refused(changes, message):
  with pytest.raises(ConfigError, match=message):
    _compute(**changes)
