"""Trains a reward model on comparisons or rankings.

    python -m experiments.reward --config=configs/reward.py --workdir=DIR

  1. The policy's trunk gets a fresh scalar head.
  2. Bradley-Terry on pairs, or all pairs of a ranking; evaluated on held-out
     comparisons: accuracy with its interval, calibration.
  3. A gain and a bias are fitted so that the reference policy's completions
     score mean 0 and standard deviation 1.
  4. Leaves DIR/model, DIR/tokenizer and DIR/calibration.json; with an adapter,
     merged, and DIR/adapter beside them.
"""

from collections.abc import Callable
import dataclasses
from typing import Any, Literal

from absl import logging
import jax
import jax.numpy as jnp
import numpy as np

from experiments.harness import (
    adapters,
    checks,
    cli,
    devices,
    evaluator,
    loop,
    models,
    sources,
    stage,
)
from experiments.harness.compute import ComputeConfig
from experiments.harness.config import ConfigError
from experiments.harness.parallelism import (
  Parallelism,
  check_parallelism,
  compile_step,
)
from rlhf_jax import device_mesh, optim, sharding
from rlhf_jax.data import encoding, pipeline
from rlhf_jax.data.records import Ranking
from rlhf_jax.data.tokenizer import Tokenizer
from rlhf_jax.device_mesh import MeshConfig
from rlhf_jax.evaluation import intervals, preference_accuracy
from rlhf_jax.generation import decode
from rlhf_jax.losses import preference
from rlhf_jax.models import functions, heads
from rlhf_jax.models.lora import LoraConfig
from rlhf_jax.rewards.episodes import Episodes
from rlhf_jax.train_state import create_train_state
from rlhf_jax.types import PreferenceBatch, RankingBatch, ScoreNormalization
from rlhf_jax.updates import reward as reward_update
from rlhf_jax.worlds import annotators


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
  """init_from: the policy whose trunk the reward model starts from.

  heldout: comparisons that training never sees; the same source as
    comparisons, if each uses its share of it.
  mesh, sharding: over which devices and how, see `harness/devices.py`.
  parallelism: jit or pmap, see `harness/parallelism.py`.
  compute: how, see `harness/compute.py`.
  lora: an adapter to train instead of the trunk, of rank 0 for none; the head
    is trained either way.
  normalize_on: what the reference policy (ref_policy, a place) completes to fit
    the score's gain and bias; ref_policy '' fits them on held-out chosen and
    rejected completions instead.
  """

  seed: int
  init_from: str
  ref_policy: str
  comparisons: sources.SourceConfig
  heldout: sources.SourceConfig
  too_long: Literal["drop", "truncate_prompt_left", "error"]
  max_prompt_length: int
  max_completion_length: int
  batch_size: int
  mesh: MeshConfig
  sharding: devices.RewardModelSharding
  parallelism: Parallelism
  optimizer: optim.OptimizerConfig
  compute: ComputeConfig
  lora: LoraConfig
  reward: reward_update.RewardConfig
  loop: loop.LoopConfig
  normalize_on: sources.SourceConfig
  samples: evaluator.SampleConfig

  def __post_init__(self):
    devices.check_divides(
        self.batch_size, self.reward.num_microbatches, self.mesh
    )
    devices.check_length(
        self.max_prompt_length + self.max_completion_length,
        self.mesh,
        "max_prompt_length + max_completion_length",
    )
    check_parallelism(
        self.parallelism, self.mesh.sizes(devices.num_devices())
    )
    checks.check_ranges(
        self,
        "",
        {
            "seed": "seed",
            "max_prompt_length": ">= 1",
            "max_completion_length": ">= 1",
        },
    )
    checks.check_ranges(self.reward, "reward", {"center_coef": ">= 0"})
    checks.check_optimizer(self.optimizer, self.loop.num_steps)
    checks.check_loop(self.loop)


