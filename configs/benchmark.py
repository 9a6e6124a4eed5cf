"""How fast generation, training steps and PPO are, beside the machine's limit.

    python -m experiments.benchmark --config=configs/benchmark.py:small \
        --out=small.jsonl

Prints a table and writes one line of JSON a measure. Sizes, as (layers, width,
heads, vocabulary): tiny (4, 128, 4, 512), small (6, 384, 6, 8192) and gpt2 (12,
768, 12, 50257), GPT-2's own shape, in float32 for CPUs; llama1b, the shape of
Llama 3.2 1B in bfloat16, for accelerators. Params are random: no speed here
depends on them, as nothing ends a completion before its full length.

    --peer               the same work by what else is installed, in turns
    --compare=old.json   exit code 1 where something became slower than noise
    --config.measures="('ppo',)"   some measures alone
"""

from ml_collections import ConfigDict

from configs import common, ppo

SIZES = ("tiny", "small", "gpt2", "llama1b")
MEASURES = ("generation", "sft", "reward", "dpo", "ppo", "startup")


def get_config(arg: str = "small") -> ConfigDict:
  """tiny, small, gpt2 or llama1b."""
  common.check_arg(arg, *SIZES)
  num_prompts = 16 if arg == "gpt2" else 64
  rows = {"tiny": 64, "small": 16, "gpt2": 4, "llama1b": 32}[arg]
  return ConfigDict(
      dict(
          size=arg,
          measures=MEASURES,
          repeats=5,
          warmups=1,
          model=_model(arg),
          batch_size=rows,
          num_pairs=rows // 2,
          copy_mib=2_048 if arg == "llama1b" else 256,
          ppo=_ppo(num_prompts),
      )
  )


def _model(size: str) -> ConfigDict:
  model = _shape(size)
  model.max_length = 1_024
  return model


def _shape(size: str) -> ConfigDict:
  if size == "tiny":
    return common.llama_like(512, 4, 128, 4)
  if size == "small":
    return common.llama_like(8_192, 6, 384, 6)
  if size == "gpt2":
    return common.llama_like(
        50_257,
        12,
        768,
        12,
        ff_dim=3_072,
        position="learned",
        norm="layernorm",
        norm_bias=True,
        activation="gelu",
        attention_bias="all",
        feed_forward_bias=True,
    )
  return common.llama_like(
      128_256,
      16,
      2_048,
      32,
      num_kv_heads=8,
      ff_dim=8_192,
      rope_theta=500_000.0,
      dtype="bfloat16",
  )


def _ppo(num_prompts: int) -> ConfigDict:
  """That of configs/ppo.py, of these lengths; its places are not read."""
  config = ppo.get_config()
  config.rollout_batch_size = num_prompts
  config.samples = common.samples(64, 64)
  config.ppo.update(num_epochs=4, num_minibatches=4)
  return config
