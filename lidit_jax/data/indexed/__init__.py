"""Data sets with random access: indexes of shards, the global shuffle and its loader."""
