"""The same work by other libraries, each in a process of its own.

A peer runs in the first of the given Pythons that has what it needs, so that
libraries which exclude one another can be measured in one run. Between its
turns its process waits for a line and takes no core.

    us                          it, `harness/peers/worker.py`
    job, a line of JSON   ->
                          <-    {"ready": versions} once it is warm
    run                   ->
                          <-    {"seconds": {part: seconds}}
    (end of input)        ->    ends
                          <-    {"error": text} instead of any of these
"""

from collections.abc import Iterable, Sequence
import contextlib
import dataclasses
import json
import os
import pathlib
import subprocess
import sys
import tempfile
import threading
from typing import Any

from experiments.harness.benchmark_config import Config
from rlhf_jax.models.families import gpt2, llama
from rlhf_jax.models.transformer import TransformerConfig

_REPO = pathlib.Path(__file__).resolve().parents[2]
_WORKER = "experiments.harness.peers.worker"
_TIMEOUT = 1800  # seconds for one answer


@dataclasses.dataclass(frozen=True, kw_only=True)
class Need:
  """A package, of a version from `least` on and before `below` ('' for any)."""

  package: str
  least: str = ""
  below: str = ""

  def __str__(self) -> str:
    least = f" >= {self.least}" if self.least else ""
    return self.package + least + (f" < {self.below}" if self.below else "")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Peer:
  """name: as told; measure: that it takes part in.

  work: module of `harness/peers` and its argument, 'module:argument'.
  part: what it does, in seconds, where that is none of the measure's parts.
  """

  name: str
  measure: str
  work: str
  needs: tuple[Need, ...]
  part: str = ""


_TORCH = (Need(package="torch"), Need(package="transformers"))
_TRL = (*_TORCH, Need(package="trl"))

PEERS = (
    Peer(
        name="transformers, dynamic cache",
        measure="generation",
        work="transformers_generate:dynamic",
        needs=_TORCH,
    ),
    Peer(
        name="transformers, static cache",
        measure="generation",
        work="transformers_generate:static",
        needs=_TORCH,
    ),
    Peer(
        name="transformers, static cache, compiled",
        measure="generation",
        work="transformers_generate:compiled",
        needs=_TORCH,
    ),
    Peer(name="torch", measure="sft", work="torch_step:sft", needs=_TORCH),
    Peer(
        name="TRL SFTTrainer", measure="sft", work="trl_steps:sft", needs=_TRL
    ),
    Peer(
        name="TRL RewardTrainer",
        measure="reward",
        work="trl_steps:reward",
        needs=_TRL,
    ),
    Peer(
        name="TRL DPOTrainer", measure="dpo", work="trl_steps:dpo", needs=_TRL
    ),
    Peer(
        name="TRL PPOTrainer",
        measure="ppo",
        work="trl_ppo:ppo",
        # The last release that has it.
        needs=(*_TORCH, Need(package="trl", least="0.29", below="1.13")),
    ),
    Peer(
        name="torch loop",
        measure="ppo",
        work="torch_ppo:ppo",
        needs=_TORCH,
    ),
    Peer(
        name="TRL GRPOTrainer",
        measure="ppo",
        part="grpo",
        work="trl_grpo:grpo",
        needs=(*_TORCH, Need(package="trl", least="1.16")),
    ),
    Peer(
        name="tunix PPO",
        measure="ppo",
        work="tunix_ppo:ppo",
        needs=(Need(package="google-tunix"),),
    ),
)


class PeerError(RuntimeError):
  """A peer that cannot run here, and why."""


def installed(python: str) -> dict[str, str]:
  """Versions of the packages that peers need, in one Python.

  Raises:
    PeerError: it cannot be started.
  """
  names = sorted({x.package for peer in PEERS for x in peer.needs})
  code = (
      "import importlib.metadata as m, json, sys\n"
      "found = {x.metadata['Name'].lower(): x.version "
      "for x in m.distributions()}\n"
      "print(json.dumps({x: found[x] for x in sys.argv[1:] if x in found}))"
  )
  try:
    done = subprocess.run(
        [python, "-c", code, *names],
        capture_output=True,
        text=True,
        check=True,
        timeout=120,
    )
  except (OSError, subprocess.SubprocessError) as error:
    raise PeerError(f"--peer_python={python} does not start: {error}") from (
        error
    )
  return json.loads(done.stdout)


def choose_python(peer: Peer, found: dict[str, dict[str, str]]) -> str:
  """The first of the Pythons (path -> versions) that has what it needs.

  Raises:
    PeerError: none has.
  """
  for python, versions in found.items():
    if all(_has(need, versions) for need in peer.needs):
      return python
  missing = {
      str(need)
      for need in peer.needs
      if not any(_has(need, versions) for versions in found.values())
  }
  if not missing:
    wanted = ", ".join(map(str, peer.needs))
    raise PeerError(f"no Python here has all of {wanted} together")
  raise PeerError(
      f"not installed: {', '.join(sorted(missing))}; name a Python that has it "
      "with --peer_python"
  )


