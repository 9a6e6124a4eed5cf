"""How far a policy is from another on its own samples."""

from collections.abc import Callable
from typing import Any

from jaxtyping import Array, Float

from rlhf_jax.losses import chunking, masking
from rlhf_jax.losses import kl as kl_lib
from rlhf_jax.models import functions
from rlhf_jax.models.functions import LanguageModelFns
from rlhf_jax.types import Rollout


def make_episode_kl(
    model: LanguageModelFns, ref_model: LanguageModelFns
) -> Callable[[Any, Any, Rollout, Float[Array, ""]], Float[Array, "B"]]:
  """Returns kl(params, ref_params, rollout, temperature) -> [B], in nats.

  Each episode's sum over its tokens of KL(policy || ref_policy), exact over the
  vocabulary, at the states that the policy's own samples visit. Its mean over
  episodes estimates the KL between the two distributions of completions, with
  less variance than log-ratios of the sampled tokens.
  """

  def episode_kl(params, ref_params, rollout, temperature):
    tokens, mask = functions.whole_sequence(rollout)
    last = rollout.completions.shape[1] + 1
    hiddens = (
        model.hidden(params, tokens, mask, last)[:, :-1],
        ref_model.hidden(ref_params, tokens, mask, last)[:, :-1],
    )

    logits_of, ref_logits_of = model.head(params), ref_model.head(ref_params)

    def measure(hidden, ref_hidden):
      return kl_lib.kl_exact(
          logits_of(hidden), ref_logits_of(ref_hidden), temperature=temperature
      )

    kl = chunking.map_positions(
        measure,
        hiddens,
        rollout.completion_mask,
        chunk_size=model.chunk_size,
    )
    return masking.masked_sum(kl, rollout.completion_mask, axis=1)

  return episode_kl
