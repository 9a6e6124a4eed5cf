"""What the fault tests share: a finished pipeline, and programs to hurt."""

import pytest

from tests.experiments.conftest import (  # noqa: F401
    as_users_run_it,
    finished_run,
)
from tests.faults import programs


@pytest.fixture(scope="session")
def start(tmp_path_factory):
  """start(binary, config, workdir, **how) -> a running program."""
  with programs.Nursery(tmp_path_factory.mktemp("logs")) as nursery:
    yield nursery.start


@pytest.fixture(scope="session")
def whole(finished_run, start, tmp_path_factory):  # noqa: F811
  """binary -> a run that nothing disturbed: config, workdir, seconds."""
  return programs.Undisturbed(
      finished_run, start, tmp_path_factory.mktemp("whole")
  )
