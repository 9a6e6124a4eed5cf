"""The pipeline made so small that a whole run takes seconds.

Configs are those of `configs/`, with sizes and lengths taken down: what is
tested is what users start from.
"""

import json
import os
import pathlib
import subprocess
import sys

import jax
from ml_collections import ConfigDict
import numpy as np

from configs import rlhf as rlhf_config
from experiments import rlhf
from experiments.harness.config import from_config
from rlhf_jax import array_folder, checkpoint

REPO = pathlib.Path(__file__).resolve().parents[2]
PROMPT_LENGTH, COMPLETION_LENGTH, MAX_LENGTH = 56, 8, 128
VOCAB_SIZE = 300


def loop(num_steps: int = 2, **changes) -> dict:
  """Logs every step, evaluates at the end, saves at the end."""
  return dict(
      num_steps=num_steps,
      log_every=1,
      eval_every=num_steps,
      checkpoint_every=num_steps,
      tensorboard=False,
  ) | changes


def pipeline() -> ConfigDict:
  """configs/rlhf.py:smoke, a tenth of it. Places are in `@run/`."""
  config = rlhf_config.get_config("smoke")
  config.pretrain.documents.limit = 60
  config.pretrain.heldout_documents.limit = 12
  config.pretrain.tokenizer.vocab_size = VOCAB_SIZE
  config.pretrain.model.update(
      vocab_size=VOCAB_SIZE,
      num_layers=1,
      width=16,
      head_dim=8,
      ff_dim=32,
      max_length=MAX_LENGTH,
  )
  config.sft.demonstrations.limit = 40
  config.sft.heldout_demonstrations.limit = 20
  for stage in (config.pretrain, config.sft):
    stage.train.update(batch_size=4, seq_len=64)
    stage.train.sample_prompts.limit = 4
    stage.train.optimizer.warmup_steps = 0
    stage.train.loop.update(loop())
    shorten(stage.train.samples)
  config.preferences.prompts.limit = 16
  config.preferences.heldout_prompts.limit = 8
  config.preferences.batch_size = 32
  config.reward.update(
      max_prompt_length=PROMPT_LENGTH, max_completion_length=40, batch_size=8
  )
  config.reward.normalize_on.limit = 16
  config.reward.optimizer.warmup_steps = 0
  config.reward.loop.update(loop())
  config.ppo.prompts.limit = 16
  config.ppo.heldout_prompts.limit = 8
  config.ppo.update(rollout_batch_size=8, num_logged_samples=2)
  config.ppo.ppo.num_epochs = 2
  config.ppo.loop.update(loop())
  config.evaluate.prompts.limit = 8
  config.evaluate.batch_size = 8
  for name in ("preferences", "reward", "ppo", "evaluate"):
    shorten(config[name].samples)
  return config


def shorten(samples: ConfigDict) -> None:
  """Lengths that a tokenizer without merges gets along with."""
  samples.max_prompt_length = PROMPT_LENGTH
  samples.max_completion_length = COMPLETION_LENGTH


def stage(name: str, run: pathlib.Path) -> ConfigDict:
  """One stage's config, its places in the finished run `run`."""
  return ConfigDict(in_run(pipeline()[name].to_dict(), run))


def in_run(value, run: pathlib.Path):
  """`@run/` made into a folder, in nested dicts."""
  if isinstance(value, dict):
    return {name: in_run(item, run) for name, item in value.items()}
  if isinstance(value, tuple):
    return tuple(in_run(item, run) for item in value)
  return value.replace("@run/", f"{run}/") if isinstance(value, str) else value


def run_pipeline(workdir: pathlib.Path, **kwargs) -> None:
  """The tiny pipeline in this process."""
  config = from_config(rlhf.Config, pipeline())
  rlhf.run(config, str(workdir), **kwargs)


# ---- Processes ---------------------------------------------------------------


