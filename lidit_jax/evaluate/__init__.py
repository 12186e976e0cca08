"""`python -m lidit_jax.evaluate`: generates the images of benchmarks; and the scenes that a run is judged on."""
