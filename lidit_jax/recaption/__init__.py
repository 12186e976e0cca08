"""`python -m lidit_jax.recaption`: writes shards with captions by a vision-language model and aesthetic scores."""
