"""`python -m lidit_jax.score`: scores generated benchmark images as the official scorers do, with PyTorch models."""
