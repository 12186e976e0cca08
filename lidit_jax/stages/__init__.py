"""The stages of a run: one file for each trained network, with its task and the stage that trains it."""
