import jax
import pytest


@pytest.fixture(scope="package", autouse=True)
def quick_compilation():
  """These programs run for milliseconds: most of their time is compilation."""
  jax.config.update("jax_disable_most_optimizations", True)
  yield
  jax.config.update("jax_disable_most_optimizations", False)
