"""Trains a reward model on the embedded domain's comparisons.

    python -m experiments.reward --config=configs/reward.py \
        --workdir=runs/first/reward

Needs `runs/first/sft` and `runs/first/preferences`, as configs/rlhf.py leaves
them.
"""

from ml_collections import ConfigDict

from configs import common


def get_config(arg: str = common.FULL) -> ConfigDict:
  """full, or smoke: in seconds; ranking reads rankings of 4."""
  common.check_arg(arg, common.FULL, common.SMOKE, "ranking")
  smoke = arg == common.SMOKE
  kind = "rankings" if arg == "ranking" else "comparisons"
  preferences = "runs/first/preferences"
  return ConfigDict(
      dict(
          seed=0,
          init_from="runs/first/sft",
          ref_policy="runs/first/sft",
          comparisons=common.source(f"{preferences}/train_{kind}.jsonl"),
          comparisons_split="all",
          heldout=common.source(f"{preferences}/heldout_{kind}.jsonl"),
          heldout_split="all",
          too_long="drop",
          max_prompt_length=24,
          # One more than is sampled: the end token of one that never ended. What
          # an untrained model samples is no text, and takes more tokens again.
          max_completion_length=96 if smoke else 41,
          batch_size=16 if smoke else 64,
          num_devices=1,
          optimizer=common.optimizer(
              5e-4,
              schedule="cosine",
              warmup_steps=2 if smoke else 10,
              b2=0.98,
          ),
          update=dict(center_coef=0.0, num_microbatches=1),
          loop=common.loop(8 if smoke else 180),
          normalize_on=common.source(common.ASSISTANT, 64 if smoke else 256),
          samples=common.assistant_samples(),
      )
  )