def write_config(path: pathlib.Path, config: ConfigDict) -> pathlib.Path:
  """A config file that a binary takes."""
  path.write_text(
      "import json\nfrom ml_collections import ConfigDict\n"
      f"def get_config():\n  return ConfigDict(json.loads({to_json(config)!r}))"
      "\n"
  )
  return path


def to_json(config: ConfigDict) -> str:
  """Tuples become lists, which configs take for tuples."""
  return json.dumps(config.to_dict())


def command(binary: str, config, workdir, *flags: str) -> list[str]:
  """How a user starts a binary."""
  return [
      sys.executable,
      "-m",
      f"experiments.{binary}",
      f"--config={config}",
      f"--workdir={workdir}",
      *flags,
  ]


def environment() -> dict[str, str]:
  """One device, and the compilation cache of the tests."""
  return os.environ | {
      # Nobody's terminal: of pytest's own width otherwise.
      "COLUMNS": "100",
      # As conftest.py has it: two processes of a test compute bitwise alike.
      "XLA_FLAGS": "--xla_cpu_use_fusion_emitters=false",
      "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
  }


def start(*args) -> subprocess.Popen:
  """Starts a binary; see `command`."""
  return subprocess.Popen(
      command(*args),
      cwd=REPO,
      env=environment(),
      stdout=subprocess.PIPE,
      stderr=subprocess.PIPE,
      text=True,
  )


def call(*args) -> subprocess.CompletedProcess:
  """Runs a binary to its end; see `command`."""
  return _finish(command(*args))


def sample(*flags: str) -> subprocess.CompletedProcess:
  """Runs experiments.sample to its end."""
  return _finish([sys.executable, "-m", "experiments.sample", *flags])


def inspect(*flags: str) -> subprocess.CompletedProcess:
  """Runs experiments.inspect to its end."""
  return _finish([sys.executable, "-m", "experiments.inspect", *flags])


def _finish(arguments: list[str]) -> subprocess.CompletedProcess:
  return subprocess.run(
      arguments,
      cwd=REPO,
      env=environment(),
      capture_output=True,
      text=True,
      timeout=300,
      check=False,
  )


def assert_one_message(done: subprocess.CompletedProcess, *parts: str) -> None:
  """Exit code 1 and one message that holds every part, no traceback."""
  assert done.returncode == 1, done.stderr
  assert "Traceback" not in done.stderr
  assert done.stderr.count("\nerror: ") == 1, done.stderr
  message = done.stderr.partition("\nerror: ")[2]
  for part in parts:
    assert part in message, message


# ---- What a run left ---------------------------------------------------------


def model_arrays(folder: pathlib.Path) -> dict[str, np.ndarray]:
  """The params of a finished model by path."""
  _, params, _ = checkpoint.load_model(folder / "model")
  return {
      jax.tree_util.keystr(path): np.asarray(leaf)
      for path, leaf in jax.tree_util.tree_leaves_with_path(params)
  }


def last_checkpoint(folder: pathlib.Path) -> dict[str, np.ndarray]:
  """Every array of the last whole checkpoint, keys as their data."""
  whole = [
      path
      for path in sorted((folder / "checkpoints").glob("step_*"))
      if array_folder.is_finished(path)
  ]
  info = array_folder.read_info(whole[-1])
  specs = info["leaves"]
  arrays = array_folder.read_arrays(
      whole[-1], specs, dict.fromkeys(specs, None)
  )
  found = {"step": np.asarray(info["step"])}
  for name, leaf in arrays.items():
    if "key_impl" in specs[name]:
      leaf = jax.random.key_data(leaf)
    found[name] = np.asarray(leaf)
  return found


def assert_bitwise(found: dict, wanted: dict) -> None:
  """The same names, and the same bytes under each."""
  assert found.keys() == wanted.keys()
  for name, leaf in found.items():
    assert leaf.tobytes() == wanted[name].tobytes(), name


def read_jsonl(path: pathlib.Path) -> list[dict]:
  """The lines of a file."""
  return [json.loads(line) for line in path.read_text().splitlines()]

