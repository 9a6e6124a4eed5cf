"""One tiny finished run that the tests of whole programs share."""

import pathlib

import jax
import pytest

from tests.experiments import tiny


@pytest.fixture(scope="session")
def finished_run(tmp_path_factory) -> pathlib.Path:
  """A finished run of the tiny pipeline. Not to be written to."""
  folder = tmp_path_factory.mktemp("pipeline") / "run"
  with jax.numpy_dtype_promotion("standard"):
    tiny.run_pipeline(folder)
  return folder


@pytest.fixture(autouse=True)
def as_users_run_it():
  """optax's Adam promotes its step count; users' programs let it."""
  with jax.numpy_dtype_promotion("standard"):
    yield
