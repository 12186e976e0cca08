"""Data sets whose shards are read from end to end: streams of samples, shuffle buffers and their loader."""
