"""Exports a run to a folder that diffusers loads (`python -m lidit_jax.export`), and imports such a folder."""
