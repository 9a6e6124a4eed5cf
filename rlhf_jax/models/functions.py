"""Models as plain functions of params, as the updates take them.

`segment_ids` is an attention mask (1 real, 0 padding) or the segment ids of
packed documents. Params may be plain, or a base with an adapter: see
`models/lora.py`.
"""

from collections.abc import Callable
import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from rlhf_jax.models import heads, lora, partitioning
from rlhf_jax.models.transformer import TransformerConfig
from rlhf_jax.types import Rollout


def whole_sequence(
    rollout: Rollout,
) -> tuple[Int[Array, "B T"], Int[Array, "B T"]]:
  """Prompts and completions side by side, and their mask."""
  tokens = jnp.concatenate([rollout.prompts, rollout.completions], axis=1)
  mask = jnp.concatenate(
      [rollout.prompt_mask, rollout.completion_mask], axis=1
  )
  return tokens, mask


@dataclasses.dataclass(frozen=True)
class LanguageModelFns:
  """A language model in two parts, so that logits need not exist all at once.

  hidden: (params, tokens [B, T], segment_ids [B, T], last=None) ->
    [B, last, D], of the last `last` positions (None: all).
  head: params -> a function of hidden states [B, n, D], of any positions, to
    their logits [B, n, V]. What it reads of params is float32 before it is
    called: a gradient that is summed over its calls is then summed so.
  chunk_size: positions of a row that should go through it at once, see
    `losses/chunking.py`.
  """

  hidden: Callable[..., Float[Array, "B N D"]]
  head: Callable[
      [Any], Callable[[Float[Array, "B n D"]], Float[Array, "B n V"]]
  ]
  chunk_size: int


@dataclasses.dataclass(frozen=True)
class PolicyValueFns:
  """A policy and its value network; params are {'policy', 'value'}.

  hidden_and_values: (params, tokens [B, T], segment_ids [B, T], last) ->
    (hidden [B, last, D], values [B, last]), of the last `last` positions.
  head, chunk_size: as in `LanguageModelFns`; head takes all params too.
  """

  hidden_and_values: Callable[
      ..., tuple[Float[Array, "B N D"], Float[Array, "B N"]]
  ]
  head: Callable[
      [Any], Callable[[Float[Array, "B n D"]], Float[Array, "B n V"]]
  ]
  chunk_size: int


def make_language_model(config: TransformerConfig) -> LanguageModelFns:
  """The functions of a LanguageModel of this shape."""
  model = heads.LanguageModel(config)

  def hidden(params, tokens, segment_ids, last=None):
    return model.apply(
        lora.variables(params),
        tokens,
        segment_ids,
        last=last,
        method="hidden",
    )[0]

  def head(params):
    weights = _with_wide_head(lora.weights_of(params), config)
    return lambda hidden: model.apply(
        {"params": weights}, hidden, method="logits"
    )

  return LanguageModelFns(hidden, head, config.head_chunk_size)


def _with_wide_head(params: Any, config: TransformerConfig) -> Any:
  """The params with their head, an own one or the embedding, in float32."""
  if not config.tie_head:
    kernel = params["head"]["kernel"].astype(jnp.float32)
    return {**params, "head": {"kernel": kernel}}
  trunk = params["trunk"]
  embedding = trunk["token_embedding"].astype(jnp.float32)
  embedding = partitioning.constrain(embedding, "tied_head")
  return {**params, "trunk": {**trunk, "token_embedding": embedding}}


def head_params(params: Any, config: TransformerConfig) -> Any:
  """What `LanguageModelFns.head` reads of params, without the rest."""
  weights = lora.weights_of(params)
  if not config.tie_head:
    return {"head": weights["head"]}
  tables = ("token_embedding", "position_embedding")
  trunk = weights["trunk"]
  return {"trunk": {x: trunk[x] for x in tables if x in trunk}}


def completion_hidden(
    model: LanguageModelFns, params: Any, rollout: Rollout
) -> Float[Array, "B C D"]:
  """Hidden states before each completion token, positions P-1 .. P+C-2."""
  last = rollout.completions.shape[1] + 1
  return model.hidden(params, *whole_sequence(rollout), last)[:, :-1]


def make_logits_fn(config: TransformerConfig):
  """(params, tokens [B, T], segment_ids [B, T], last=None) -> [B, last, V].

  All logits at once; what measures them takes `make_language_model`.
  """
  model = make_language_model(config)

  def logits_fn(params, tokens, segment_ids, last=None):
    hidden = model.hidden(params, tokens, segment_ids, last)
    return model.head(params)(hidden)

  return logits_fn


def make_router_fn(config: TransformerConfig):
  """(params, tokens [B, T], segment_ids [B, T]) -> (logits, router_probs).

  router_probs [L, B, T, E] of a language model with a mixture of experts, for
  `losses.load_balancing`.
  """
  model = heads.LanguageModel(config)

  def router_fn(params, tokens, segment_ids):
    (logits, _), sown = model.apply(
        lora.variables(params),
        tokens,
        segment_ids,
        mutable=["intermediates"],
    )
    layers = sown["intermediates"]["trunk"]["layers"]
    return logits, layers["feed_forward"]["router_probs"][0]

  return router_fn


def make_score_fn(config: TransformerConfig):
  """(params, tokens [N, T], attention_mask [N, T]) -> score [N]."""
  model = heads.ScalarModel(config)

  def score_fn(params, tokens, attention_mask):
    scalars = model.apply(lora.variables(params), tokens, attention_mask)
    return heads.sequence_scores(scalars, attention_mask)

  return score_fn


def make_policy_value(
    policy_config: TransformerConfig, value_config: TransformerConfig | None
) -> PolicyValueFns:
  """The functions of a policy and its value network.

  params is {'policy': language-model params, 'value': value params}, where the
  value params are those of a whole ScalarModel of `value_config`, or, if that
  is None, of a scalar head that reads the policy's own trunk. What else is in
  params belongs to both: a base that each has its own adapter on.
  """
  policy = make_language_model(policy_config)
  value = heads.ScalarModel(value_config) if value_config else None
  shared_head = heads.ScalarHead(policy_config)

  def hidden_and_values(params, tokens, segment_ids, last):
    hidden = policy.hidden(_of(params, "policy"), tokens, segment_ids, last)
    if value is None:
      variables = {"params": params["value"]}
      return hidden, shared_head.apply(variables, hidden)
    variables = lora.variables(_of(params, "value"))
    return hidden, value.apply(variables, tokens, segment_ids, last=last)

  return PolicyValueFns(
      hidden_and_values,
      lambda params: policy.head(_of(params, "policy")),
      policy.chunk_size,
  )


def _of(params: dict[str, Any], name: str) -> dict[str, Any]:
  """One model's params, with what it shares."""
  shared = {k: v for k, v in params.items() if k not in ("policy", "value")}
  return shared | params[name]


def init_language_model(rng: jax.Array, config: TransformerConfig):
  """Fresh LanguageModel params."""
  tokens = jnp.zeros((1, 2), jnp.int32)
  return heads.LanguageModel(config).init(rng, tokens)["params"]
