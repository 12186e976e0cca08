"""`python -m lidit_jax.check`: verifies the checkpoints and frozen networks of a workdir."""
