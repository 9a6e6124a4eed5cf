"""Fine-tunes the embedded domain's base model on demonstrations.

    python -m experiments.sft --config=configs/sft.py --workdir=runs/first/sft

A minute on 2 cores of an Intel Xeon, to a held-out loss of 0.38 nats a token
and a true reward of 0.52. Needs `runs/first/pretrain`, as configs/rlhf.py
leaves it.
"""

from ml_collections import ConfigDict

from configs import common


def get_config(arg: str = common.FULL) -> ConfigDict:
  """full, or smoke: in seconds."""
  common.check_arg(arg, common.FULL, common.SMOKE)
  smoke = arg == common.SMOKE
  return ConfigDict(
      dict(
          init_from="runs/first/pretrain",
          demonstrations=common.source(
              common.ASSISTANT, 400 if smoke else 12_000
          ),
          heldout_demonstrations=common.source(
              common.ASSISTANT, 100 if smoke else 600
          ),
          train_on_prompt=False,
          too_long="drop",
          compute=common.compute(),
          lora=common.lora(),
          train=common.language_model_training(
              num_steps=8 if smoke else 350,
              learning_rate=1e-3,
              warmup_steps=2 if smoke else 10,
          ),
      )
  )
