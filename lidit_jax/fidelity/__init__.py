"""`python -m lidit_jax.fidelity`: computes FID and CLIP score of generated images."""
