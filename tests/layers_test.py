"""Who may import whom, read from the source; and what an import costs."""

import ast
import pathlib
import subprocess
import sys

import pytest

REPO = pathlib.Path(__file__).resolve().parents[1]
LIBRARY = sorted((REPO / "rlhf_jax").rglob("*.py"))
EXPERIMENTS = sorted((REPO / "experiments").glob("*.py"))
HARNESS = sorted((REPO / "experiments" / "harness").glob("*.py"))
CONFIGS = sorted((REPO / "configs").rglob("*.py"))

# Layer of every part of the library: it may import those below, and siblings.
LAYERS = {
    "types": 0,
    "collectives": 0,
    "losses": 1,
    "models": 2,
    "generation": 2,
    "device_mesh": 1,
    "sharding": 1,
    "optim": 2,
    "train_state": 2,
    "metrics": 2,
    "array_folder": 2,
    "checkpoint": 2,
    "planning": 2,
    "updates": 3,
    "rewards": 3,
    "feedback": 3,
    "data": 3,
    "worlds": 3,
    "evaluation": 3,
}
LEAVES = ("device_mesh", "sharding", "optim", "train_state", "metrics",
          "array_folder", "checkpoint")
PURE = ("losses", "types", "collectives")
# Text, and nothing that trains.
READERS = ("data", "worlds", "evaluation", "rewards", "feedback")

# What only some parts may import.
ALLOWED = {
    "flax": ("models", "generation", "checkpoint", "train_state", "data"),
    "optax": ("optim", "train_state", "updates"),
    "orbax": ("checkpoint", "array_folder"),
    "grain": ("data",),
    "transformers": ("data", "models"),
    "tokenizers": ("data",),
    "sentencepiece": ("data",),
    "tensorflow_datasets": ("data",),
    "array_record": ("data",),
    "matplotlib": ("evaluation",),
    "jinja2": ("data", "evaluation"),
    "absl": (),
    "ml_collections": (),
    "argparse": (),
    "tqdm": (),
    "tensorboardX": (),
    "wandb": (),
    "tensorflow": (),
    "torch": (),
    "experiments": (),
    "configs": (),
}


def _name(path: pathlib.Path) -> str:
  return str(path.relative_to(REPO))


def imports(path: pathlib.Path) -> set[str]:
  """Dotted names of everything that a file imports, anywhere in it."""
  found = set()
  for node in ast.walk(ast.parse(path.read_text())):
    if isinstance(node, ast.Import):
      found.update(alias.name for alias in node.names)
    elif isinstance(node, ast.ImportFrom):
      assert node.level == 0, f"{path}: a relative import"
      # `from a import b`: b may be a module or a name in one.
      found.update(f"{node.module}.{alias.name}" for alias in node.names)
  return found


def _part(dotted: str) -> str | None:
  """'rlhf_jax.losses.kl' -> 'losses'; None for what is not ours."""
  names = dotted.split(".")
  return names[1] if names[0] == "rlhf_jax" and len(names) > 1 else None


def _own_part(path: pathlib.Path) -> str:
  return path.relative_to(REPO / "rlhf_jax").parts[0].removesuffix(".py")


@pytest.mark.parametrize("path", LIBRARY, ids=_name)
def test_a_module_imports_only_from_the_layers_below_it(path):
  part = _own_part(path)
  if part == "__init__":
    assert not imports(path)
    return
  assert part in LAYERS, f"{_name(path)}: give its layer in {__file__}"
  for dotted in imports(path):
    other = _part(dotted)
    if other is None or other == part:
      continue
    assert LAYERS[other] < LAYERS[part] or (
        LAYERS[other] == LAYERS[part]
        and (part, other) in SAME_LAYER
    ), f"{_name(path)} imports {dotted}"


# Within a layer: who may import a neighbour, and why.
SAME_LAYER = {
    ("sharding", "device_mesh"),
    ("generation", "models"),  # decodes with a model
    ("checkpoint", "array_folder"),
    ("train_state", "metrics"),
    ("planning", "models"),  # counts the matmuls that a config asks for
    ("rewards", "data"),  # a tokenizer, to read text again
    ("rewards", "evaluation"),
    ("feedback", "data"),
}


@pytest.mark.parametrize("path", LIBRARY, ids=_name)
def test_the_library_imports_third_parties_only_where_they_belong(path):
  for dotted in imports(path):
    package = dotted.split(".")[0]
    if package in ALLOWED:
      assert _own_part(path) in ALLOWED[package], f"{_name(path)}: {dotted}"


@pytest.mark.parametrize(
    "path", [p for p in LIBRARY if _own_part(p) in PURE], ids=_name
)
def test_losses_know_arrays_and_nothing_else(path):
  allowed = {"jax", "numpy", "jaxtyping", "rlhf_jax"} | sys.stdlib_module_names
  for dotted in imports(path):
    assert dotted.split(".")[0] in allowed, f"{_name(path)}: {dotted}"


