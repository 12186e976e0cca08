"""LI-DiT in JAX: decoder-only LLMs as the prompt encoders of a diffusion transformer."""

__version__ = "0.1.0"
