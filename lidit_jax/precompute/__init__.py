"""`python -m lidit_jax.precompute`: computes latents and prompt features ahead of training."""
