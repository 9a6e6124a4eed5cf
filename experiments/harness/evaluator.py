"""Samples a policy on fixed prompts and measures what comes out.

The evaluator sees the true reward, or whatever judges; no training step does.
"""

from collections.abc import Callable
import dataclasses
import importlib
from typing import Any, Literal

from absl import logging
import jax
import jax.numpy as jnp
import numpy as np

from experiments.harness import checks, models, sources
from experiments.harness.config import ConfigError
from experiments.harness.reference import Reference
from rlhf_jax import device_mesh
from rlhf_jax.data import encoding
from rlhf_jax.data.tokenizer import Tokenizer
from rlhf_jax.evaluation import policy_kl, text
from rlhf_jax.generation import bound_model, decode, engine
from rlhf_jax.generation.decode import SamplingConfig
from rlhf_jax.models import functions, heads
from rlhf_jax.models.transformer import TransformerConfig
from rlhf_jax.rewards import reward_model
from rlhf_jax.rewards.episodes import Episodes, RewardFn, make_rule_reward
from rlhf_jax.types import PromptBatch, Rollout
from rlhf_jax.worlds import assistant

# What a judge says of one completion: 'true_reward' and whatever else it knows.
Judge = Callable[[Episodes], list[dict[str, Any]]]

REWARD_MODEL = "reward_model:"


@dataclasses.dataclass(frozen=True, kw_only=True)
class SampleConfig:
  """How completions are drawn.

  temperature: of the sampling distribution.
  greedy: the likeliest token instead of a draw.
  top_k, top_p: draw from the likeliest tokens alone; 0 and 1 are off. PPO's own
    rollouts pass over these three: it trains the distribution it draws from.
  stop_tokens: texts of one token each that end a completion, as the end token
    does, from completion token `stop_after` on.
  too_long: what becomes of a prompt of more than max_prompt_length tokens.
  num_slots: completions that are decoded at a time, in PPO's rollouts too; who
    has ended makes room for the next prompt. 0 decodes a batch until all of it
    has ended. Worth it where lengths differ much and prompts are several times
    as many.
  num_cache_buckets: parts of a completion that are decoded one after the other,
    each with a cache of its own length, see `decode.make_generate`. More spare
    attention over what is empty where completions are long, and compile longer.
    With slots it must be 1: their cache is never empty.
  rollout_weights: of PPO's rollouts alone: 'int8' rounds those of the layers,
    so that a step reads fewer bytes. It draws from another distribution than
    the policy's and needs ppo.importance_correction. 'compute' rounds nothing.
  """

  max_prompt_length: int
  max_completion_length: int
  temperature: float
  greedy: bool
  top_k: int
  top_p: float
  stop_tokens: tuple[str, ...]
  stop_after: int
  too_long: Literal["drop", "truncate_prompt_left", "error"]
  num_slots: int
  num_cache_buckets: int
  rollout_weights: bound_model.Weights

  def __post_init__(self):
    checks.check_ranges(
        self,
        "samples",
        {
            "max_prompt_length": ">= 1",
            "max_completion_length": ">= 1",
            "temperature": "> 0",
            "top_k": ">= 0",
            "top_p": "(0, 1]",
            "stop_after": ">= 0",
            "num_slots": ">= 0",
            "num_cache_buckets": ">= 1",
        },
    )
    if self.num_slots and self.num_cache_buckets > 1:
      raise ValueError(
          f"samples.num_cache_buckets={self.num_cache_buckets} and "
          f"samples.num_slots={self.num_slots}: slots share a cache that is in "
          "use to its full length all the time; set the one to 1 or the other "
          "to 0"
      )

  def sampling(self, tokenizer: Tokenizer) -> SamplingConfig:
    """The library's config, with ids for texts.

    Raises:
      ConfigError: if a stop text is not one token.
    """
    stop_ids = []
    for stop in self.stop_tokens:
      ids = tokenizer.encode(stop, continues=True)
      if len(ids) != 1:
        raise ConfigError(
            f"stop_tokens: {stop!r} is {len(ids)} tokens of this tokenizer, "
            "and must be one"
        )
      stop_ids.append(ids[0])
    return SamplingConfig(
        max_new_tokens=self.max_completion_length,
        temperature=self.temperature,
        greedy=self.greedy,
        top_k=self.top_k,
        top_p=self.top_p,
        use_top_p=self.top_p < 1,
        eos_id=tokenizer.eos_id,
        other_eos_ids=tokenizer.eos_ids[1:],
        stop_ids=tuple(stop_ids),
        stop_after=self.stop_after,
        pad_id=tokenizer.pad_id,
    )

  def make_generate(
      self, config: TransformerConfig, num_completions: int = 1
  ) -> Callable[..., Rollout]:
    """What completes PPO's prompts by a model of this shape; jit it."""
    model = heads.LanguageModel(config)
    if not self.num_slots:
      return decode.make_generate(
          model,
          num_completions=num_completions,
          num_cache_buckets=self.num_cache_buckets,
          weights=self.rollout_weights,
      )
    return engine.make_generate_many(
        model,
        self.num_slots,
        num_completions=num_completions,
        weights=self.rollout_weights,
    )