def run(config: Config, workdir: str) -> None:
  """Runs the stage, or what is left of it."""
  out = stage.Stage(workdir, config)
  if out.finished:
    return
  mesh = device_mesh.make_mesh(config.mesh)
  policy = models.load_policy(
      config.init_from,
      config.compute,
      config.sharding.placing("reward_model", mesh),
  )
  _check_fits(config, policy)
  skipped_dir = out.dir / "skipped"
  reader = sources.Reader(config.seed, skipped_dir, policy.tokenizer)
  train, _, _ = encode(
      config, policy.tokenizer, reader.comparisons(config.comparisons, "train")
  )
  heldout, heldout_records, _ = encode(
      config, policy.tokenizer, reader.comparisons(config.heldout, "heldout")
  )
  if not ordered_margins(np.zeros(heldout.tokens.shape[:2]), heldout)[0].size:
    raise ConfigError(
        f"heldout: {config.heldout.source} has no pair to measure on: every "
        "weight is 0, or every ranking is one tie"
    )
  sample_reference = make_reference_sampler(config, policy, reader)

  rules = config.sharding.rules_of("reward_model")
  rng_state, rng_head, rng_samples = jax.random.split(
      jax.random.key(config.seed), 3
  )
  params, frozen = _init_params(config, policy, rng_head, mesh, rules)
  tx = optim.make_optimizer(config.optimizer, config.loop.num_steps)
  score_fn = functions.make_score_fn(policy.config)
  state = sharding.place(
      create_train_state(params, tx, rng_state), rules, mesh
  )
  update = compile_step(
      reward_update.make_reward_update(score_fn, tx),
      config.parallelism,
      mesh,
      rows=(1,),
      donate=(0,),
      out_shardings=(sharding.of(state), None),
  )

  def step(state, batch):
    batch = device_mesh.shard_rows(batch, mesh)
    state, metrics = update(state, batch, config.reward, frozen)
    return state, metrics, batch

  scorer = BatchScorer(score_fn, config.batch_size)
  task = loop.Task(
      name="reward",
      state=state,
      step=step,
      batches=iter(
          pipeline.make_dataset(
              train,
              batch_size=config.batch_size,
              seed=config.seed,
              local_rows=device_mesh.local_rows(mesh, config.batch_size),
          )
      ),
      evaluate=lambda state: (
          evaluate(
              scorer.scores(frozen | state.params, heldout),
              heldout,
              config.reward,
          ),
          [],
      ),
      skipped_steps=lambda state: state.skipped_steps,
      inputs={
          "comparisons": train,
          "held-out comparisons": heldout,
          **adapters.inputs(frozen),
      },
  )
  state = loop.run_loop(
      task, config.loop, workdir=str(out.dir), config=out.config
  )

  heldout_scores = scorer.scores(frozen | state.params, heldout)
  params = adapters.merged(config.lora, frozen, state.params)
  if sample_reference is None:
    scores = completion_scores(heldout_scores, heldout)
  else:
    one = ScoreNormalization(gain=jnp.float32(1), bias=jnp.float32(0))
    scores = evaluator.make_reward_fn(
        models.RewardModel(policy.config, params, one, policy.tokenizer)
    )(sample_reference(rng_samples))
  normalization = _fit_normalization(
      jnp.asarray(device_mesh.to_host(scores))
  )
  report = make_calibration(
      heldout_scores, heldout, heldout_records, config.seed
  )
  stage.write_json(out.dir / "calibration.json", report)
  adapters.save(out.dir, config.lora, frozen, state.params)
  models.save_reward_model(
      out.dir,
      models.RewardModel(
          policy.config,
          params,
          normalization,
          policy.tokenizer,
      ),
  )
  logging.info("reward: held-out accuracy %s", report["accuracy"])
  out.finish({name: report[name] for name in ("accuracy", "num_pairs")})


