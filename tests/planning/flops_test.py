"""Counted matmuls against XLA's own count, where it can see them all."""

import dataclasses

import jax
import jax.numpy as jnp
import pytest

from rlhf_jax.generation import decode
from rlhf_jax.models import functions, heads
from rlhf_jax.models.transformer_config import TransformerConfig
from rlhf_jax.planning import flops

# XLA counts what is not a matmul too: a percent at these widths.
BOUND = 0.015
ROWS, LENGTH = 4, 128
CONFIG = TransformerConfig(
    vocab_size=512, num_layers=2, width=256, num_heads=4, num_kv_heads=4,
    head_dim=64, ff_dim=768, max_length=256, scan_unroll=2,
)
CONFIGS = {
    "llama": CONFIG,
    "remat": dataclasses.replace(CONFIG, remat=True),
    "grouped": dataclasses.replace(
        CONFIG, num_kv_heads=2, activation="gelu", tie_head=False, head_dim=32
    ),
    "parallel, remat": dataclasses.replace(
        CONFIG, parallel_residual=True, remat=True, activation="gelu"
    ),
    "norms around, remat": dataclasses.replace(
        CONFIG, norm_placement="pre_and_post", remat=True
    ),
    "experts, remat": dataclasses.replace(
        CONFIG, num_experts=2, experts_per_token=1, remat=True
    ),
}


def xla_flops(fn, *args) -> float:
  return jax.jit(fn).lower(*args).cost_analysis()["flops"]


@pytest.mark.parametrize("name", CONFIGS)
def test_a_forward_and_a_training_pass_are_what_xla_counts(name):
  cfg = CONFIGS[name]
  params = functions.init_language_model(jax.random.key(0), cfg)
  model = functions.make_language_model(cfg)
  tokens = jnp.zeros((ROWS, LENGTH), jnp.int32)
  forward = lambda p: model.head(p)(model.hidden(p, tokens, tokens + 1))
  loss = lambda p: jnp.square(forward(p)).sum()

  matmuls = [
      *flops.trunk(cfg, ROWS, LENGTH, LENGTH), flops.head(cfg, ROWS * LENGTH)
  ]
  assert flops.total(matmuls).flops == pytest.approx(
      xla_flops(forward, params), rel=BOUND
  )
  assert flops.training(matmuls, cfg).flops == pytest.approx(
      xla_flops(jax.grad(loss), params), rel=BOUND
  )


def test_xla_would_see_a_scanned_layer_once():
  # Why the count is ours.
  params = functions.init_language_model(jax.random.key(0), CONFIG)
  tokens = jnp.zeros((ROWS, LENGTH), jnp.int32)
  hidden = lambda cfg: xla_flops(
      lambda p: functions.make_language_model(cfg).hidden(
          p, tokens, tokens + 1
      ),
      params,
  )
  scanned = hidden(dataclasses.replace(CONFIG, scan_unroll=1))
  assert scanned < 0.6 * hidden(CONFIG)


def test_prefill_and_a_decode_step_are_what_xla_counts():
  cfg = dataclasses.replace(CONFIG, scan_unroll=1, num_layers=1)
  params = functions.init_language_model(jax.random.key(0), cfg)
  generate = decode.make_generate(heads.LanguageModel(cfg))
  prompts = jnp.ones((ROWS, LENGTH), jnp.int32)
  # Of one step each, so that the loop counts as it runs.
  sampling = decode.SamplingConfig(max_new_tokens=2, eos_id=-1, greedy=True)
  counted = xla_flops(
      lambda p: generate(p, prompts, prompts, jax.random.key(0), sampling),
      params,
  )
  work = flops.prefill(cfg, ROWS, LENGTH) + flops.decode_steps(
      cfg, ROWS, LENGTH, 2
  )
  assert work.flops == pytest.approx(counted, rel=BOUND)


def test_six_flops_a_parameter_and_token():
  # The customary estimate, of a large model without attention's scores.
  matmuls = flops.trunk(CONFIG, ROWS, LENGTH, 0)
  num_weights = sum(x.weights for x in matmuls)
  work = flops.training(matmuls, CONFIG)
  assert work.flops == 6 * num_weights * ROWS * LENGTH


def test_a_frozen_base_has_gradients_of_activations_alone():
  matmuls = flops.trunk(CONFIG, ROWS, LENGTH, LENGTH, lora_rank=8)
  plain = flops.training(matmuls, CONFIG)
  frozen = flops.training(matmuls, CONFIG, frozen_base=True)
  base = [x for x in matmuls if x.weights and "lora" not in x.name]
  assert plain.flops - frozen.flops == flops.total(base).flops


def test_decoding_reads_every_weight_at_every_step():
  num_tokens = 11
  work = flops.decode_steps(CONFIG, ROWS, LENGTH, num_tokens)
  params = functions.init_language_model(jax.random.key(0), CONFIG)
  norms = (2 * CONFIG.num_layers + 1) * CONFIG.width
  num_weights = sum(x.size for x in jax.tree.leaves(params)) - norms
  assert work.weights == num_weights * (num_tokens - 1)


def test_a_head_in_chunks_runs_again_backwards_with_remat_or_without():
  chunked = dataclasses.replace(CONFIG, head_chunk_size=LENGTH - 1)
  whole, parts = (
      flops.training([flops.head(cfg, ROWS, LENGTH)], cfg)
      for cfg in (CONFIG, chunked)
  )
  once = 2 * ROWS * LENGTH * CONFIG.width * CONFIG.vocab_size
  assert (whole.flops, parts.flops) == (3 * once, 4 * once)
