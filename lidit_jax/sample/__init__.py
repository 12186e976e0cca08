"""`python -m lidit_jax.sample`: generates images from a workdir or an exported folder."""
