"""Tiny random models of every family, made by transformers with torch.

    python -m tests.models.families.hf_models golden [NAME ...]

writes the golden folders beside this file (all, or those named): a checkpoint
and the logits that torch computes from it. Only this needs torch; the tests
that read them do not.

    python -m tests.models.families.hf_models measure

prints how far our logits are from torch's, in float32 and bfloat16.
"""

import pathlib
import sys

import numpy as np

GOLDEN = pathlib.Path(__file__).parent / "golden"
VOCAB_SIZE = 40

_LLAMA = dict(
    vocab_size=VOCAB_SIZE,
    hidden_size=16,
    intermediate_size=24,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=96,
)
_LLAMA3_ROPE = dict(
    rope_type="llama3",
    rope_theta=50.0,
    factor=4.0,
    original_max_position_embeddings=16,
    low_freq_factor=1.0,
    high_freq_factor=3.0,
)
# name -> (model_type, config fields)
MODELS = {
    "llama": ("llama", {**_LLAMA}),
    "llama_tied_scaled": (
        "llama",
        {
            **_LLAMA,
            "num_key_value_heads": 4,
            "tie_word_embeddings": True,
            "rope_parameters": _LLAMA3_ROPE,
        },
    ),
    "llama_bias_linear": (
        "llama",
        {
            **_LLAMA,
            "attention_bias": True,
            "mlp_bias": True,
            "rope_parameters": dict(
                rope_type="linear", rope_theta=1e4, factor=2.0
            ),
        },
    ),
    "llama_yarn": (
        "llama",
        {
            **_LLAMA,
            "head_dim": 12,
            "rope_parameters": dict(
                rope_type="yarn",
                rope_theta=20.0,
                factor=4.0,
                original_max_position_embeddings=24,
                beta_fast=3.0,
                beta_slow=0.5,
            ),
        },
    ),
    "llama_dynamic": (
        "llama",
        {
            **_LLAMA,
            "rope_parameters": dict(
                rope_type="dynamic", rope_theta=1e4, factor=4.0
            ),
        },
    ),
    "mistral": ("mistral", {**_LLAMA, "sliding_window": 7, "head_dim": 6}),
    "qwen2": ("qwen2", {**_LLAMA, "tie_word_embeddings": True}),
    # The second of its layers has a window.
    "qwen2_window": (
        "qwen2",
        {
            **_LLAMA,
            "use_sliding_window": True,
            "sliding_window": 7,
            "max_window_layers": 1,
        },
    ),
    "qwen3": ("qwen3", {**_LLAMA, "head_dim": 6}),
    # Caps that bite at the sizes of a tiny model's scores and logits.
    "gemma2": (
        "gemma2",
        {
            **_LLAMA,
            "head_dim": 6,
            "query_pre_attn_scalar": 5,
            "sliding_window": 7,
            "attn_logit_softcapping": 1.5,
            "final_logit_softcapping": 2.5,
        },
    ),
    "gemma3_text": (
        "gemma3_text",
        {
            **_LLAMA,
            "num_hidden_layers": 4,
            "num_key_value_heads": 1,
            "head_dim": 6,
            "query_pre_attn_scalar": 9,
            "sliding_window": 7,
            "sliding_window_pattern": 3,
            "rope_parameters": {
                "full_attention": dict(
                    rope_type="linear", rope_theta=200.0, factor=4.0
                ),
                "sliding_attention": dict(rope_type="default", rope_theta=30.0),
            },
        },
    ),
    "phi3": (
        "phi3",
        {
            **_LLAMA,
            "sliding_window": 7,
            "rope_parameters": dict(
                rope_type="default", rope_theta=1e4, partial_rotary_factor=0.5
            ),
        },
    ),
    "olmo2": ("olmo2", {**_LLAMA}),
    "mixtral": (
        "mixtral",
        {
            **_LLAMA,
            "intermediate_size": 12,
            "num_local_experts": 4,
            "num_experts_per_tok": 2,
        },
    ),
    "gpt2": (
        "gpt2",
        dict(
            vocab_size=VOCAB_SIZE,
            n_positions=96,
            n_embd=16,
            n_layer=2,
            n_head=4,
        ),
    ),
    "gpt_neox": (
        "gpt_neox",
        dict(
            vocab_size=VOCAB_SIZE,
            hidden_size=16,
            num_hidden_layers=2,
            num_attention_heads=2,
            intermediate_size=24,
            max_position_embeddings=96,
        ),
    ),
    "gpt_neox_serial_tied": (
        "gpt_neox",
        dict(
            vocab_size=VOCAB_SIZE,
            hidden_size=16,
            num_hidden_layers=2,
            num_attention_heads=4,
            intermediate_size=24,
            max_position_embeddings=96,
            use_parallel_residual=False,
            tie_word_embeddings=True,
            rope_parameters=dict(
                rope_type="default", rope_theta=1e4, partial_rotary_factor=0.5
            ),
        ),
    ),
    "opt": (
        "opt",
        dict(
            vocab_size=VOCAB_SIZE,
            hidden_size=16,
            num_hidden_layers=2,
            ffn_dim=24,
            max_position_embeddings=96,
            num_attention_heads=4,
            word_embed_proj_dim=16,
        ),
    ),
}


