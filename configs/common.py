"""Sections that configs share, each with all of its fields.

Configs are data: they import ml_collections and one another, compute numbers,
and nothing else.
"""

from ml_collections import ConfigDict

ASSISTANT = "world:assistant"

# Mini-arguments that every stage of the embedded domain understands.
FULL, SMOKE = "full", "smoke"


def check_arg(arg: str, *known: str) -> None:
  """Refuses a mini-argument that the config does not know."""
  if arg not in known:
    raise ValueError(f"mini-argument {arg!r} is none of {', '.join(known)}")


def parse_seed(arg: str) -> tuple[str, int]:
  """'full,seed=3' -> ('full', 3); without a seed it is 0."""
  name, _, rest = arg.partition(",")
  if not rest:
    return name, 0
  key, _, value = rest.partition("=")
  if key != "seed" or not value.isdigit():
    raise ValueError(f"mini-argument {arg!r}: want seed=NUMBER after the comma")
  return name or FULL, int(value)


def source(
    name: str, limit: int = 0, on_error: str = "raise", use: str = "share"
) -> ConfigDict:
  """Where records come from; limit 0 takes them all.

  use='share' divides one file between training and evaluation, 'all' takes the
  whole of one that was divided already.
  """
  return ConfigDict(
      dict(
          source=name,
          limit=limit,
          on_error=on_error,
          use=use,
          chat_template="plain",
      )
  )


def optimizer(learning_rate: float, **changes) -> ConfigDict:
  """AdamW with a constant learning rate, unless changed."""
  cfg = ConfigDict(
      dict(
          learning_rate=learning_rate,
          schedule="constant",
          warmup_steps=0,
          final_fraction=0.0,
          b1=0.9,
          b2=0.999,
          epsilon=1e-8,
          epsilon_placement="optax",
          weight_decay=0.0,
          max_grad_norm=1.0,
      )
  )
  cfg.update(changes)
  return cfg


def loop(num_steps: int, **changes) -> ConfigDict:
  """Logs 20 times, evaluates and saves 4 times, unless changed."""
  log_every = max(num_steps // 20, 1)
  eval_every = max(num_steps // 4 // log_every, 1) * log_every
  cfg = ConfigDict(
      dict(
          num_steps=num_steps,
          log_every=log_every,
          eval_every=eval_every,
          checkpoint_every=eval_every,
          keep_checkpoints=2,
          best_metric="",
          best_mode="max",
          max_nonfinite_steps=5,
          tensorboard=True,
          wandb=False,
      )
  )
  cfg.update(changes)
  return cfg


def samples(
    max_prompt_length: int, max_completion_length: int, **changes
) -> ConfigDict:
  """How completions are drawn."""
  cfg = ConfigDict(
      dict(
          max_prompt_length=max_prompt_length,
          max_completion_length=max_completion_length,
          temperature=1.0,
          greedy=False,
          top_k=0,
          top_p=1.0,
          stop_tokens=(),
          stop_after=0,
          too_long="error",
          num_slots=0,
          num_cache_buckets=1,
          rollout_weights="compute",
      )
  )
  cfg.update(changes)
  return cfg


def assistant_samples() -> ConfigDict:
  """Lengths that hold the embedded domain's requests and answers."""
  return samples(max_prompt_length=20, max_completion_length=32)


def mesh(**changes) -> ConfigDict:
  """One device; each axis is a number of them, one may be -1 for the rest."""
  cfg = ConfigDict(dict(replica=1, data=1, fsdp=1, tensor=1, sequence=1))
  cfg.update(changes)
  return cfg


def sharding(*models: str) -> ConfigDict:
  """No rules for these models' parameters but their own."""
  return ConfigDict({model: () for model in models})


def on_the_policys_devices() -> ConfigDict:
  """No devices of its own, for a model that PPO does not train."""
  return ConfigDict(dict(devices=0, fsdp=1, tensor=1))


def compute(**changes) -> ConfigDict:
  """Models as they were saved, every layer's activations kept."""
  cfg = ConfigDict(
      dict(
          dtype="",
          param_dtype="",
          remat=False,
          scan_unroll=0,
          head_chunk_size=128,
          attention_backend="auto",
      )
  )
  cfg.update(changes)
  return cfg


def lora(rank: int = 0, **changes) -> ConfigDict:
  """An adapter of that rank on frozen weights; 0 trains the weights."""
  cfg = ConfigDict(
      dict(
          rank=rank,
          alpha=16.0,
          targets=("all-linear",),
          dropout=0.0,
          rank_stabilized=False,
      )
  )
  cfg.update(changes)
  return cfg


def language_model_training(
    num_steps: int, learning_rate: float, warmup_steps: int, **changes
) -> ConfigDict:
  """Next-token training on the embedded domain: pretraining and SFT."""
  return ConfigDict(
      dict(
          seed=0,
          batch_size=16,
          seq_len=128,
          mesh=mesh(),
          sharding=sharding("policy"),
          parallelism="jit",
          optimizer=optimizer(
              learning_rate,
              schedule="cosine",
              warmup_steps=warmup_steps,
              final_fraction=0.1,
              b2=0.98,
              **changes,
          ),
          sft=dict(z_loss_coef=0.0, num_microbatches=1),
          loop=loop(num_steps, best_metric="eval/loss", best_mode="min"),
          # Room for the tokenizers of models from elsewhere, down to bytes.
          samples=samples(max_prompt_length=80, max_completion_length=32),
          sample_prompts=source(ASSISTANT, 12),
      )
  )


def llama_like(
    vocab_size: int, num_layers: int, width: int, num_heads: int, **changes
) -> ConfigDict:
  """A decoder of Llama's shape."""
  cfg = ConfigDict(
      dict(
          vocab_size=vocab_size,
          num_layers=num_layers,
          width=width,
          num_heads=num_heads,
          num_kv_heads=num_heads,
          head_dim=width // num_heads,
          # 8/3 of the width, rounded to a multiple of 32.
          ff_dim=-(-8 * width // 3 // 32) * 32,
          max_length=128,
          position="rotary",
          norm="rmsnorm",
          norm_placement="pre",
          norm_from_one=False,
          activation="swiglu",
          attention_bias="none",
          feed_forward_bias=False,
          norm_bias=False,
          qk_norm="none",
          query_scale_dim=0,
          attention_softcap=0.0,
          logit_softcap=0.0,
          parallel_residual=False,
          tie_head=True,
          scale_embedding=False,
          norm_epsilon=1e-5,
          rope_theta=10_000.0,
          rotary_fraction=1.0,
          rope_scaling=None,
          sliding_window=0,
          full_attention_layers=(),
          local_rope_theta=0.0,
          num_experts=0,
          experts_per_token=0,
          dtype="float32",
          param_dtype="float32",
          remat=False,
          scan_unroll=1,
          head_chunk_size=128,
          attention_backend="auto",
      )
  )
  cfg.update(changes)
  return cfg
