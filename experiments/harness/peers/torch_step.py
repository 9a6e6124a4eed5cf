"""A plain supervised step in torch: forward, backward, clipping, AdamW."""

from collections.abc import Callable
import time
from typing import Any

import torch

from experiments.harness.peers import torch_models


def make(argument: str, job: dict[str, Any]) -> Callable[[], dict[str, float]]:
  """'sft': of the job's rows, all tokens targets."""
  if argument != "sft":
    raise ValueError(f"torch_step knows sft, not {argument!r}")
  # Float32 params, as ours are; matmuls in the job's dtype.
  model = torch_models.language_model(job, "float32").train()
  optimizer = torch.optim.AdamW(
      model.parameters(), lr=job["learning_rate"], fused=True
  )
  length = job["prompt_length"] + job["completion_length"]
  tokens = torch_models.random_tokens(job, job["batch_size"], length)

  def run():
    torch_models.wait()
    start = time.perf_counter()
    with torch_models.autocast(job):
      loss = model(input_ids=tokens, labels=tokens, use_cache=False).loss
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    torch_models.wait()
    return {"sft": time.perf_counter() - start}

  return run
