"""Compares base, SFT and PPO policies on the embedded domain.

    python -m experiments.evaluate --config=configs/evaluate.py \
        --workdir=runs/first/evaluate

12 seconds on 2 cores of an Intel Xeon for 3 x 512 completions.

Needs `runs/first/{pretrain,sft,reward,ppo}`, as configs/rlhf.py leaves them.
"""

from ml_collections import ConfigDict

from configs import common


def get_config(arg: str = common.FULL) -> ConfigDict:
  """full, or smoke: in seconds."""
  common.check_arg(arg, common.FULL, common.SMOKE)
  smoke = arg == common.SMOKE
  return ConfigDict(
      dict(
          seed=0,
          policies=(
              "base=runs/first/pretrain",
              "sft=runs/first/sft",
              "ppo=runs/first/ppo",
          ),
          ref_policy="sft",
          reward_model="runs/first/reward",
          judge=common.ASSISTANT,
          prompts=common.source(common.ASSISTANT, 32 if smoke else 512),
          samples=common.assistant_samples(),
          batch_size=32 if smoke else 256,
          kl_target=1.5,
      )
  )
