"""`python -m lidit_jax.describe`: shows what language models generate for a prompt."""
