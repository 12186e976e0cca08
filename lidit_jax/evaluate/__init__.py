"""`python -m lidit_jax.evaluate`: generates the images of benchmarks and evaluates runs on the built-in scenes."""
