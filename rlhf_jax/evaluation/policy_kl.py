"""How far a policy is from another on its own samples."""

from collections.abc import Callable

from jaxtyping import Array, Float

from rlhf_jax.losses import chunking, masking
from rlhf_jax.losses import kl as kl_lib
from rlhf_jax.models import functions
from rlhf_jax.models.functions import LanguageModelFns


def make_episode_kl(
    model: LanguageModelFns, ref_model: LanguageModelFns
) -> Callable[..., Float[Array, "B"]]:
  """Returns kl(params, ref_params, rollout, temperature, ref_hidden=None).

  It gives [B], in nats.

  Each episode's sum over its tokens of KL(policy || ref_policy), exact over the
  vocabulary, at the states that the policy's own samples visit. Its mean over
  episodes estimates the KL between the two distributions of completions, with
  less variance than log-ratios of the sampled tokens. `ref_hidden` and
  ref_params are as in `updates/ppo.py`.
  """

  def episode_kl(params, ref_params, rollout, temperature, ref_hidden=None):
    hidden = functions.completion_hidden(model, params, rollout)
    if ref_hidden is None:
      ref_hidden = functions.completion_hidden(ref_model, ref_params, rollout)

    logits_of, ref_logits_of = model.head(params), ref_model.head(ref_params)

    def measure(hidden, ref_hidden):
      return kl_lib.kl_exact(
          logits_of(hidden), ref_logits_of(ref_hidden), temperature=temperature
      )

    kl = chunking.map_positions(
        measure,
        (hidden, ref_hidden),
        rollout.completion_mask,
        chunk_size=model.chunk_size,
    )
    return masking.masked_sum(kl, rollout.completion_mask, axis=1)

  return episode_kl
