"""Models as plain functions of params, as the updates take them.

`segment_ids` is an attention mask (1 real, 0 padding) or the segment ids of
packed documents.
"""

import jax
import jax.numpy as jnp

from rlhf_jax.models import heads
from rlhf_jax.models.transformer import TransformerConfig


def make_logits_fn(config: TransformerConfig):
  """(params, tokens [B, T], segment_ids [B, T], last=None) -> [B, last, V]."""
  model = heads.LanguageModel(config)

  def logits_fn(params, tokens, segment_ids, last=None):
    return model.apply({"params": params}, tokens, segment_ids, last=last)[0]

  return logits_fn


def make_router_fn(config: TransformerConfig):
  """(params, tokens [B, T], segment_ids [B, T]) -> (logits, router_probs).

  router_probs [L, B, T, E] of a language model with a mixture of experts, for
  `losses.load_balancing`.
  """
  model = heads.LanguageModel(config)

  def router_fn(params, tokens, segment_ids):
    (logits, _), sown = model.apply(
        {"params": params}, tokens, segment_ids, mutable=["intermediates"]
    )
    layers = sown["intermediates"]["trunk"]["layers"]
    return logits, layers["feed_forward"]["router_probs"][0]

  return router_fn


def make_score_fn(config: TransformerConfig):
  """(params, tokens [N, T], attention_mask [N, T]) -> score [N]."""
  model = heads.ScalarModel(config)

  def score_fn(params, tokens, attention_mask):
    scalars = model.apply({"params": params}, tokens, attention_mask)
    return heads.sequence_scores(scalars, attention_mask)

  return score_fn


def make_policy_value_fn(
    policy_config: TransformerConfig, value_config: TransformerConfig | None
):
  """(params, tokens, segment_ids, last) -> (logits [B, last, V], values).

  params is {'policy': language-model params, 'value': value params}, where the
  value params are those of a whole ScalarModel of `value_config`, or, if that
  is None, of a scalar head that reads the policy's own trunk.
  """
  policy = heads.LanguageModel(policy_config)
  value = heads.ScalarModel(value_config) if value_config else None
  shared_head = heads.ScalarHead(policy_config)

  def policy_value_fn(params, tokens, segment_ids, last):
    hidden, logits, _ = policy.apply(
        {"params": params["policy"]},
        tokens,
        segment_ids,
        last=last,
        method="hidden_and_logits",
    )
    if value is None:
      return logits, shared_head.apply({"params": params["value"]}, hidden)
    values = value.apply(
        {"params": params["value"]}, tokens, segment_ids, last=last
    )
    return logits, values

  return policy_value_fn


def init_language_model(rng: jax.Array, config: TransformerConfig):
  """Fresh LanguageModel params."""
  tokens = jnp.zeros((1, 2), jnp.int32)
  return heads.LanguageModel(config).init(rng, tokens)["params"]