def make_sampler(
    config: TransformerConfig,
    tokenizer: Tokenizer,
    samples: SampleConfig,
    batch_size: int,
    num_completions: int = 1,
) -> Callable[[Any, PromptBatch, jax.Array], Rollout]:
  """(params, prompts, rng) -> completions of all, in numpy.

  Args:
    batch_size: completions that run at a time; with slots all go into one
      program, and as many run as there are slots.
    num_completions: of each prompt, one after the other.
  """
  itself = dataclasses.replace(samples, rollout_weights="compute")
  generate = jax.jit(itself.make_generate(config, num_completions))
  sampling = samples.sampling(tokenizer)

  def sample(params, prompts, rng):
    num_prompts = batch_size // num_completions
    if samples.num_slots:
      num_prompts = prompts.prompts.shape[0]
    return sample_all(
        generate, params, prompts, sampling, rng, num_prompts, num_completions
    )

  return sample


def sample_all(
    generate: Callable[..., Rollout],
    params: Any,
    prompts: PromptBatch,
    sampling: SamplingConfig,
    rng: jax.Array,
    batch_size: int,
    num_completions: int,
) -> Rollout:
  """Completes every prompt, `batch_size` prompts at a time; numpy arrays.

  Each row's randomness is that of its place among all, so the batch size
  changes nothing but rounding.

  Args:
    num_completions: what `generate` was made for.
  """
  num = prompts.prompts.shape[0]
  parts = []
  for start in range(0, num, batch_size):
    # The last batch is filled up with its first rows: one program serves all.
    ids = np.arange(start, start + batch_size) % num
    rows = ids[:, None] * num_completions + np.arange(num_completions)
    rollout = generate(
        params,
        prompts.prompts[ids],
        prompts.prompt_mask[ids],
        rng,
        sampling,
        jnp.asarray(rows.reshape(-1), jnp.int32),
    )
    keep = min(batch_size, num - start) * num_completions
    parts.append(jax.tree.map(lambda x: x[:keep], device_mesh.to_host(rollout)))
  return jax.tree.map(lambda *xs: np.concatenate(xs), *parts)


def make_world_judge() -> Judge:
  """The assistant world's true reward, itemised."""

  def judge(episodes):
    check_world_prompts(episodes.prompts)
    rows = []
    for prompt, completion in zip(episodes.prompts, episodes.completions):
      reward = assistant.true_reward(prompt, completion)
      rows.append({
          "true_reward": reward.total,
          "family": reward.family,
          "parts": dict(reward.parts),
          "flattery": assistant.flattery_count(completion),
      })
    return rows

  return judge


def check_world_prompts(prompts: list[str]) -> None:
  """Checks that the assistant world can tell what answers each prompt.

  Raises:
    ConfigError: with a prompt that is none of its requests.
  """
  for prompt in prompts:
    try:
      assistant.true_reward(prompt, "")
    except ValueError as error:
      raise ConfigError(
          f"{sources.ASSISTANT} judges its own requests alone: {error}"
      ) from error


def make_judge(name: str) -> Judge | None:
  """The judge of a config: 'world:assistant', 'reward_model:PLACE' or ''."""
  check_judge(name)
  if not name:
    return None
  if name == sources.ASSISTANT:
    return make_world_judge()
  score = make_reward_fn(
      models.load_reward_model(name.removeprefix(REWARD_MODEL))
  )
  return lambda episodes: [
      {"true_reward": float(x)} for x in device_mesh.to_host(score(episodes))
  ]


def check_judge(name: str) -> None:
  """Raises ValueError for what `make_judge` does not know."""
  if name in ("", sources.ASSISTANT) or name.startswith(REWARD_MODEL):
    return
  raise ValueError(
      f"judge {name!r} is neither {sources.ASSISTANT!r} nor "
      f"'{REWARD_MODEL}PLACE' nor ''"
  )


def make_reward_fn(model: models.RewardModel) -> RewardFn:
  """The reward function of a loaded reward model."""
  return reward_model.make_reward_model(
      model.config, model.params, model.normalization, model.tokenizer
  )


def load_reward_rule(name: str) -> RewardFn:
  """The reward function of a rule, 'module:function', on the import path.

  Raises:
    ConfigError: if there is no such function.
  """
  module, _, function = name.partition(":")
  try:
    rule = getattr(importlib.import_module(module), function)
  except (ImportError, AttributeError, ValueError) as error:
    raise ConfigError(
        f"reward_rule={name!r} is not 'module:function' on the import path: "
        f"{error}"
    ) from error
  return make_rule_reward(rule)


