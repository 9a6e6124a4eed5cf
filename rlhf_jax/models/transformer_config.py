"""The config that chooses the features of the one decoder."""

import dataclasses
import math
from typing import Literal

from rlhf_jax.models import attention

_CHOICES = {
    "position": ("rotary", "learned"),
    "norm": ("rmsnorm", "layernorm"),
    "norm_placement": ("pre", "post", "pre_and_post"),
    "activation": ("swiglu", "geglu", "gelu", "gelu_exact", "relu"),
    "attention_bias": ("none", "qkv", "all"),
    "qk_norm": ("none", "head", "whole"),
    "attention_backend": ("auto", "xla", "cudnn", "splash"),
    "dtype": ("float32", "bfloat16"),
    "param_dtype": ("float32", "bfloat16"),
}
_POSITIVE = (
    "vocab_size num_layers width num_heads num_kv_heads head_dim ff_dim "
    "max_length scan_unroll head_chunk_size norm_epsilon rope_theta "
    "rotary_fraction"
).split()
_NOT_NEGATIVE = (
    "query_scale_dim attention_softcap logit_softcap local_rope_theta "
    "sliding_window num_experts experts_per_token"
).split()


@dataclasses.dataclass(frozen=True, kw_only=True)
class TransformerConfig:
  """The shape of a decoder; hashable, so that it can be static under jit.

  num_kv_heads: fewer than num_heads is grouped-query attention.
  head_dim: need not be width / num_heads.
  ff_dim: of the feed-forward, or of each of its experts.
  max_length: longest row, and the rows of the learned position table.
  norm_placement: norms before attention and feed-forward, after them (but
    before the residual addition, as in OLMo 2), or both (Gemma 2).
  norm_from_one: norms multiply by 1 + their scale, which starts at 0 (Gemma).
  activation: 'swiglu' and 'geglu' (of tanh) have a gate; 'gelu' is the tanh
    approximation, as in GPT-2; 'gelu_exact' the one with erf.
  attention_bias: on no projection, on query, key and value, or on out too.
  norm_bias: of layernorm.
  qk_norm: norms query and key before they are rotated; 'head' each head over
    its width (Qwen3), 'whole' all heads together (OLMo 2).
  query_scale_dim: attention scores are divided by its root; 0 is head_dim.
  attention_softcap, logit_softcap: scores, logits become cap * tanh(x / cap),
    in float32 (Gemma 2); 0 leaves them as they are.
  parallel_residual: attention and feed-forward read the same x (GPT-NeoX).
  scale_embedding: embeddings times sqrt(width), rounded to dtype (Gemma).
  rotary_fraction: share of a head's width that is rotated, from its start.
  rope_scaling: how frequencies are changed for longer texts.
  sliding_window: a token sees so many, itself included; 0 is all before it.
  full_attention_layers: those, counted from 0, that see all in spite of
    sliding_window.
  local_rope_theta: of the layers with a window, which rope_scaling does not
    concern then (Gemma 3); 0: they are rotated like the others.
  num_experts: feed-forwards a layer, of which a router weighs the best
    experts_per_token for each token (Mixtral); both 0 is one, without a router.
  dtype: of activations and matmuls; param_dtype: of the stored parameters
    (training keeps float32; in bfloat16 small steps round away).
  remat: recompute each layer in the backward pass instead of storing it.
  scan_unroll: layers a scan iteration; more is faster to run on CPU and slower
    to compile.
  head_chunk_size: positions of a row whose logits exist at a time where a loss
    measures them.
  attention_backend: 'xla' computes all scores, 'cudnn' and 'splash' are the
    kernels of `attention_kernels.py`, 'auto' is the one of the platform.
    Decoding over a cache is always 'xla'. This and the three before change
    memory and speed, and a result by no more than rounding.
  """

  vocab_size: int
  num_layers: int
  width: int
  num_heads: int
  num_kv_heads: int
  head_dim: int
  ff_dim: int
  max_length: int
  position: Literal["rotary", "learned"] = "rotary"
  norm: Literal["rmsnorm", "layernorm"] = "rmsnorm"
  norm_placement: Literal["pre", "post", "pre_and_post"] = "pre"
  norm_from_one: bool = False
  activation: Literal["swiglu", "geglu", "gelu", "gelu_exact", "relu"] = (
      "swiglu"
  )
  attention_bias: Literal["none", "qkv", "all"] = "none"
  feed_forward_bias: bool = False
  norm_bias: bool = False
  qk_norm: Literal["none", "head", "whole"] = "none"
  query_scale_dim: int = 0
  attention_softcap: float = 0.0
  logit_softcap: float = 0.0
  parallel_residual: bool = False
  tie_head: bool = True
  scale_embedding: bool = False
  norm_epsilon: float = 1e-5
  rope_theta: float = 10000.0
  rotary_fraction: float = 1.0
  rope_scaling: attention.RopeScaling | None = None
  sliding_window: int = 0
  full_attention_layers: tuple[int, ...] = ()
  local_rope_theta: float = 0.0
  num_experts: int = 0
  experts_per_token: int = 0
  dtype: Literal["float32", "bfloat16"] = "float32"
  param_dtype: Literal["float32", "bfloat16"] = "float32"
  remat: bool = False
  scan_unroll: int = 1
  head_chunk_size: int = 128
  attention_backend: Literal["auto", "xla", "cudnn", "splash"] = "auto"

  def __post_init__(self):
    for name in _POSITIVE:
      if not 0 < getattr(self, name) < math.inf:
        raise ValueError(f"{name} must be positive, got {getattr(self, name)}")
    for name in _NOT_NEGATIVE:
      if not 0 <= getattr(self, name) < math.inf:
        raise ValueError(
            f"{name} must be 0 or greater, got {getattr(self, name)}"
        )
    for name, choices in _CHOICES.items():
      if getattr(self, name) not in choices:
        raise ValueError(
            f"{name} must be one of {', '.join(choices)}, got "
            f"{getattr(self, name)!r}"
        )
    self._check_shapes()
    self._check_windows()
    if self.query_scale_dim == self.head_dim:
      # One config for one model: 0 says the same.
      object.__setattr__(self, "query_scale_dim", 0)

  def _check_shapes(self):
    if self.num_heads % self.num_kv_heads:
      raise ValueError(
          f"num_heads={self.num_heads} must be a multiple of "
          f"num_kv_heads={self.num_kv_heads}"
      )
    if self.position == "rotary" and self.rotary_dim % 2:
      raise ValueError(
          f"rotary_fraction={self.rotary_fraction} of head_dim={self.head_dim} "
          "must be even with position='rotary'"
      )
    if self.rotary_fraction > 1:
      raise ValueError(
          f"rotary_fraction={self.rotary_fraction} must be at most 1"
      )
    if self.num_layers % self.scan_unroll:
      raise ValueError(
          f"scan_unroll={self.scan_unroll} must divide "
          f"num_layers={self.num_layers}"
      )
    if self.experts_per_token > self.num_experts or (
        self.num_experts and not self.experts_per_token
    ):
      raise ValueError(
          f"experts_per_token={self.experts_per_token} must be in "
          f"1..num_experts={self.num_experts}"
      )

  def _check_windows(self):
    full = self.full_attention_layers
    inside = all(0 <= layer < self.num_layers for layer in full)
    if list(full) != sorted(set(full)) or not inside:
      raise ValueError(
          f"full_attention_layers={full} must ascend within "
          f"0..num_layers-1={self.num_layers - 1}"
      )
    if len(full) == self.num_layers:
      raise ValueError(
          "full_attention_layers names every layer: set sliding_window=0"
      )
    if not self.sliding_window and (full or self.local_rope_theta):
      raise ValueError(
          f"full_attention_layers={full} and "
          f"local_rope_theta={self.local_rope_theta} need a sliding_window"
      )

  @property
  def rotary_dim(self) -> int:
    """How many of a head's dimensions are rotated."""
    return int(self.head_dim * self.rotary_fraction)

  @property
  def query_scale(self) -> float:
    """What queries are multiplied by."""
    return (self.query_scale_dim or self.head_dim) ** -0.5
