"""Data pipeline: from the `data` section of a config to batches of images (or latents) and tokenized captions."""
