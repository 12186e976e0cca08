"""`python -m lidit_jax.export`: writes a run as a folder for diffusers, and reads such a folder back."""
