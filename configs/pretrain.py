"""Pretrains the embedded domain's base model: 0.9 M parameters.

    python -m experiments.pretrain --config=configs/pretrain.py \
        --workdir=runs/first/pretrain

2 minutes on 2 cores of an Intel Xeon, to a held-out loss of 0.60 nats a
token: a model that mostly goes on with a request instead of answering it.
"""

from ml_collections import ConfigDict

from configs import common


def get_config(arg: str = common.FULL) -> ConfigDict:
  """full, or smoke: a model that learns nothing, in seconds."""
  common.check_arg(arg, common.FULL, common.SMOKE)
  smoke = arg == common.SMOKE
  vocab_size = 512
  return ConfigDict(
      dict(
          documents=common.source(common.ASSISTANT, 600 if smoke else 30_000),
          heldout_documents=common.source(
              common.ASSISTANT, 100 if smoke else 1_000
          ),
          tokenizer=dict(path="", vocab_size=vocab_size),
          model=common.llama_like(
              vocab_size,
              num_layers=2 if smoke else 4,
              width=32 if smoke else 128,
              num_heads=2 if smoke else 4,
              scan_unroll=1 if smoke else 4,
          ),
          train=common.language_model_training(
              num_steps=8 if smoke else 700,
              learning_rate=3e-3,
              warmup_steps=4 if smoke else 50,
              weight_decay=0.1,
          ),
      )
  )
