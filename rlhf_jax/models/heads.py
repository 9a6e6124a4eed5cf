"""Language-model and scalar heads on the one trunk.

    LanguageModel params = {"trunk": ..., "head": {"kernel" [D, V]} if untied}
    ScalarModel   params = {"trunk": ..., "head": {"kernel" [D, 1], "bias" [1]}}

The trunks have the same tree, so a reward or value model starts from a
language model by taking over its trunk. Use: `model.apply({"params": params},
...)`.
"""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Key, UInt32

from rlhf_jax.losses import masking
from rlhf_jax.models import attention, partitioning, transformer
from rlhf_jax.models.layers import INIT_STDDEV
from rlhf_jax.models.transformer import Cache
from rlhf_jax.models.transformer_config import TransformerConfig


class LanguageModel(nn.Module):
  """Next-token logits, always float32, through a tied or an own head.

  is_unrolled: see `transformer.Transformer`.
  """

  config: TransformerConfig
  is_unrolled: bool = False

  def setup(self):
    self.trunk = transformer.Transformer(self.config, self.is_unrolled)
    if not self.config.tie_head:
      self.head = VocabularyHead(self.config)

  def __call__(
      self,
      tokens: Int[Array, "B N"],
      segment_ids: Int[Array, "B N"] | None = None,
      cache: Cache | None = None,
      last: int | None = None,
  ) -> tuple[Float[Array, "B M V"], Cache | None]:
    """Logits of the last `last` positions (None: all), and the new cache.

    Args:
      segment_ids: an attention mask (1 real, 0 padding) or the segment ids of
        packed documents; None means that every token is real.
      last: static; positions before the last `last` skip the head.
    """
    hidden, cache = self.hidden(tokens, segment_ids, cache, last)
    return self.logits(hidden), cache

  def hidden(
      self,
      tokens: Int[Array, "B N"],
      segment_ids: Int[Array, "B N"] | None = None,
      cache: Cache | None = None,
      last: int | None = None,
  ) -> tuple[Float[Array, "B M D"], Cache | None]:
    """As __call__, before the head."""
    if segment_ids is None:
      segment_ids = jnp.ones_like(tokens)
    hidden, cache = self.trunk(tokens, segment_ids, cache)
    return _last(hidden, last), cache

  def logits(self, hidden: Float[Array, "B N D"]) -> Float[Array, "B N V"]:
    """The head alone, on any positions' hidden states."""
    if self.config.tie_head:
      return self.trunk.tied_logits(hidden)
    return self.head(hidden)


class VocabularyHead(nn.Module):
  config: TransformerConfig

  @nn.compact
  def __call__(self, hidden: Float[Array, "B N D"]) -> Float[Array, "B N V"]:
    cfg = self.config
    kernel = self.param(
        "kernel",
        nn.initializers.normal(INIT_STDDEV),
        (cfg.width, cfg.vocab_size),
        cfg.param_dtype,
    )
    logits = jnp.einsum(
        "bnd,dv->bnv",
        partitioning.constrain(hidden, "before_head"),
        kernel.astype(cfg.dtype),
        preferred_element_type=jnp.float32,
    )
    logits = partitioning.constrain(logits, "logits")
    return attention.softcap(logits, cfg.logit_softcap)


class ScalarModel(nn.Module):
  """One number a position: a reward model's score or a value."""

  config: TransformerConfig

  def setup(self):
    self.trunk = transformer.Transformer(self.config)
    self.head = ScalarHead(self.config)

  def __call__(
      self,
      tokens: Int[Array, "B N"],
      segment_ids: Int[Array, "B N"] | None = None,
      last: int | None = None,
  ) -> Float[Array, "B M"]:
    """Scalars of the last `last` positions (None: all), float32."""
    if segment_ids is None:
      segment_ids = jnp.ones_like(tokens)
    hidden, _ = self.trunk(tokens, segment_ids)
    return self.head(_last(hidden, last))


class ScalarHead(nn.Module):
  """hidden . kernel + bias in float32."""

  config: TransformerConfig

  @nn.compact
  def __call__(self, hidden: Float[Array, "B N D"]) -> Float[Array, "B N"]:
    width, dtype = self.config.width, self.config.param_dtype
    init = nn.initializers.normal(_head_stddev(width))
    kernel = self.param("kernel", init, (width, 1), dtype)
    bias = self.param("bias", nn.initializers.zeros, (1,), dtype)
    out = hidden.astype(jnp.float32) @ kernel.astype(jnp.float32)
    return out[..., 0] + bias.astype(jnp.float32)[None]


def scalar_head_init(
    rng: Key[Array, ""] | UInt32[Array, "2"],
    width: int,
    zero: bool,
    dtype: str = "float32",
) -> dict[str, Array]:
  """Fresh {"kernel", "bias"}: N(0, 1/sqrt(width + 1)), or all zero.

  Reference: Ziegler et al., arXiv 1909.08593, section 2.1 (reward model);
  a zero head is the customary start of a value model.
  """
  bias = jnp.zeros((1,), dtype)
  if zero:
    return {"kernel": jnp.zeros((width, 1), dtype), "bias": bias}
  kernel = jax.random.normal(rng, (width, 1), dtype)
  return {"kernel": kernel * _head_stddev(width), "bias": bias}


def scalar_from_language_model(
    lm_params: Any,
    rng: Key[Array, ""] | UInt32[Array, "2"],
    config: TransformerConfig,
    *,
    zero_head: bool,
) -> dict[str, Any]:
  """ScalarModel params: the language model's trunk under a fresh head.

  The trunk's arrays are shared, not copied; copy them before donating either.
  """
  head = scalar_head_init(rng, config.width, zero_head, config.param_dtype)
  return {"trunk": lm_params["trunk"], "head": head}


def sequence_scores(
    scalars: Float[Array, "B T"], mask: Int[Array, "B T"]
) -> Float[Array, "B"]:
  """The scalar at each row's last real token, found by index.

  Neither the side nor the amount of padding matters.
  """
  return masking.gather_last(scalars, mask)


def _last(hidden: Float[Array, "B N D"], last: int | None):
  if last is None:
    return hidden
  if not 0 < last <= hidden.shape[1]:
    raise ValueError(f"last={last} is not in 1..{hidden.shape[1]}")
  return hidden[:, hidden.shape[1] - last :]


def _head_stddev(width: int) -> float:
  return (width + 1) ** -0.5
