"""`python -m lidit_jax.compile`: compiles a train step for TPUs without having any, and reports its cost."""
