"""Flags, start and end of a binary; the work is its `run(config, workdir)`.

What a user can mend (a config, a data file, a mismatched checkpoint) ends in
one message and exit code 1; anything else keeps its traceback.
"""

from collections.abc import Callable
import contextlib
import sys
from typing import Any

from absl import app, flags, logging
from ml_collections import config_flags

from experiments.harness import config as config_lib
from experiments.harness import loop
from rlhf_jax import checkpoint
from rlhf_jax.data import encoding, pipeline, readers, tokenizer


class UserError(ValueError):
  """Something that the user can mend."""


_EXPECTED = (
    UserError,
    config_lib.ConfigError,
    checkpoint.CheckpointError,
    checkpoint.ConfigMismatch,
    checkpoint.StateMismatch,
    encoding.LengthError,
    pipeline.DatasetError,
    readers.ReadError,
    tokenizer.TokenizerError,
    loop.NonFiniteError,
    FileNotFoundError,
)


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
    with told_errors():
      run(
          config_lib.from_config(config_class, config_file.value), workdir.value
      )

  app.run(main)


@contextlib.contextmanager
def told_errors():
  """What a user can mend ends the program with one message, exit code 1."""
  try:
    yield
  except _EXPECTED as error:
    print(f"\nerror: {error}", file=sys.stderr)
    sys.exit(1)


def quiet_third_parties() -> None:
  """Logs what we say and others' warnings; orbax tells every step of a save."""
  logging.set_verbosity(logging.INFO)
  logging.get_absl_logger().addFilter(_is_ours)


def _is_ours(record) -> bool:
  is_third_party = "site-packages" in record.pathname
  return not is_third_party or record.levelno >= 30  # logging.WARNING
