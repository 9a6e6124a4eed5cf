"""Training a language model on packed text: pretraining and fine-tuning alike.

The two stages differ in where their examples come from and where the params
start; this is what they share.
"""

import dataclasses
from typing import Any

from absl import logging
import jax
import jax.numpy as jnp
import numpy as np

from experiments.harness import (
  adapters,
  checks,
  devices,
  evaluator,
  loop,
  models,
  sources,
  stage,
)
from experiments.harness.config import ConfigError
from experiments.harness.parallelism import (
  Parallelism,
  check_parallelism,
  compile_step,
)
from rlhf_jax import device_mesh, optim, sharding
from rlhf_jax import metrics as metrics_lib
from rlhf_jax.data import packing, pipeline
from rlhf_jax.data.tokenizer import Tokenizer
from rlhf_jax.device_mesh import MeshConfig
from rlhf_jax.models import functions
from rlhf_jax.models.lora import LoraConfig
from rlhf_jax.train_state import create_train_state
from rlhf_jax.types import LMBatch
from rlhf_jax.updates import sft

_METRIC_PREFIX = "sft/"
NO_ADAPTER = LoraConfig(rank=0, alpha=1.0, targets=())


@dataclasses.dataclass(frozen=True, kw_only=True)
class LanguageModelConfig:
  """What both stages need beside their data.

  batch_size: packed rows a step, over all devices; seq_len: tokens a row.
  mesh, sharding: over which devices and how, see `harness/devices.py`.
  parallelism: jit or pmap, see `harness/parallelism.py`.
  samples: completions of fixed prompts at every evaluation, so that people can
    see what the model has become; sample_prompts says of which.
  """

  seed: int
  batch_size: int
  seq_len: int
  mesh: MeshConfig
  sharding: devices.PolicySharding
  parallelism: Parallelism
  optimizer: optim.OptimizerConfig
  sft: sft.SFTConfig
  loop: loop.LoopConfig
  samples: evaluator.SampleConfig
  sample_prompts: sources.SourceConfig

  def __post_init__(self):
    devices.check_divides(
        self.batch_size, self.sft.num_microbatches, self.mesh
    )
    devices.check_length(self.seq_len, self.mesh, "seq_len")
    check_parallelism(
        self.parallelism, self.mesh.sizes(devices.num_devices())
    )
    checks.check_ranges(self, "", {"seed": "seed", "seq_len": ">= 2"})
    checks.check_ranges(self.sft, "sft", {"z_loss_coef": ">= 0"})
    checks.check_optimizer(self.optimizer, self.loop.num_steps)
    checks.check_loop(self.loop)


