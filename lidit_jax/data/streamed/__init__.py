"""Data sets whose shards are read sequentially: sample streams, shuffle buffers and their loader."""
