"""Flags, start and end of a binary; the work is its `run(config, workdir)`.

What a user can mend (a config, a data file, a mismatched checkpoint) ends in
one message and exit code 1; anything else keeps its traceback. A run that was
told to stop has saved and ends with exit code 0.
"""

from collections.abc import Callable
import contextlib
import importlib.util
import os
import re
import sys
from typing import Any

from absl import app, flags, logging
from ml_collections import config_flags

from experiments.harness import config as config_lib
from experiments.harness import hosts, lock, loop, metric_writer, stopping
from rlhf_jax import checkpoint
from rlhf_jax.data import (
    chat,
    encoding,
    own_part,
    pipeline,
    readers,
    tokenizer,
)
from rlhf_jax.models import lora
from rlhf_jax.models.families import hf_config, tensor_files
from rlhf_jax.rewards import episodes


class UserError(ValueError):
  """Something that the user can mend."""


_EXPECTED = (
    UserError,
    config_lib.ConfigError,
    checkpoint.CheckpointError,
    checkpoint.ConfigMismatch,
    checkpoint.StateMismatch,
    chat.ChatTemplateError,
    encoding.LengthError,
    own_part.OwnPartError,
    pipeline.DatasetError,
    readers.ReadError,
    episodes.RuleError,
    tokenizer.TokenizerError,
    hf_config.FamilyError,
    lora.LoraError,
    tensor_files.TensorFileError,
    hosts.HostsError,
    lock.WorkdirError,
    loop.NonFiniteError,
    metric_writer.MetricsFileError,
    OSError,  # Files and folders that are not there, or not ours to use.
)


_DISTRIBUTED = flags.DEFINE_bool(
    "distributed",
    False,
    "Several processes are one run: start this command in each, on a TPU pod "
    "or under Slurm as it is, elsewhere with the three flags below.",
)
_COORDINATOR = flags.DEFINE_string(
    "coordinator_address", None, "HOST:PORT of process 0, a free port."
)
_NUM_PROCESSES = flags.DEFINE_integer(
    "num_processes", None, "How many processes the run has."
)
_PROCESS_ID = flags.DEFINE_integer(
    "process_id", None, "Which of them this is, from 0."
)
_HEARTBEAT_TIMEOUT = flags.DEFINE_integer(
    "heartbeat_timeout_seconds",
    100,
    "Within so long of the end of one process all others end.",
)


def _hosts() -> hosts.Hosts | None:
  """What the flags say of other processes, None for a run of one."""
  given = {
      "coordinator_address": _COORDINATOR.value,
      "num_processes": _NUM_PROCESSES.value,
      "process_id": _PROCESS_ID.value,
  }
  if _DISTRIBUTED.value:
    return hosts.Hosts(
        **given, heartbeat_timeout_seconds=_HEARTBEAT_TIMEOUT.value
    )
  lone = [f"--{name}" for name, value in given.items() if value is not None]
  if lone:
    raise UserError(f"{', '.join(lone)}: give --distributed too")
  return None


def launch(config_class: type, run: Callable[[Any, str], Any]) -> None:
  """Runs a binary that takes --config and --workdir."""
  config_file = config_flags.DEFINE_config_file(
      "config", None, "The config file, with its mini-argument: x.py:smoke."
  )
  workdir = flags.DEFINE_string(
      "workdir", None, "Everything the run writes; the same again resumes."
  )
  flags.mark_flags_as_required(["config", "workdir"])

  def main(argv):
    if len(argv) > 1:
      raise app.UsageError(f"arguments that no flag takes: {argv[1:]}")
    quiet_third_parties()
    # The outer one is for what hinders the processes from coming together.
    with told_errors(), hosts.joined(_hosts()), told_errors(), told_stop():
      stopping.listen()
      run(
          config_lib.from_config(config_class, config_file.value), workdir.value
      )

  app.run(main, flags_parser=parse_flags)


def parse_flags(argv: list[str]) -> list[str]:
  """absl's parsing, after what it would end in a traceback was looked for."""
  with told_errors():
    check_config_flags(argv)
  return app.parse_flags_with_usage(argv)


def check_config_flags(argv: list[str]) -> None:
  """Checks that --config names a config and every --config.x one of its fields.

  Raises:
    UserError: for a file that is not there or refuses its mini-argument; or
      lists the unknown fields, each with the nearest that there are.
  """
  argv = flags.FLAGS.read_flags_from_files(argv, force_gnu=False)
  place, names = None, []
  for i, arg in enumerate(argv):
    name, has_value, value = arg.partition("=")
    if re.fullmatch(r"--?config", name):
      place = value if has_value else "".join(argv[i + 1 : i + 2])
    elif match := re.match(r"--?(?:no)?config\.", name):
      names.append(name[match.end() :])
  if place is None:
    return  # absl says that the flag is required.
  fields = config_lib.dotted_paths(_load_config(place))
  unknown = [
      f"--config.{name}: {place} has no such field; "
      + _did_you_mean(config_lib.nearest_paths(name, fields))
      for name in names
      # An item of a tuple is a field too.
      if re.sub(r"\[\d+\]", "", name) not in fields
  ]
  if unknown:
    raise UserError("\n".join(unknown))


def _load_config(place: str) -> Any:
  path, *arg = place.split(":", 1)
  if not os.path.isfile(path):
    raise UserError(f"--config={place}: no such config file: {path!r}")
  spec = importlib.util.spec_from_file_location("config_file", path)
  if spec is None:
    raise UserError(f"--config={place}: a config file ends in .py")
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  if not hasattr(module, "get_config"):
    raise UserError(f"--config={place}: {path} has no function get_config")
  try:
    return module.get_config(*arg)
  except ValueError as error:
    raise UserError(f"--config={place}: {error}") from error


def _did_you_mean(names: list[str]) -> str:
  if not names:
    return "see the config file for what there is"
  return f"did you mean {' or '.join(f'--config.{x}' for x in names)}?"


@contextlib.contextmanager
def told_errors():
  """What a user can mend ends the program with one message, exit code 1."""
  try:
    yield
  except _EXPECTED as error:
    print(f"\nerror: {error}", file=sys.stderr)
    sys.exit(1)


@contextlib.contextmanager
def told_stop():
  """A run that stops because it was told to ends well."""
  try:
    yield
  except stopping.Stopped as stopped:
    logging.info("%s", stopped)


def quiet_third_parties() -> None:
  """Logs what we say and others' warnings; orbax tells every step of a save."""
  logging.set_verbosity(logging.INFO)
  logging.get_absl_logger().addFilter(_is_ours)


def _is_ours(record) -> bool:
  is_third_party = "site-packages" in record.pathname
  return not is_third_party or record.levelno >= 30  # logging.WARNING