@pytest.mark.parametrize(
    "path", [p for p in LIBRARY if _own_part(p) in LEAVES], ids=_name
)
def test_leaf_utilities_import_neither_models_nor_losses(path):
  parts = {_part(dotted) for dotted in imports(path)}
  assert not parts & {"models", "generation", "losses", "updates"}


@pytest.mark.parametrize(
    "path", [p for p in LIBRARY if _own_part(p) == "updates"], ids=_name
)
def test_updates_read_no_data_and_touch_no_files(path):
  forbidden = {"os", "pathlib", "json", "io", "logging", "data"}
  found = {dotted.split(".")[0] for dotted in imports(path)}
  found |= {_part(dotted) for dotted in imports(path)}
  assert not found & forbidden


@pytest.mark.parametrize(
    "path", [p for p in LIBRARY if _own_part(p) in READERS], ids=_name
)
def test_no_reader_or_scorer_imports_an_update(path):
  assert "updates" not in {_part(dotted) for dotted in imports(path)}


@pytest.mark.parametrize("path", LIBRARY, ids=_name)
def test_the_library_never_prints(path):
  calls = [
      node.func.id
      for node in ast.walk(ast.parse(path.read_text()))
      if isinstance(node, ast.Call) and isinstance(node.func, ast.Name)
  ]
  assert not {"print", "input", "breakpoint"} & set(calls)


@pytest.mark.parametrize("path", LIBRARY, ids=_name)
def test_no_hidden_defaults_and_no_stubs_in_the_library(path):
  text = path.read_text()
  assert "TODO" not in text and "NotImplementedError" not in text
  names = {"utils.py", "helpers.py", "common.py"}
  assert path.name not in names


def _functions(path: pathlib.Path) -> set[str]:
  tree = ast.parse(path.read_text())
  return {x.name for x in tree.body if isinstance(x, ast.FunctionDef)}


@pytest.mark.parametrize("path", EXPERIMENTS, ids=_name)
def test_binaries_import_stages_only_to_run_or_show_them(path):
  binaries = {p.stem for p in EXPERIMENTS} - {"__init__"}
  stages = {p.stem for p in EXPERIMENTS if "run" in _functions(p)}
  imported = {
      dotted.split(".")[1]
      for dotted in imports(path)
      if dotted.startswith("experiments.")
  } & binaries
  if path.stem == "rlhf":
    # A tokenizer that is trained by itself serves many runs.
    # A population is one of its stages, many times.
    assert imported == stages - {"rlhf", "train_tokenizer", "population"}
  elif path.stem == "inspect":
    # Shows the rows that these make.
    assert imported == {"pretrain", "sft", "reward", "ppo"}
  elif path.stem == "plan":
    # Says what its programs take.
    assert imported == {"ppo"}
  elif path.stem == "population":
    # Runs its parts for many at once.
    assert imported == {"ppo"}
  else:
    assert not imported


@pytest.mark.parametrize("path", HARNESS, ids=_name)
def test_the_harness_imports_no_binary_and_no_config(path):
  for dotted in imports(path):
    names = dotted.split(".")
    assert names[0] not in ("configs", "tests")
    if names[0] == "experiments":
      assert names[1] == "harness", f"{_name(path)}: {dotted}"


@pytest.mark.parametrize("path", CONFIGS, ids=_name)
def test_configs_are_data(path):
  packages = {dotted.split(".")[0] for dotted in imports(path)}
  assert packages <= {"ml_collections", "configs"}


# ---- What an import costs ----------------------------------------------------


def _run(code: str) -> str:
  return subprocess.run(
      [sys.executable, "-c", code],
      cwd=REPO,
      capture_output=True,
      text=True,
      check=True,
      timeout=300,
  ).stdout


def test_importing_the_library_is_cheap_and_touches_no_device():
  loaded = _run("import sys, rlhf_jax; print(sorted(sys.modules))")
  for package in ("jax", "numpy", "flax", "orbax", "transformers", "grain"):
    assert f"'{package}'" not in loaded


def _modules(paths) -> list[str]:
  return [
      ".".join(path.relative_to(REPO).with_suffix("").parts)
      for path in paths
      if path.stem != "__init__"
  ]


def test_no_module_loads_tensorflow_or_torch_or_starts_a_device():
  modules = _modules([*LIBRARY, *EXPERIMENTS, *HARNESS, *CONFIGS])
  code = f"""
import importlib, sys
for name in {modules!r}:
  importlib.import_module(name)
from jax._src import xla_bridge
print([x for x in ("tensorflow", "torch") if x in sys.modules])
print(xla_bridge.backends_are_initialized())
"""
  assert _run(code).split() == ["[]", "False"]
