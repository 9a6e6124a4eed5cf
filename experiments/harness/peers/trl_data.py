"""What TRL's trainers ask for beside a model, and how they are stopped."""

from collections.abc import Callable
import tempfile
from typing import Any

import tokenizers
import torch
import transformers

from experiments.harness.peers import torch_models


def tokenizer(job: dict[str, Any]) -> transformers.PreTrainedTokenizerFast:
  """The id n is the word 'n'; the last two are padding and end."""
  size = job["model"]["vocab_size"]
  backend = tokenizers.Tokenizer(
      tokenizers.models.WordLevel(
          {str(i): i for i in range(size)}, unk_token="0"
      )
  )
  backend.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
  return transformers.PreTrainedTokenizerFast(
      tokenizer_object=backend,
      pad_token=str(size - 1),
      eos_token=str(size - 2),
      padding_side="left",
  )


def rows(job: dict[str, Any], num: int, length: int) -> list[list[int]]:
  """Random ids as lists."""
  return torch_models.random_tokens(job, num, length).cpu().tolist()


def words(ids: list[int]) -> str:
  """The text of which `tokenizer` makes these ids."""
  return " ".join(map(str, ids))


def arguments(job: dict[str, Any], batch_size: int) -> dict[str, Any]:
  """Of every trainer: float32 or the job's dtype, nothing saved or told."""
  return dict(
      output_dir=tempfile.mkdtemp(),
      per_device_train_batch_size=batch_size,
      learning_rate=job["learning_rate"],
      max_grad_norm=1.0,
      bf16=job["dtype"] == "bfloat16",
      gradient_checkpointing=False,
      use_cpu=not torch.cuda.is_available(),
      report_to=[],
      save_strategy="no",
      eval_strategy="no",
      logging_strategy="no",
      disable_tqdm=True,
  )


class WaitAtStep(transformers.TrainerCallback):
  """Has a trainer call `wait` once in so many optimizer steps.

  at_end: at their end, and not before they begin.
  """

  def __init__(
      self, wait: Callable[[], None], at_end: bool = False, every: int = 1
  ):
    self._wait, self._at_end, self._every = wait, at_end, every

  def on_step_begin(self, args, state, control, **kwargs) -> None:
    """Of an optimizer step."""
    if not self._at_end and state.global_step % self._every == 0:
      self._wait()

  def on_step_end(self, args, state, control, **kwargs) -> None:
    """Of an optimizer step, or of PPO's whole iteration."""
    if self._at_end and state.global_step % self._every == 0:
      self._wait()