def make_torch(name: str, auto_class: str = "AutoModelForCausalLM", **changes):
  """A model with weights large enough for differences to show."""
  import torch
  import transformers

  model_type, fields = MODELS[name]
  config = transformers.CONFIG_MAPPING[model_type](
      **{**fields, "pad_token_id": 0, "eos_token_id": 1, "bos_token_id": 2}
      | changes
  )
  torch.manual_seed(0)
  model = getattr(transformers, auto_class).from_config(
      config, attn_implementation="eager"
  )
  with torch.no_grad():
    for path, weight in model.named_parameters():
      is_norm = "norm" in path or "ln_" in path
      # Gemma adds 1 to it.
      is_scale = path.endswith("weight") and "gemma" not in model_type
      start = 1.0 if is_norm and is_scale else 0.0
      weight.copy_(start + 0.2 * torch.randn_like(weight))
  return model.eval()


def rows(side: str, length: int = 24):
  """(tokens, mask) of three rows of different lengths."""
  rng = np.random.default_rng(0)
  tokens = rng.integers(3, VOCAB_SIZE, (3, length))
  mask = np.ones_like(tokens)
  for row, size in enumerate((length, length - 5, 3)):
    padding = slice(0, length - size) if side == "left" else slice(size, None)
    mask[row, padding] = 0
  return np.where(mask, tokens, 0), mask


def torch_logits(model, tokens, mask) -> np.ndarray:
  """Logits, with positions that count real tokens alone."""
  import torch

  positions = np.maximum(np.cumsum(mask, axis=1) - 1, 0)
  fields = dict(position_ids=torch.as_tensor(positions))
  with torch.no_grad():
    out = model(
        input_ids=torch.as_tensor(tokens),
        attention_mask=torch.as_tensor(mask),
        **fields,
    )
  return out.logits.numpy()


def measure():
  """A line of Markdown a model: largest differences over real positions."""
  import jax
  import jax.numpy as jnp

  from rlhf_jax.models import functions
  from rlhf_jax.models.families import huggingface

  print("| model | logits, float32 | log-probs, bfloat16 |\n|---|---|---|")
  for name in MODELS:
    expected = np.load(GOLDEN / name / "expected.npz")
    found = []
    for dtype, view in (
        ("float32", jnp.asarray),
        ("bfloat16", jax.nn.log_softmax),
    ):
      loaded = huggingface.load_folder(GOLDEN / name, dtype=dtype)
      logits = functions.make_logits_fn(loaded.config)(
          loaded.params,
          jnp.asarray(expected["tokens"], jnp.int32),
          jnp.asarray(expected["mask"], jnp.int32),
      )
      difference = np.abs(view(logits) - view(expected["logits"]))
      found.append(difference[expected["mask"] == 1].max())
    print(f"| {name} | {found[0]:.1e} | {found[1]:.2f} |")


def write_golden(*names: str):
  for name in names or MODELS:
    model = make_torch(name)
    folder = GOLDEN / name
    model.save_pretrained(folder)
    (folder / "generation_config.json").unlink(missing_ok=True)
    tokens, mask = rows("left")
    np.savez_compressed(
        folder / "expected.npz",
        tokens=tokens,
        mask=mask,
        logits=torch_logits(model, tokens, mask),
    )
    print(name)


if __name__ == "__main__":
  {"golden": write_golden, "measure": measure}[sys.argv[1]](*sys.argv[2:])
