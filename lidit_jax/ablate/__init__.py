"""`python -m lidit_jax.ablate`: the paper's ablation tables in miniature, on built-in scenes."""
