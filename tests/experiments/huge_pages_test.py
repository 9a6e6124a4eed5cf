import importlib
import os
import pathlib
import subprocess
import sys

import pytest

import experiments


def _imported(monkeypatch, argv, environ):
  """What a process would be replaced by when the package is imported."""
  started = []
  monkeypatch.setattr(os, "execv", lambda *args: started.append(args))
  monkeypatch.setattr(os, "environ", environ)
  monkeypatch.setattr(sys, "argv", argv)
  monkeypatch.setattr(sys, "platform", "linux")
  monkeypatch.setattr(sys, "orig_argv", ["python", "-m", "experiments.x", "-v"])
  importlib.reload(experiments)
  return started


def test_a_binary_starts_anew_with_huge_pages(monkeypatch):
  environ = {"HOME": "/"}
  started = _imported(monkeypatch, ["-m", "-v"], environ)
  args = [sys.executable, "-m", "experiments.x", "-v"]
  assert started == [(sys.executable, args)]
  assert environ == {"HOME": "/", "GLIBC_TUNABLES": "glibc.malloc.hugetlb=1"}
  # And once only.
  assert not _imported(monkeypatch, ["-m", "-v"], environ)


def test_neither_an_import_nor_a_users_own_setting_starts_anything(monkeypatch):
  assert not _imported(monkeypatch, ["pytest"], {})
  assert not _imported(monkeypatch, ["-m"], {"GLIBC_TUNABLES": ""})


@pytest.mark.skipif(sys.platform != "linux", reason="a setting of glibc")
def test_a_real_binary_starts_twice_with_its_arguments_and_exit_code(tmp_path):
  # Python imports this before anything else, each time that it starts.
  (tmp_path / "sitecustomize.py").write_text(
      "import os, sys\n"
      "tunables = os.environ.get('GLIBC_TUNABLES')\n"
      "print('started', tunables, sys.orig_argv[1:], file=sys.stderr)\n"
  )
  environ = {k: v for k, v in os.environ.items() if k != "GLIBC_TUNABLES"}
  repo = pathlib.Path(experiments.__file__).resolve().parents[1]
  environ["PYTHONPATH"] = f"{tmp_path}:{repo}"
  command = ["-m", "experiments.report", "--no_such_flag=a b"]
  done = subprocess.run(
      [sys.executable, *command],
      env=environ, capture_output=True, text=True, check=False, timeout=120,
  )
  assert done.returncode == 1
  assert "no_such_flag" in done.stderr
  starts = [x for x in done.stderr.splitlines() if x.startswith("started")]
  assert starts == [
      f"started None {command}",
      f"started glibc.malloc.hugetlb=1 {command}",
  ]
