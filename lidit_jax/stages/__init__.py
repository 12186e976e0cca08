"""The stages of a run: one file for each network that is trained, its task and its stage together."""
