"""The networks: LI-DiT with its refiners, the LLM and T5 encoders, the VAE, and the layers that they share."""