def _init_params(
    config: Config,
    policy: models.Policy,
    rng: jax.Array,
    mesh: jax.sharding.Mesh,
    rules: sharding.Rules,
) -> tuple[dict[str, Any], dict[str, Any]]:
  """(what is trained, what is frozen beside it) of a fresh reward model."""
  if not config.lora.rank:
    params = heads.scalar_from_language_model(
        policy.params, rng, policy.config, zero_head=False
    )
    return sharding.place(params, rules, mesh), {}
  rng_head, rng_adapter = jax.random.split(rng)
  base = {"trunk": policy.params["trunk"]}
  base = sharding.place(base, rules, mesh)
  width, dtype = policy.config.width, policy.config.param_dtype
  params = {
      **adapters.init(config.lora, base, rng_adapter),
      "head": heads.scalar_head_init(rng_head, width, False, dtype),
  }
  frozen = adapters.freeze(config.lora, base)
  return params, sharding.place(frozen, rules, mesh)


class BatchScorer:
  """Raw scores of all rows of a batch of pairs or rankings: [N, K]."""

  def __init__(self, score_fn, batch_size: int):
    self._batch_size = batch_size
    self._score = jax.jit(
        lambda params, batch: reward_update.score_rows(params, batch, score_fn)
    )

  def scores(
      self, params: Any, batch: PreferenceBatch | RankingBatch
  ) -> np.ndarray:
    """Scores in the rows' order, a batch at a time."""
    num_rows, parts = batch.tokens.shape[0], []
    size = min(self._batch_size, num_rows)
    for start in range(0, num_rows, size):
      rows = np.arange(start, start + size) % num_rows
      part = jax.tree.map(lambda x: x[rows], batch)
      parts.append(device_mesh.to_host(self._score(params, part)))
    return np.concatenate(parts)[:num_rows]


def ordered_margins(
    scores: np.ndarray, batch: PreferenceBatch | RankingBatch
) -> tuple[np.ndarray, np.ndarray]:
  """score(better) - score(worse) of every ordered pair, and the pair's row.

  As in training, what weighs 0 does not count.

  Returns:
    margins [num_pairs] and rows [num_pairs], indices into the batch.
  """
  counted = np.asarray(batch.weight) > 0
  if isinstance(batch, PreferenceBatch):
    return (scores[:, 0] - scores[:, 1])[counted], np.flatnonzero(counted)
  better = (
      (batch.ranks[:, :, None] < batch.ranks[:, None, :])
      & batch.completion_valid[:, :, None]
      & batch.completion_valid[:, None, :]
      & counted[:, None, None]
  )
  margins = scores[:, :, None] - scores[:, None, :]
  return margins[better], np.nonzero(better)[0]


def completion_scores(
    scores: np.ndarray, batch: PreferenceBatch | RankingBatch
) -> np.ndarray:
  """The scores of real completions, without those that fill rankings up."""
  if isinstance(batch, PreferenceBatch):
    return scores.ravel()
  return scores[batch.completion_valid]


def evaluate(
    scores: np.ndarray,
    batch: PreferenceBatch | RankingBatch,
    cfg: reward_update.RewardConfig,
) -> dict[str, float]:
  """'eval/accuracy' and 'eval/loss' of held-out rows, as training has them.

  The loss is of the stated margins and weighted, the accuracy of the pairs that
  weigh anything; except that a tie is half right.
  """
  margins, _ = ordered_margins(scores, batch)
  score = jnp.asarray(scores)
  if isinstance(batch, PreferenceBatch):
    loss = preference.bradley_terry_loss(
        score[:, 0], score[:, 1], margin=jnp.asarray(batch.margin)
    )
  else:
    rows = jax.tree.map(jnp.asarray, batch)
    loss = reward_update.ranking_loss(score, rows, cfg)
  return {
      "eval/accuracy": float(preference_accuracy.accuracy(margins).mean),
      "eval/loss": float(np.average(np.asarray(loss), weights=batch.weight)),
  }


