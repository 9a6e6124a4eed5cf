"""Next-token prediction: pretraining and supervised fine-tuning.

Fine-tuning on demonstrations is the first step of Ouyang et al., "Training
language models to follow instructions with human feedback" (arXiv 2203.02155,
section 3.5). Pretraining is the same update on a batch whose loss mask covers
every token.

  1. The loss is a mean over the batch's target tokens, each weighing the same:
     one count for the whole batch, so neither packing nor microbatches nor
     devices change it.
  2. Which tokens are targets is the batch's loss mask: completions alone, or
     all but padding. The data decides, not the update.
  3. Packed documents do not attend to one another (segment ids).

  4. The head sees targets alone, some positions at a time: [B, T, V] logits
     never exist (`losses/chunking.py`).

tokens, segment_ids, loss_mask -> hidden -> -log p(token) -> masked mean
"""

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float
import optax

from rlhf_jax import collectives
from rlhf_jax import metrics as metrics_lib
from rlhf_jax.losses import chunking, language_modeling, masking
from rlhf_jax.metrics import Metrics
from rlhf_jax.models.functions import LanguageModelFns
from rlhf_jax.train_state import TrainState
from rlhf_jax.types import LMBatch, pytree_dataclass, static
from rlhf_jax.updates import gradient


@pytree_dataclass
class SFTConfig:
  """z_loss_coef: weight of log^2 Z, which keeps logits from drifting (0: off).

  num_microbatches: memory only.
  """

  z_loss_coef: float = 0.0
  num_microbatches: int = static(1)


def sft_objective(
    params: Any,
    batch: LMBatch,
    model: LanguageModelFns,
    cfg: SFTConfig,
    num_targets: Float[Array, ""],
) -> tuple[Float[Array, ""], Metrics]:
  """The batch's share of the mean loss over `num_targets` target tokens."""
  hidden_BTD = model.hidden(params, batch.tokens, batch.segment_ids)
  mask_BT = batch.loss_mask[:, 1:]

  logits_of = model.head(params)

  def measure(hidden_BTD, targets_BT):
    logits_BTV = logits_of(hidden_BTD)
    return (
        language_modeling.cross_entropy_loss(
            logits_BTV, targets_BT, z_loss_coef=cfg.z_loss_coef
        ),
        -language_modeling.selected_logprobs(logits_BTV, targets_BT),
        language_modeling.is_likeliest(logits_BTV, targets_BT),
    )

  loss_BT, nll_BT, is_right_BT = chunking.map_positions(
      measure,
      language_modeling.predictions_and_targets(hidden_BTD, batch.tokens),
      mask_BT,
      chunk_size=model.chunk_size,
  )
  metrics = {
      "sft/loss": metrics_lib.average(nll_BT, mask_BT),
      "sft/token_accuracy": metrics_lib.average(is_right_BT, mask_BT),
  }
  return masking.masked_sum(loss_BT, mask_BT) / num_targets, metrics


def make_sft_update(
    model: LanguageModelFns, tx: optax.GradientTransformation
) -> Callable[..., tuple[TrainState, Metrics]]:
  """Returns update(state, batch, cfg, frozen=None); jit it, donate the state.

  frozen: what the model takes beside the params that are trained, a base under
    an adapter (`models/lora.py`).
  """

  def update(state, batch, cfg, frozen=None):
    frozen = {} if frozen is None else frozen
    # A batch without a target has a loss of 0, not of 0 / 0.
    num_targets = collectives.sum_over_devices(batch.loss_mask[:, 1:].sum())
    num_targets = jnp.maximum(num_targets, 1)

    rngs = gradient.dropout_rngs(frozen, state, batch.tokens.shape[:1])

    def objective(params, part):
      microbatch, rngs = part
      return sft_objective(
          frozen | params | rngs, microbatch, model, cfg, num_targets
      )

    grads, metrics = gradient.accumulate_gradients(
        objective, state.params, (batch, rngs), cfg.num_microbatches
    )
    return gradient.apply_gradients(state, grads, metrics, tx)

  return update