class Evaluator:
  """Samples policies of one shape and tokenizer on fixed prompts.

  Args:
    reference: what KL is measured from, or None; same tokenizer.
    reward_fn: the proxy score, or None.
    judge: the truth, or None.
    seed: of the sampling; the same at every call, so that two policies differ
      by what they are and not by luck.
  """

  def __init__(
      self,
      policy_config: TransformerConfig,
      tokenizer: Tokenizer,
      prompts: PromptBatch,
      samples: SampleConfig,
      *,
      reference: Reference | None = None,
      reward_fn: RewardFn | None = None,
      judge: Judge | None = None,
      seed: int,
      batch_size: int,
  ):
    self._tokenizer, self._prompts = tokenizer, prompts
    self._temperature = samples.temperature
    self._reward_fn, self._judge = reward_fn, judge
    self._reference = reference
    self._rng = jax.random.key(seed)
    self._batch_size = min(batch_size, prompts.prompts.shape[0])
    self._sample = make_sampler(
        policy_config, tokenizer, samples, self._batch_size
    )
    if reference is not None:
      self._kl = jax.jit(
          policy_kl.make_episode_kl(
              functions.make_language_model(policy_config),
              functions.make_language_model(reference.config),
          )
      )

  def rows(self, params: Any) -> list[dict[str, Any]]:
    """One row a prompt: texts, lengths, and what each judge said."""
    return self.measured(
        params, self._sample(params, self._prompts, self._rng)
    )

  def measured(self, params: Any, whole: Rollout) -> list[dict[str, Any]]:
    """`rows` of completions that these params sampled, in numpy."""
    rows = []
    for start in range(0, whole.ended.shape[0], self._batch_size):
      part = jax.tree.map(
          lambda x: _filled(x, start, self._batch_size), whole
      )
      keep = min(self._batch_size, whole.ended.shape[0] - start)
      rows.extend(self._measure(params, part)[:keep])
    return rows

  def _measure(self, params, rollout: Rollout) -> list[dict[str, Any]]:
    episodes = Episodes(rollout, self._tokenizer)
    rows = [
        {
            "prompt": prompt,
            "completion": completion,
            "completion_length": int(length),
            "ended": bool(ended),
            "repetition": text.repetition(completion),
        }
        for prompt, completion, length, ended in zip(
            episodes.prompts,
            episodes.completions,
            rollout.completion_mask.sum(axis=1),
            rollout.ended,
        )
    ]
    if self._judge is not None:
      for row, said in zip(rows, self._judge(episodes)):
        row.update(said)
    if self._reward_fn is not None:
      for row, score in zip(
          rows, device_mesh.to_host(self._reward_fn(episodes))
      ):
        row["score"] = float(score)
    if self._reference is not None:
      kl = self._kl(
          params,
          self._reference.params,
          rollout,
          jnp.float32(self._temperature),
          self._reference.hidden(rollout),
      )
      for row, value in zip(rows, device_mesh.to_host(kl)):
        row["kl"] = float(value)
    return rows


def _filled(x: np.ndarray, start: int, size: int) -> np.ndarray:
  return x[np.arange(start, start + size) % x.shape[0]]


NUMBERS = (
    "true_reward",
    "score",
    "kl",
    "completion_length",
    "ended",
    "repetition",
    "flattery",
)


def averages(rows: list[dict[str, Any]]) -> dict[str, float]:
  """'eval/<number>': the mean over rows of each number that the rows have."""
  return {
      f"eval/{name}": float(np.mean([row[name] for row in rows]))
      for name in NUMBERS
      if name in rows[0]
  }


def prompt_groups(prompts: list[str]) -> np.ndarray:
  """A label for each text, equal where the prompt is: [N] integers.

  What shares a prompt is no independent evidence. Texts without a prompt share
  none: each is a group of its own.
  """
  place = {}
  return np.asarray(
      [place.setdefault(x or i, len(place)) for i, x in enumerate(prompts)]
  )


def encode_prompts(
    prompts: list, tokenizer: Tokenizer, cfg: SampleConfig
) -> PromptBatch:
  """Left-padded prompts; `index` says which of `prompts` they are.

  Raises:
    encoding.LengthError: if one is too long and `cfg.too_long` is 'error', or
      none is left.
  """
  batch, report = count_prompts(prompts, tokenizer, cfg)
  if report.num_dropped or report.num_truncated:
    logging.info("prompts: %s", report)
  return batch


def count_prompts(
    prompts: list, tokenizer: Tokenizer, cfg: SampleConfig
) -> tuple[PromptBatch, encoding.LengthReport]:
  """`encode_prompts`, and what became of those that are too long."""
  try:
    return encoding.encode_prompts(
        prompts,
        tokenizer,
        max_prompt_length=cfg.max_prompt_length,
        policy=cfg.too_long,
    )
  except encoding.LengthError as error:
    raise encoding.LengthError(
        f"max_prompt_length={cfg.max_prompt_length}, any start token included,"
        f" is too short for a prompt: {error}"
    ) from error
