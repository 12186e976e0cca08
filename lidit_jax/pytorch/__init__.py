"""PyTorch modules that an export copies into its folder. They are self-contained and never import `lidit_jax`."""
