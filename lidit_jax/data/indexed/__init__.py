"""Data sets with random access: shard indexes, the global shuffle and its loader."""
