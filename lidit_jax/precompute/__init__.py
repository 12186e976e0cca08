"""`python -m lidit_jax.precompute`: computes VAE latents and encoder features of prompts ahead of training."""
