"""The examples in the docstrings are true, and every function has one."""

import doctest
import importlib
import inspect
import pkgutil

import pytest

from rlhf_jax import losses

MODULES = [m.name for m in pkgutil.iter_modules(losses.__path__)]


def _public_functions(module):
  return [
      function
      for name, function in inspect.getmembers(module, inspect.isfunction)
      if function.__module__ == module.__name__ and not name.startswith("_")
  ]


@pytest.mark.parametrize("name", MODULES)
def test_examples_are_true(name):
  module = importlib.import_module(f"rlhf_jax.losses.{name}")
  results = doctest.testmod(module)
  assert results.failed == 0
  assert results.attempted >= len(_public_functions(module)) > 0


@pytest.mark.parametrize("name", MODULES)
def test_docstrings_are_complete(name):
  module = importlib.import_module(f"rlhf_jax.losses.{name}")
  for function in _public_functions(module):
    for section in ("Args:", "Returns:", "Example:"):
      assert section in function.__doc__, f"{function.__name__}: {section}"
