"""Adapters made by `peft` on the golden models.

    python -m tests.models.families.peft_adapters

writes the golden folders beside this file: an adapter and the logits that torch
computes with it. Only this needs peft and torch; what reads them does not.
"""

import pathlib

import numpy as np

from tests.models.families import hf_models

GOLDEN = pathlib.Path(__file__).parent / "golden_adapters"
# name -> (golden model, fields of peft's LoraConfig)
ADAPTERS = {
    "llama": (
        "llama",
        dict(r=2, lora_alpha=6, target_modules=["q_proj", "v_proj"]),
    ),
    "llama_everywhere": (
        "llama",
        dict(r=4, lora_alpha=3, target_modules="all-linear", use_rslora=True),
    ),
    "llama_patterns": (
        "llama",
        dict(
            r=2,
            lora_alpha=4,
            target_modules=r".*\.(k_proj|o_proj|down_proj)",
            rank_pattern={"o_proj": 3},
            alpha_pattern={"mlp.down_proj": 5},
        ),
    ),
    "gpt2": (
        "gpt2",
        dict(
            r=2,
            lora_alpha=6,
            target_modules=["c_attn", "mlp.c_proj"],
            fan_in_fan_out=True,
        ),
    ),
    "gpt_neox": (
        "gpt_neox",
        dict(
            r=2,
            lora_alpha=6,
            target_modules=["query_key_value", "dense_h_to_4h", "dense"],
        ),
    ),
    "opt": (
        "opt",
        dict(r=2, lora_alpha=6, target_modules=["out_proj", "fc1", "k_proj"]),
    ),
    "phi3": (
        "phi3",
        dict(
            r=2,
            lora_alpha=6,
            target_modules=["qkv_proj", "o_proj", "gate_up_proj"],
        ),
    ),
    "gemma2": (
        "gemma2", dict(r=2, lora_alpha=6, target_modules="all-linear")
    ),
    "mixtral": (
        "mixtral",
        dict(r=2, lora_alpha=6, target_modules=["q_proj", "o_proj"]),
    ),
    "qwen3": ("qwen3", dict(r=1, lora_alpha=2, target_modules="all-linear")),
}
# Small, and with what is special: fused and interleaved projections.
COMMITTED = ("llama", "gpt2", "gpt_neox")


def make_peft(name: str, **changes):
  """peft's model, with both parts random."""
  import peft
  import torch

  model_name, fields = ADAPTERS[name]
  torch.manual_seed(1)
  model = peft.get_peft_model(
      hf_models.make_torch(model_name),
      peft.LoraConfig(task_type="CAUSAL_LM", **(fields | changes)),
  )
  with torch.no_grad():
    for path, weight in model.named_parameters():
      if "lora_" in path:
        weight.copy_(0.2 * torch.randn_like(weight))
  return model.eval()


def write_golden():
  for name in COMMITTED:
    model = make_peft(name)
    model.save_pretrained(GOLDEN / name)
    (GOLDEN / name / "README.md").unlink(missing_ok=True)
    tokens, mask = hf_models.rows("left")
    logits = hf_models.torch_logits(model, tokens, mask)
    np.savez_compressed(
        GOLDEN / name / "expected.npz", tokens=tokens, mask=mask, logits=logits
    )
    print(name)


if __name__ == "__main__":
  write_golden()
