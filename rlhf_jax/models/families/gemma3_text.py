"""The text model of Gemma 3 (arXiv 2503.19786).

Gemma 2 with norms of query and key, a window in five layers of six, and
rotations of its own in these.
"""

from typing import Any

from rlhf_jax.models.families import gemma2, llama
from rlhf_jax.models.families.hf_config import (
    Fields,
    read_rope_parameters,
    write_rope,
)
from rlhf_jax.models.transformer import TransformerConfig

# Its reward model's class has another name than its policy's.
ARCHITECTURES = ("Gemma3Text", "Gemma3")
PREFIX, HEAD, BUFFERS = llama.PREFIX, llama.HEAD, llama.BUFFERS
WEIGHTS = (*gemma2.WEIGHTS, *llama.QK_NORMS)


def to_ours(hf: Fields) -> dict[str, Any]:
  """TransformerConfig fields."""
  # `layer_types` has taken them in.
  hf.ignore("sliding_window_pattern", "_sliding_window_pattern")
  ours = {**gemma2.shape(hf), "qk_norm": "head"}
  rope = Fields(hf["rope_parameters"], "rope_parameters")
  full, local = rope["full_attention"], rope["sliding_attention"]
  rope.check_nothing_left()
  if "sliding_window" in ours:
    window = Fields(local, "rope_parameters.sliding_attention")
    window.require("rope_type", "default")
    ours["local_rope_theta"] = float(window["rope_theta"])
    window.check_nothing_left()
  return {**ours, **read_rope_parameters(full)}


def to_theirs(cfg: TransformerConfig) -> dict[str, Any]:
  """config.json fields."""
  theirs = {**gemma2.their_shape(cfg), **write_rope(cfg)}
  if cfg.local_rope_theta:
    theirs["rope_local_base_freq"] = cfg.local_rope_theta
  return theirs
