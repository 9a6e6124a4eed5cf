"""Mixtral: Mistral with a mixture of experts (arXiv 2401.04088)."""

from typing import Any

from rlhf_jax.models.families import llama, mistral
from rlhf_jax.models.families.hf_config import Fields, read_names, write_names
from rlhf_jax.models.families.table import linear
from rlhf_jax.models.transformer import TransformerConfig

ARCHITECTURES = ("Mixtral",)
PREFIX, HEAD, BUFFERS = llama.PREFIX, llama.HEAD, llama.BUFFERS

_NAMES = {
    "num_experts": "num_local_experts",
    "experts_per_token": "num_experts_per_tok",
}
_MIXTURE = f"{llama.LAYER}.block_sparse_moe"
_OURS = "layers/feed_forward"
WEIGHTS = (
    *llama.EMBEDDING,
    *llama.ATTENTION,
    *linear(f"{_MIXTURE}.gate", f"{_OURS}/router"),
    *linear(f"{_MIXTURE}.experts.{{}}.w1", f"{_OURS}/experts/gate"),
    *linear(f"{_MIXTURE}.experts.{{}}.w3", f"{_OURS}/experts/up"),
    *linear(f"{_MIXTURE}.experts.{{}}.w2", f"{_OURS}/experts/down"),
    *llama.NORMS,
)


def to_ours(hf: Fields) -> dict[str, Any]:
  """TransformerConfig fields."""
  hf.require("router_jitter_noise", 0.0)
  # What a caller gets beside the logits, and a coefficient of training.
  hf.ignore("output_router_logits", "router_aux_loss_coef")
  return {**mistral.to_ours(hf), **read_names(hf, _NAMES)}


def to_theirs(cfg: TransformerConfig) -> dict[str, Any]:
  """config.json fields."""
  return {**mistral.to_theirs(cfg), **write_names(cfg, _NAMES)}
