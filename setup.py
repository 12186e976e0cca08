"""Lower bounds are versions that the tests were run with."""

from setuptools import find_packages, setup

setup(
    name="lidit-jax",
    version="0.1.0",
    description="LI-DiT in JAX: decoder-only LLMs as the prompt encoders of a diffusion transformer",
    license="Apache-2.0",
    packages=find_packages(include=["lidit_jax", "lidit_jax.*"]),
    python_requires=">=3.11",
    install_requires=[
        "absl-py>=2.1",
        "clu>=0.0.12",
        "etils[epath]>=1.9",
        "flax>=0.12",
        "grain>=0.2.12",
        "jax>=0.10",
        "ml-collections>=1.0",
        "numpy>=2.0",
        "optax>=0.2.5",
        "orbax-checkpoint>=0.11.30",
        "pillow>=11",
        "safetensors>=0.5",
        "scipy>=1.13",
        # clu's TensorBoard writer; the plain wheel carries CUDA on Linux.
        "tensorboard>=2.20",
        "tensorflow-cpu>=2.20; sys_platform == 'linux' and platform_machine == 'x86_64'",
        "tensorflow>=2.20; sys_platform != 'linux' or platform_machine != 'x86_64'",
        "tensorflow-datasets>=4.9.9",
        "transformers>=5.0",
    ],
    extras_require={
        "test": [
            "diffusers>=0.36",
            "hypothesis>=6.130",
            "pytest>=8.4",
            "ruff>=0.12",
            "torch==2.13.0",
        ],
        "torch": ["diffusers>=0.36", "torch>=2.6"],
        "tpu": ["jax[tpu]>=0.10"],
        "cuda": ["jax[cuda13]>=0.10"],
    },
)
