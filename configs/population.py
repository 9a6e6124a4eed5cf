"""Improves the embedded domain's policy by PPO with eight seeds at once.

    python -m experiments.population --config=configs/population.py \
        --workdir=runs/first/population

Each member is a run of configs/ppo.py, whose folder is
runs/first/population/seed0/ppo and so on. Needs `runs/first/{sft,reward}`, as
configs/rlhf.py leaves them.

Coefficients instead of seeds, or both: every setting with every seed.

    python -m experiments.population --config=configs/population.py \
        --workdir=runs/first/kl --config.num_seeds=2 \
        --config.vary="('ppo.kl_coef=0.02,0.05,0.1,0.3',)"
"""

from ml_collections import ConfigDict

from configs import common, ppo


def get_config(arg: str = common.FULL) -> ConfigDict:
  """full, or smoke: two seeds, in seconds."""
  common.check_arg(arg, common.FULL, common.SMOKE)
  lone = ppo.get_config(arg)
  # A checkpoint holds all members: there is no best one of each.
  lone.loop.best_metric = ""
  return ConfigDict(
      dict(num_seeds=2 if arg == common.SMOKE else 8, vary=(), ppo=lone)
  )
