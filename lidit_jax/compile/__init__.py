"""`python -m lidit_jax.compile`: compiles a train step for TPUs that are not there, and reports its cost."""
