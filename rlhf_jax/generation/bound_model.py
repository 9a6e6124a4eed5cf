"""A model with its weights, as what decodes in a loop uses it.

Prompts run through the layers as one scan, whose scratch all layers share. The
loop that follows has them one after another where that spares copies, see
`transformer.unrolled`.
"""

from collections.abc import Callable, Mapping
import dataclasses
import functools
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from rlhf_jax.models import attention_kernels, lora, transformer
from rlhf_jax.models.heads import LanguageModel
from rlhf_jax.models.transformer import Cache, init_cache


@dataclasses.dataclass(frozen=True, kw_only=True)
class BoundModel:
  """Made and used within one traced call, see `bind`.

  is_unrolled: of the loop.
  """

  model: LanguageModel
  variables: Mapping[str, Any]
  is_unrolled: bool

  def prefill(
      self,
      prompts: Int[Array, "prompts P"],
      prompt_mask: Int[Array, "prompts P"],
      length: int,
      num_completions: int = 1,
  ) -> tuple[Float[Array, "B 1 V"], Cache]:
    """Logits of each prompt's last token, and a filled cache of this length.

    Args:
      num_completions: rows for each prompt, one after the other; it runs once.
    """
    num, p = prompts.shape
    transformer.check_cache_length(self.model.config, length)
    cache = init_cache(
        self.model.config, num, p if self.is_unrolled else length
    )
    logits, cache = self.model.apply(
        self.variables, prompts, prompt_mask, cache, last=1
    )
    if num_completions > 1:
      logits = jnp.repeat(logits, num_completions, axis=0)
      cache = transformer.repeat_rows(cache, num_completions)
    if self.is_unrolled:
      cache = transformer.unrolled_cache(cache, length)
    return logits, cache

  def make_cache(self, num_rows: int, length: int) -> Cache:
    """A loop's cache with nothing in it."""
    cache = init_cache(self.model.config, num_rows, length)
    if self.is_unrolled:
      cache = transformer.unrolled_cache(cache, length)
    return dataclasses.replace(cache, empty=False)

  def make_step(self) -> Callable[..., tuple[Float[Array, "B 1 V"], Cache]]:
    """(tokens [B, 1], mask [B, 1], cache) -> (logits, cache), of the loop.

    Make it once, behind the prefill: it may take the weights apart.
    """
    model, variables = self.model, self.variables
    if self.is_unrolled:
      variables = transformer.unrolled(variables, model.config.dtype)
      model = model.clone(is_unrolled=True)
    return functools.partial(model.apply, variables)


def bind(
    model: LanguageModel,
    params: Mapping[str, Any],
    prompts: Int[Array, "prompts P"],
    is_unrolled: bool | None,
) -> BoundModel:
  """The model with these params.

  Args:
    prompts: are where it will run.
    is_unrolled: see `decode.make_generate`.
  """
  if is_unrolled is None:
    is_unrolled = attention_kernels.platform_of(prompts) == "cpu"
  # Unrolled layers within a scan would each copy their slice of the cache.
  if model.config.scan_unroll > 1:
    config = dataclasses.replace(model.config, scan_unroll=1)
    model = model.clone(config=config)
  return BoundModel(
      model=model, variables=lora.variables(params), is_unrolled=is_unrolled
  )


def cache_length(prompt_length: int, max_new_tokens: int) -> int:
  """How many tokens of a row a cache holds: the last is never fed back."""
  return prompt_length + max(max_new_tokens - 1, 1)
