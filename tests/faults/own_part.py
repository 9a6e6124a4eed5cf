"""Records encoded by one process, or by each of several in its own part."""

import dataclasses

import numpy as np

from rlhf_jax.data import encoding, own_part
from rlhf_jax.data.records import Comparison, Demonstration, Prompt, Ranking
from rlhf_jax.data.special_tokens import mark
from rlhf_jax.data.tokenizer import Tokenizer
from rlhf_jax.rewards import reward_model

TURN = "<turn>"
# All texts differ, so that none is spared; an odd number of them.
TEXTS = [f"{'Nine lives. ' * (i % 4)}{i} of them" for i in range(31)]


class Counting:
  """A tokenizer's backend that counts the texts it makes ids of."""

  def __init__(self, backend):
    self._backend, self.count = backend, 0

  def __getattr__(self, name):
    return getattr(self._backend, name)

  def encode_batch(self, texts, continues):
    self.count += len(texts)
    return self._backend.encode_batch(texts, continues)

  def encode_marked(self, text):
    self.count += 1
    return self._backend.encode_marked(text)


def _tokenizer() -> tuple[Tokenizer, Counting]:
  tokenizer = Tokenizer.train_byte_level_bpe(TEXTS, 280, [TURN])
  tokenizer._backend = Counting(tokenizer._backend)
  return tokenizer, tokenizer._backend


def encoded() -> dict[str, np.ndarray]:
  """Every array of every kind of record, and how many texts were encoded."""
  tokenizer, backend = _tokenizer()
  arrays = {}
  rendered = [f"{mark(TURN)}{x}{mark(TURN)}" for x in TEXTS]
  limits = dict(max_prompt_length=60, max_completion_length=60, policy="drop")

  def add(name, value):
    arrays[f"{name}/texts"] = np.asarray(backend.count)
    backend.count = 0
    if isinstance(value, list):
      value = {
          "lengths": [len(ids) for ids, _ in value],
          "ids": [i for ids, _ in value for i in ids],
          "masks": [i for _, mask in value for i in mask],
      }
    else:
      value = dataclasses.asdict(value)
    arrays.update({f"{name}/{k}": np.asarray(v) for k, v in value.items()})

  add("documents", encoding.encode_documents(
      TEXTS, tokenizer, max_length=8, policy="split")[0])
  for name, texts in (("plain", TEXTS), ("rendered", rendered)):
    records = [
        Demonstration(spans=((f"{x}? ", False), (f"{x}!", True))) for x in texts
    ]
    add(name, encoding.encode_demonstrations(
        records, tokenizer, max_length=90, policy="drop",
        train_on_prompt=False)[0])
  add("comparisons", encoding.encode_comparisons(
      [Comparison(prompt=x, chosen=x + "!", rejected=x + "?") for x in TEXTS],
      tokenizer, **limits)[0])
  add("rankings", encoding.encode_rankings(
      [
          Ranking(prompt=x, completions=(x + "1", x + "2", x + "3")[:n],
                  ranks=(1, 2, 3)[:n])
          for n, x in zip([3, 2] * 16, TEXTS)
      ],
      tokenizer, **limits)[0])
  add("prompts", encoding.encode_prompts(
      [Prompt(prompt=x) for x in TEXTS], tokenizer, max_prompt_length=12,
      policy="truncate_prompt_left")[0])
  return arrays


def check_read_anew(episodes, num: int) -> None:
  """A reward model's tokenizer reads this process's share of the text."""
  tokenizer, backend = _tokenizer()
  tokens, mask = reward_model._encode_anew(episodes, tokenizer, 64)
  prompts, completions = episodes.prompts, episodes.completions
  assert backend.count == 2 * -(-len(prompts) // num)
  ended = episodes.host_rollout.ended
  for i, (prompt, completion) in enumerate(zip(prompts, completions)):
    ids = [tokenizer.bos_id, *tokenizer.encode(prompt)]
    ids += tokenizer.encode(completion, continues=True)
    ids += [tokenizer.eos_id] * bool(ended[i])
    assert tokens[i][mask[i] == 1].tolist() == ids


def failure(index: int, num: int) -> str:
  """What this process says when the last cannot encode its part."""
  tokenizer, _ = _tokenizer()
  texts = ["fine"] * (2 * num)
  texts[num - 1] = "\ud800"
  try:
    encoding.encode_documents(texts, tokenizer, max_length=8, policy="split")
  except (own_part.OwnPartError, ValueError) as error:
    return f"{type(error).__name__}: {error}"
  raise AssertionError(index)


def other_records(index: int) -> str:
  """What this process says when the processes read different records."""
  tokenizer, _ = _tokenizer()
  told = []
  # One more than another has; as many, of which the last, nobody's own but the
  # last one's, differs.
  for texts in (TEXTS[: 10 + index], [*TEXTS[:9], str(index)]):
    try:
      own_part.encode_batch(tokenizer, texts)
    except own_part.OwnPartError as error:
      told.append(str(error))
  assert len(told) == 2, index
  return " ".join(told)
