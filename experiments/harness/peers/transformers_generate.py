"""`transformers`' generate, as it is and in its faster ways.

    dynamic    its default: a cache that grows by a token a step
    static     a cache of full length
    compiled   the same, with the decoding step through torch.compile; on a GPU
               generate does so itself
"""

from collections.abc import Callable
import time
from typing import Any

import torch

from experiments.harness.peers import torch_models


def make(argument: str, job: dict[str, Any]) -> Callable[[], dict[str, float]]:
  """Sampling of the job's prompts, all completions of full length."""
  model = torch_models.language_model(job).eval()
  prompts = torch_models.random_tokens(
      job, job["num_prompts"], job["prompt_length"]
  )
  mask = torch.ones_like(prompts)
  options = {}
  if argument != "dynamic":
    options["cache_implementation"] = "static"
  if argument == "static":
    options["disable_compile"] = True
  if argument == "compiled" and torch_models.DEVICE == "cpu":
    model.forward = torch.compile(model.forward)
  num_new = job["completion_length"]

  @torch.inference_mode()
  def run():
    torch_models.wait()
    start = time.perf_counter()
    out = model.generate(
        prompts,
        attention_mask=mask,
        do_sample=True,
        temperature=job["temperature"],
        top_k=0,
        top_p=1.0,
        max_new_tokens=num_new,
        **options,
    )
    torch_models.wait()
    seconds = time.perf_counter() - start
    if out.shape[1] != job["prompt_length"] + num_new:
      raise RuntimeError(f"completions ended early: {tuple(out.shape)}")
    return {"generation": seconds}

  return run
