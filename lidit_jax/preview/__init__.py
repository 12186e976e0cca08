"""`python -m lidit_jax.preview`: a contact sheet of training batches."""
