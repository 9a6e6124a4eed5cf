"""Has the embedded domain's annotators compare completions of the SFT policy.

    python -m experiments.preferences --config=configs/preferences.py \
        --workdir=runs/first/preferences

13 seconds on 2 cores of an Intel Xeon for 8,000 comparisons; two annotators
agree on 80% of them.

Needs `runs/first/sft`, as configs/rlhf.py leaves it. :ranking has them rank 4
completions at once; its workdir is then runs/first/preferences_ranking.
"""

from ml_collections import ConfigDict

from configs import common


def get_config(arg: str = common.FULL) -> ConfigDict:
  """full, or smoke: in seconds; ranking has them rank 4 instead."""
  common.check_arg(arg, common.FULL, common.SMOKE, "ranking")
  smoke = arg == common.SMOKE
  return ConfigDict(
      dict(
          seed=0,
          init_from="runs/first/sft",
          prompts=common.source(common.ASSISTANT, 48 if smoke else 1_500),
          heldout_prompts=common.source(
              common.ASSISTANT, 32 if smoke else 200
          ),
          annotators=common.ASSISTANT,
          kind="ranking" if arg == "ranking" else "comparison",
          num_completions=4,
          samples=common.assistant_samples(),
          batch_size=64 if smoke else 200,
      )
  )
