"""`python -m lidit_jax.fidelity`: FID and CLIP score of generated images."""