def _has(need: Need, versions: dict[str, str]) -> bool:
  version = versions[need.package] if need.package in versions else None
  if version is None:
    return False
  return (not need.least or _key(version) >= _key(need.least)) and (
      not need.below or _key(version) < _key(need.below)
  )


def _key(version: str) -> tuple[int, ...]:
  """'2.13.0+cpu' -> (2, 13, 0)."""
  parts = version.split("+")[0].split(".")
  return tuple(int(x) for x in parts if x.isdigit())


def job(config: Config) -> dict[str, Any]:
  """What a worker is to do, in words that no library of ours is needed for."""
  cfg = config.ppo.ppo
  return {
      "model": _hugging_face(config.model),
      "dtype": config.model.dtype,
      "num_prompts": config.ppo.rollout_batch_size,
      "prompt_length": config.prompt_length,
      "completion_length": config.completion_length,
      "batch_size": config.batch_size,
      "num_pairs": config.num_pairs,
      "num_epochs": cfg.num_epochs,
      "num_minibatches": cfg.num_minibatches,
      "temperature": cfg.temperature,
      "kl_coef": cfg.kl_coef,
      "learning_rate": config.ppo.optimizer.learning_rate,
      "warmups": config.warmups,
      "repeats": config.repeats,
  }


def _hugging_face(cfg: TransformerConfig) -> dict[str, Any]:
  """Its config.json, by the family that has its features."""
  family, name = (
      (gpt2, "gpt2") if cfg.position == "learned" else (llama, "llama")
  )
  return {"model_type": name, **family.to_theirs(cfg)}


class Worker:
  """A peer's process, from its start until it is closed.

  Attributes:
    versions: of what it runs.
  """

  def __init__(self, peer: Peer, python: str, config: Config):
    self.peer = peer
    self._log = tempfile.TemporaryFile("w+")  # noqa: SIM115, closed below
    # Of what libraries leave behind; it goes with the process.
    self._folder = tempfile.TemporaryDirectory()
    self._process = subprocess.Popen(
        [python, "-m", _WORKER, peer.work],
        cwd=_REPO,
        env=os.environ | {"TMPDIR": self._folder.name},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=self._log,
        text=True,
    )
    try:
      self.versions = self._ask(json.dumps(job(config)))["ready"]
    except PeerError:
      self.close()
      raise

  def run(self) -> dict[str, float]:
    """Seconds of one turn, by part."""
    return self._ask("run")["seconds"]

  def close(self) -> None:
    """Ends the process."""
    # Of a process that died, what it did not read is still to be sent.
    with contextlib.suppress(BrokenPipeError):
      self._process.stdin.close()
    try:
      self._process.wait(timeout=30)
    except subprocess.TimeoutExpired:
      self._process.kill()
      self._process.wait()
    self._process.stdout.close()
    self._log.close()
    self._folder.cleanup()

  def _ask(self, line: str) -> dict[str, Any]:
    timer = threading.Timer(_TIMEOUT, self._process.kill)
    timer.start()
    try:
      self._process.stdin.write(line + "\n")
      self._process.stdin.flush()
      answer = self._process.stdout.readline()
    except BrokenPipeError:
      answer = ""
    finally:
      timer.cancel()
    if not answer:
      self._log.seek(0)
      last = self._log.read().strip().splitlines()[-1:]
      raise PeerError(f"its process ended: {' '.join(last)}")
    found = json.loads(answer)
    if "error" in found:
      raise PeerError(found["error"])
    return found


def start(
    measure: str,
    config: Config,
    found: dict[str, dict[str, str]],
    chosen: Sequence[str] = (),
) -> Iterable[tuple[Peer, Worker | PeerError]]:
  """The peers of a measure, each with its warm process or why it has none.

  Args:
    found: Python -> versions of what is there.
    chosen: parts of names; only peers that have one of them, all if empty.
  """
  for peer in PEERS:
    if peer.measure != measure:
      continue
    if chosen and not any(x.lower() in peer.name.lower() for x in chosen):
      continue
    try:
      yield peer, Worker(peer, choose_python(peer, found), config)
    except PeerError as error:
      yield peer, error


def check_names(chosen: Sequence[str]) -> None:
  """Checks that each is part of a peer's name.

  Raises:
    PeerError: with the names there are.
  """
  for part in chosen:
    if not any(part.lower() in peer.name.lower() for peer in PEERS):
      names = ", ".join(repr(peer.name) for peer in PEERS)
      raise PeerError(
          f"--only_peers: {part!r} is in no peer's name; there are {names}"
      )


def pythons(others: Iterable[str]) -> dict[str, dict[str, str]]:
  """This Python and others, with what they have."""
  return {x: installed(x) for x in (sys.executable, *others)}
