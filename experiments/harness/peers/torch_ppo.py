"""PPO as a plain torch loop: the same algorithm without any trainer.

Sampling by `transformers`' generate, one forward pass a model for the scores,
then epochs of minibatches with AdamW. Policy, value network, reference policy
and reward model are models of one size.
"""

from collections.abc import Callable
import time
from typing import Any

import torch

from experiments.harness.peers import torch_models

_CLIPRANGE, _VF_COEF, _GAE_LAMBDA = 0.2, 0.1, 0.95


def make(argument: str, job: dict[str, Any]) -> Callable[[], dict[str, float]]:
  """'ppo': one iteration, and its three parts."""
  if argument != "ppo":
    raise ValueError(f"torch_ppo knows ppo, not {argument!r}")
  loop = _Loop(job)

  def run():
    torch_models.wait()
    times = [time.perf_counter()]
    sequences = loop.rollout()
    times.append(_now())
    scored = loop.score(sequences)
    times.append(_now())
    loop.update(sequences, *scored)
    times.append(_now())
    return {
        "ppo": times[3] - times[0],
        "ppo/rollout": times[1] - times[0],
        "ppo/score": times[2] - times[1],
        "ppo/update": times[3] - times[2],
    }

  return run


def _now() -> float:
  torch_models.wait()
  return time.perf_counter()


class _Loop:

  def __init__(self, job: dict[str, Any]):
    self._job = job
    self._policy = torch_models.language_model(job, "float32")
    self._value = torch_models.scalar_model(job, "float32")
    self._ref = torch_models.language_model(job).eval()
    self._reward = torch_models.scalar_model(job).eval()
    self._params = [*self._policy.parameters(), *self._value.parameters()]
    self._optimizer = torch.optim.AdamW(
        self._params, lr=job["learning_rate"], fused=True
    )
    self._prompts = torch_models.random_tokens(
        job, job["num_prompts"], job["prompt_length"]
    )

  @torch.no_grad()
  def rollout(self) -> torch.Tensor:
    """[B, P + C]."""
    job = self._job
    with torch_models.autocast(job):
      out = self._policy.generate(
          self._prompts,
          attention_mask=torch.ones_like(self._prompts),
          do_sample=True,
          temperature=job["temperature"],
          top_k=0,
          top_p=1.0,
          max_new_tokens=job["completion_length"],
      )
    if out.shape[1] != job["prompt_length"] + job["completion_length"]:
      raise RuntimeError(f"completions ended early: {tuple(out.shape)}")
    return out

  @torch.no_grad()
  def score(self, sequences: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """(old log-probs, values, advantages, returns), each [B, C]."""
    job = self._job
    with torch_models.autocast(job):
      logprobs = self._logprobs(self._policy, sequences)
      ref_logprobs = self._logprobs(self._ref, sequences)
      values = self._values(sequences)
      scores = self._scalars(self._reward, sequences)[:, -1]
    rewards = -job["kl_coef"] * (logprobs - ref_logprobs)
    rewards[:, -1] += scores
    advantages, after = torch.zeros_like(values), 0.0
    for t in reversed(range(values.shape[1])):
      is_last = t + 1 == values.shape[1]
      following = 0.0 if is_last else values[:, t + 1]
      delta = rewards[:, t] + following - values[:, t]
      after = delta + _GAE_LAMBDA * after
      advantages[:, t] = after
    returns = advantages + values
    advantages = (advantages - advantages.mean()) / (advantages.std() + 1e-8)
    return logprobs, values, advantages, returns

  def update(self, sequences: torch.Tensor, *scored: torch.Tensor) -> None:
    """All epochs."""
    job = self._job
    size = job["num_prompts"] // job["num_minibatches"]
    for _ in range(job["num_epochs"]):
      order = torch.randperm(job["num_prompts"], device=sequences.device)
      for rows in order.split(size):
        self._step(sequences[rows], *(x[rows] for x in scored))

  def _step(self, sequences, old_logprobs, old_values, advantages, returns):
    with torch_models.autocast(self._job):
      logprobs = self._logprobs(self._policy, sequences)
      values = self._values(sequences)
    ratio = (logprobs - old_logprobs).exp()
    clipped = ratio.clamp(1 - _CLIPRANGE, 1 + _CLIPRANGE)
    policy_loss = -torch.min(ratio * advantages, clipped * advantages).mean()
    near = old_values + (values - old_values).clamp(-_CLIPRANGE, _CLIPRANGE)
    value_loss = 0.5 * torch.max(
        (values - returns) ** 2, (near - returns) ** 2
    ).mean()
    (policy_loss + _VF_COEF * value_loss).backward()
    torch.nn.utils.clip_grad_norm_(self._params, 1.0)
    self._optimizer.step()
    self._optimizer.zero_grad(set_to_none=True)

  def _logprobs(self, model, sequences) -> torch.Tensor:
    num = self._job["completion_length"]
    # The head on completion positions alone, as here.
    out = model(sequences, use_cache=False, logits_to_keep=num + 1)
    logits = out.logits[:, :-1].float() / self._job["temperature"]
    chosen = sequences[:, -num:, None]
    return logits.log_softmax(-1).gather(-1, chosen).squeeze(-1)

  def _values(self, sequences) -> torch.Tensor:
    return self._scalars(self._value, sequences)[
        :, -self._job["completion_length"] - 1 : -1
    ]

  def _scalars(self, model, sequences) -> torch.Tensor:
    trunk = getattr(model, model.base_model_prefix)
    hidden = trunk(sequences, use_cache=False).last_hidden_state
    return model.score(hidden).squeeze(-1).float()
