"""Random models of a job's shape in torch, and its tokens."""

from typing import Any

import torch
import transformers

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def config(job: dict[str, Any]) -> transformers.PretrainedConfig:
  """The job's shape, with the last id as padding and no end."""
  fields = dict(job["model"])
  name = fields.pop("model_type")
  # Dropout, GPT-2's default, is work that the others do not do.
  if name == "gpt2":
    fields |= {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
  return transformers.AutoConfig.for_model(
      name,
      **fields,
      pad_token_id=fields["vocab_size"] - 1,
      bos_token_id=None,
      eos_token_id=None,
      num_labels=1,
  )


def language_model(
    job: dict[str, Any], dtype: str = ""
) -> transformers.PreTrainedModel:
  """A policy; of the job's dtype unless another is given."""
  return _model(transformers.AutoModelForCausalLM, job, dtype)


def scalar_model(
    job: dict[str, Any], dtype: str = ""
) -> transformers.PreTrainedModel:
  """A reward model or value network."""
  return _model(transformers.AutoModelForSequenceClassification, job, dtype)


def _model(kind: Any, job: dict[str, Any], dtype: str):
  torch.manual_seed(0)
  dtype = getattr(torch, dtype or job["dtype"])
  model = kind.from_config(config(job), dtype=dtype)
  return model.to(DEVICE)


def random_tokens(job: dict[str, Any], *shape: int) -> torch.Tensor:
  """Ids from the vocabulary, but padding and end."""
  generator = torch.Generator().manual_seed(0)
  highest = job["model"]["vocab_size"] - 2
  return torch.randint(0, highest, shape, generator=generator).to(DEVICE)


def wait() -> None:
  """Until the device has done what it was given."""
  if DEVICE == "cuda":
    torch.cuda.synchronize()


def autocast(job: dict[str, Any]):
  """The job's dtype for matmuls of float32 params."""
  dtype = getattr(torch, job["dtype"])
  return torch.autocast(DEVICE, dtype, enabled=dtype != torch.float32)
