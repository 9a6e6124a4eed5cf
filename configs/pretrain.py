"""Pretrains the embedded domain's base model: 0.9 M parameters.

    python -m experiments.pretrain --config=configs/pretrain.py \
        --workdir=runs/first/pretrain
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
          train=dict(
              seed=0,
              batch_size=16,
              seq_len=128,
              num_devices=1,
              optimizer=common.optimizer(
                  3e-3,
                  schedule="cosine",
                  warmup_steps=4 if smoke else 50,
                  final_fraction=0.1,
                  b2=0.98,
                  weight_decay=0.1,
              ),
              sft=dict(z_loss_coef=0.0, num_microbatches=1),
              loop=common.loop(
                  8 if smoke else 700, best_metric="eval/loss", best_mode="min"
              ),
              samples=common.assistant_samples(),
              sample_prompts=common.source(common.ASSISTANT, 12),
          ),
      )
  )