def train(
    name: str,
    out: stage.Stage,
    cfg: LanguageModelConfig,
    policy: models.Policy,
    examples: dict[str, list[packing.Example]],
    adapter: LoraConfig = NO_ADAPTER,
) -> models.Policy:
  """Trains `policy` on examples['train'], evaluates on examples['heldout'].

  Saves the result in the stage's folder and marks the stage as finished.

  Args:
    adapter: trained on the policy instead of the policy, if its rank is not 0.
  """
  _check_fits(cfg, policy)
  tokenizer, mesh = policy.tokenizer, device_mesh.make_mesh(cfg.mesh)
  rows, heldout = (
      pack(cfg, tokenizer, examples[split]) for split in ("train", "heldout")
  )
  logging.info(
      "%s: %d examples packed into %d rows of %d tokens, %.1f%% filled",
      name,
      len(examples["train"]),
      len(rows.tokens),
      cfg.seq_len,
      100 * (rows.segment_ids > 0).mean(),
  )
  tx = optim.make_optimizer(cfg.optimizer, cfg.loop.num_steps)
  model = functions.make_language_model(policy.config)
  rules = cfg.sharding.rules_of("policy")
  params = sharding.place(policy.params, rules, mesh)
  rng = jax.random.key(cfg.seed)
  frozen = sharding.place(adapters.freeze(adapter, params), rules, mesh)
  if frozen:
    rng, rng_adapter = jax.random.split(rng)
    params = adapters.init(adapter, params, rng_adapter)
  state = sharding.place(
      create_train_state(params, tx, rng), rules, mesh
  )
  update = compile_step(
      sft.make_sft_update(model, tx),
      cfg.parallelism,
      mesh,
      rows=(1,),
      donate=(0,),
      out_shardings=(sharding.of(state), None),
  )

  def step(state, batch):
    batch = device_mesh.shard_rows(batch, mesh)
    state, metrics = update(state, batch, cfg.sft, frozen)
    return state, _renamed(metrics, name), batch

  prompts = sources.Reader(cfg.seed, out.dir / "skipped", tokenizer).prompts(
      cfg.sample_prompts, "heldout"
  )
  sampler = evaluator.Evaluator(
      policy.config,
      tokenizer,
      evaluator.encode_prompts(
          prompts, tokenizer, cfg.samples
      ),
      cfg.samples.sampling(tokenizer),
      seed=cfg.seed,
      batch_size=len(prompts),
  )
  heldout_loss = make_heldout_loss(model, heldout, cfg)
  task = loop.Task(
      name=name,
      state=state,
      step=step,
      batches=iter(
          pipeline.make_dataset(
              rows,
              batch_size=cfg.batch_size,
              seed=cfg.seed,
              local_rows=device_mesh.local_rows(mesh, cfg.batch_size),
          )
      ),
      evaluate=lambda state: (
          heldout_loss(frozen | state.params),
          sampler.rows(frozen | state.params),
      ),
      skipped_steps=lambda state: state.skipped_steps,
      inputs={
          "training data": rows,
          "held-out data": heldout,
          **adapters.inputs(frozen),
      },
  )
  state = loop.run_loop(
      task, cfg.loop, workdir=str(out.dir), config=out.config
  )
  params = adapters.merged(adapter, frozen, state.params)
  trained = dataclasses.replace(policy, params=params)
  adapters.save(out.dir, adapter, frozen, state.params)
  models.save_policy(out.dir, trained)
  out.finish(heldout_loss(frozen | state.params))
  return trained


def pack(
    cfg: LanguageModelConfig, tokenizer: Tokenizer, examples: list
) -> LMBatch:
  """The rows that a stage trains on."""
  return packing.pack(examples, cfg.seq_len, pad_id=tokenizer.pad_id)


def make_heldout_loss(model, heldout: LMBatch, cfg: LanguageModelConfig):
  """Returns params -> {'eval/loss', 'eval/token_accuracy'} over all rows."""

  @jax.jit
  def measure(params, batch):
    one = jnp.ones((), jnp.float32)
    return sft.sft_objective(params, batch, model, cfg.sft, one)[1]

  batches = list(padded_batches(heldout, cfg.batch_size))

  def heldout_loss(params: Any) -> dict[str, float]:
    total: metrics_lib.Metrics = {}
    for batch in batches:
      total = metrics_lib.add(total, measure(params, batch))
    return metrics_lib.compute(_renamed(total, "eval"))

  return heldout_loss


def padded_batches(rows: LMBatch, batch_size: int):
  """Batches of all rows; the last is filled up with rows that count nothing."""
  num_rows = rows.tokens.shape[0]
  for start in range(0, num_rows, batch_size):
    part = jax.tree.map(lambda x: x[start : start + batch_size], rows)
    missing = batch_size - part.tokens.shape[0]
    yield jax.tree.map(
        lambda x: np.pad(x, ((0, missing), (0, 0))), part
    )


def _renamed(metrics: metrics_lib.Metrics, stage_name: str):
  return {
      f"{stage_name}/{name.removeprefix(_METRIC_PREFIX)}"
      if name.startswith(_METRIC_PREFIX)
      else name: metric
      for name, metric in metrics.items()
  }


def _check_fits(cfg: LanguageModelConfig, policy: models.Policy) -> None:
  longest = max(
      cfg.seq_len,
      cfg.samples.max_prompt_length + cfg.samples.max_completion_length,
  )
  if longest > policy.config.max_length:
    raise ConfigError(
        f"rows of {longest} tokens (seq_len, or the samples' prompt and "
        f"completion) do not fit the model's max_length="
        f"{policy.config.max_length}"
    )