def make_calibration(
    scores: np.ndarray,
    batch: PreferenceBatch | RankingBatch,
    comparisons: list,
    seed: int,
) -> dict[str, Any]:
  """What the report shows: accuracy, its ceiling if known, calibration.

  Args:
    scores: of the batch's rows.
    batch: held-out comparisons or rankings.
    comparisons: the records of the batch, row by row.
    seed: of the accuracy's interval, which is over distinct prompts.
  """
  margins, rows = ordered_margins(scores, batch)
  accuracy = intervals.bootstrap_interval(
      (margins > 0) + 0.5 * (margins == 0),
      seed=seed,
      groups=evaluator.prompt_groups([x.prompt for x in comparisons])[rows],
  )
  # The ceiling is of the very pairs that the accuracy is of.
  comparisons = [x for x in comparisons if x.weight > 0]
  simulated = {annotator.name for annotator in annotators.ANNOTATORS}
  judged = [
      {"prompt": x.prompt, "chosen": x.chosen, "rejected": x.rejected}
      for x in comparisons
      if not isinstance(x, Ranking) and x.annotator in simulated
  ]
  # Only who simulates the annotators knows how well they can be predicted.
  known = len(judged) == len(comparisons)
  bins = preference_accuracy.calibration(margins)
  return {
      "accuracy": dataclasses.asdict(accuracy),
      "num_pairs": len(margins),
      "bins": bins,
      "expected_calibration_error": (
          preference_accuracy.expected_calibration_error(bins)
      ),
      "ceiling": annotators.agreement_ceiling(judged) if known else None,
      "agreement": annotators.annotator_agreement(judged) if known else None,
  }


def encode(
    config: Config, tokenizer: Tokenizer, comparisons: list
) -> tuple[PreferenceBatch | RankingBatch, list, encoding.LengthReport]:
  """Rows of tokens, of the records those that were short enough, the counts."""
  is_ranking = isinstance(comparisons[0], Ranking)
  encode_records = (
      encoding.encode_rankings if is_ranking else encoding.encode_comparisons
  )
  batch, report = encode_records(
      comparisons,
      tokenizer,
      max_prompt_length=config.max_prompt_length,
      max_completion_length=config.max_completion_length,
      policy=config.too_long,
  )
  logging.info("reward: comparisons: %s", report)
  dropped = set(report.dropped)
  kept = [x for i, x in enumerate(comparisons) if i not in dropped]
  return batch, kept, report


def _fit_normalization(scores: jax.Array) -> ScoreNormalization:
  try:
    return reward_update.fit_score_normalization(scores)
  except ValueError as error:
    raise cli.UserError(str(error)) from error


def make_reference_sampler(
    config: Config, policy: models.Policy, reader: sources.Reader
) -> Callable[[jax.Array], Episodes] | None:
  """rng -> episodes of the reference policy, or None if none is named.

  All that it reads is read here: what is wrong with it need not wait for the
  end of the training.

  Args:
    policy: the reward model that will score them has its length and tokenizer.
  """
  if not config.ref_policy:
    return None
  ref_policy = models.load_policy(config.ref_policy)
  checks.check_samples_fit(
      config.samples, {"reference policy": ref_policy}, policy
  )
  reader = dataclasses.replace(reader, tokenizer=ref_policy.tokenizer)
  prompts = evaluator.encode_prompts(
      reader.prompts(config.normalize_on, "train"),
      ref_policy.tokenizer,
      config.samples,
  )
  sampling = config.samples.sampling(ref_policy.tokenizer)

  def sample(rng: jax.Array) -> Episodes:
    rollout = evaluator.sample_all(
        jax.jit(decode.make_generate(heads.LanguageModel(ref_policy.config))),
        ref_policy.params,
        prompts,
        sampling,
        rng,
        config.batch_size,
    )
    return Episodes(rollout, ref_policy.tokenizer)

  return sample


def _check_fits(config: Config, policy: models.Policy) -> None:
  length = config.max_prompt_length + config.max_completion_length
  if length > policy.config.max_length:
    raise ConfigError(
        f"max_prompt_length + max_completion_length = {length} does not fit "
        f"the model's max_length={policy.config.max_length}"
    )


if __name__ == "__main__":
  cli.launch(Config, run)
