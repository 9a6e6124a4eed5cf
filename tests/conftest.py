"""Eight simulated CPU devices, strict numerics and one compilation cache."""

import os
import pathlib
import shutil
import tempfile

# Before jax starts: flags are read once. A test's time is compilation, of which
# three quarters are machine code as fast as it can be, for arrays of a few
# elements. The programs themselves are those of users: this is of their last
# step, after XLA's own passes. `.ci/run` ends with a run as users have it.
os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")
os.environ["XLA_FLAGS"] = (
    os.environ.get("XLA_FLAGS", "")
    + " --xla_force_host_platform_device_count=8"
    + " --xla_cpu_use_fusion_emitters=false"
)
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

import hypothesis  # noqa: E402
import jax  # noqa: E402
import jaxtyping  # noqa: E402
import pytest  # noqa: E402

from tests.fake_gcloud.cloud import Cloud  # noqa: E402

jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update(
    "jax_compilation_cache_dir",
    os.environ.setdefault(
        "JAX_COMPILATION_CACHE_DIR",
        str(pathlib.Path(tempfile.gettempdir()) / "rlhf_jax_test_cache"),
    ),
)
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)

# Shapes are checked at run time where they matter most, in tests only.
jaxtyping.install_import_hook("rlhf_jax.losses", "beartype.beartype")

hypothesis.settings.register_profile(
    "tests",
    deadline=None,
    derandomize=True,
    max_examples=25,
    suppress_health_check=[hypothesis.HealthCheck.too_slow],
)
hypothesis.settings.load_profile("tests")


@pytest.fixture(scope="session")
def data_dir() -> pathlib.Path:
  """The folder of real data, or a skip that says how to give one."""
  folder = os.environ.get("RLHF_JAX_DATA")
  if not folder:
    pytest.skip("RLHF_JAX_DATA is not set: it names the folder of real data")
  return pathlib.Path(folder)


@pytest.fixture
def cloud(tmp_path):
  """A fake Google Cloud for the scripts of tpu_scripts/."""
  if not (shutil.which("bash") and shutil.which("git")):
    pytest.skip("the scripts need bash and git")
  cloud = Cloud(tmp_path)
  yield cloud
  cloud.clean_up()
