"""Trains a reward model on the embedded domain's comparisons.

    python -m experiments.reward --config=configs/reward.py \
        --workdir=runs/first/reward

50 seconds on 2 cores of an Intel Xeon, to 71% of held-out pairs, where the best
predictor would be on 84%.

Needs `runs/first/sft` and `runs/first/preferences`, as configs/rlhf.py leaves
them. :ranking reads rankings of 4 from runs/first/preferences_ranking, which
`experiments.preferences --config=configs/preferences.py:ranking` leaves.

:hh trains one on people's comparisons, Anthropic's HH harmless pairs, from the
pretrained stories260K; RLHF_JAX_DATA names the folder with hh_harmless/ and
stories260K/. 5 GiB; expect 62% of 157 held-out pairs, interval 55% to 70%.

    python -m experiments.reward --config=configs/reward.py:hh \
        --workdir=runs/hh
"""

from ml_collections import ConfigDict

from configs import common


def get_config(arg: str = common.FULL) -> ConfigDict:
  """full, smoke (in seconds), ranking or hh."""
  common.check_arg(arg, common.FULL, common.SMOKE, "ranking", "hh")
  smoke = arg == common.SMOKE
  kind = "rankings" if arg == "ranking" else "comparisons"
  preferences = "runs/first/preferences"
  if arg == "ranking":
    preferences += "_ranking"
  config = ConfigDict(
      dict(
          seed=0,
          init_from="runs/first/sft",
          ref_policy="runs/first/sft",
          comparisons=common.source(
              f"{preferences}/train_{kind}.jsonl", use="all"
          ),
          heldout=common.source(
              f"{preferences}/heldout_{kind}.jsonl", use="all"
          ),
          too_long="drop",
          max_prompt_length=20,
          # One more than is sampled: the end token of one that never ended.
          # What an untrained model samples is no text: it takes more tokens.
          max_completion_length=96 if smoke else 33,
          batch_size=16 if smoke else 32,
          mesh=common.mesh(),
          sharding=common.sharding("reward_model"),
          parallelism="jit",
          optimizer=common.optimizer(
              5e-4,
              schedule="cosine",
              warmup_steps=2 if smoke else 10,
              b2=0.98,
          ),
          reward=dict(
              center_coef=0.0, ranking_loss="pairwise", num_microbatches=1
          ),
          compute=common.compute(),
          lora=common.lora(),
          loop=common.loop(
              8 if smoke else 220, best_metric="eval/accuracy"
          ),
          normalize_on=common.source(common.ASSISTANT, 64 if smoke else 256),
          samples=common.assistant_samples(),
      )
  )
  if arg == "hh":
    _use_hh(config)
  return config


def _use_hh(config: ConfigDict) -> None:
  data = "${RLHF_JAX_DATA}"
  pairs = f"{data}/hh_harmless/hh_harmless_base_dev.jsonl.gz"
  config.init_from = (
      f"llama2c:{data}/stories260K/stories260K.bin"
      f":{data}/stories260K/tok512.model"
  )
  config.ref_policy = ""  # the score is fitted on held-out completions
  # Six of its pairs have an empty answer or part before their last turn.
  config.comparisons = common.source(pairs, on_error="skip")
  config.heldout = common.source(pairs, on_error="skip")
  # The tokenizer has 512 tokens: dialogues are long, and lose their beginning.
  config.too_long = "truncate_prompt_left"
  config.max_prompt_length = 256
  config.max_completion_length = 256
  config.batch_size = 16
  config.optimizer = common.optimizer(
      5e-4, schedule="cosine", warmup_steps=10, weight_decay=0.1
  )
  config.loop = common.loop(100, best_metric="eval/accuracy")
