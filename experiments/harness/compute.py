"""How a stage computes with models that it did not make."""

import dataclasses
from typing import Any, Literal

import jax

from rlhf_jax.models import attention_kernels
from rlhf_jax.models.transformer import TransformerConfig


@dataclasses.dataclass(frozen=True, kw_only=True)
class ComputeConfig:
  """Fields of TransformerConfig that are the run's and not the model's.

  dtype, param_dtype: '' for what the model was saved with; another changes
    results by its rounding, and is what the stage's own model is saved with.
  scan_unroll: 0 for what the model was saved with. It and the others change
    memory and speed alone.
  """

  dtype: Literal["", "float32", "bfloat16"]
  param_dtype: Literal["", "float32", "bfloat16"]
  remat: bool
  scan_unroll: int
  head_chunk_size: int
  attention_backend: Literal["auto", "xla", "cudnn", "splash"]

  def __post_init__(self):
    if self.scan_unroll < 0 or self.head_chunk_size < 1:
      raise ValueError(
          f"scan_unroll={self.scan_unroll} must be 0 or greater, "
          f"head_chunk_size={self.head_chunk_size} 1 or greater"
      )

  def changed(self, config: TransformerConfig) -> TransformerConfig:
    """The model's config as this run computes with it.

    Raises:
      ValueError: scan_unroll does not divide the model's layers, or the
        attention backend cannot compute it here.
    """
    changed = dataclasses.replace(
        config,
        dtype=self.dtype or config.dtype,
        param_dtype=self.param_dtype or config.param_dtype,
        remat=self.remat,
        scan_unroll=self.scan_unroll or config.scan_unroll,
        head_chunk_size=self.head_chunk_size,
        attention_backend=self.attention_backend,
    )
    attention_kernels.choose_backend(
        changed.attention_backend,
        dtype=changed.dtype,
        head_dim=changed.head_dim,
        softcap=changed.attention_softcap,
        platform=jax.default_backend(),
    )
    return changed


def cast(params: Any, config: TransformerConfig) -> Any:
  """The params in the config's param_dtype; those that are stay as they are."""
  return jax.tree.map(lambda x: x.astype(config.param_dtype), params)
