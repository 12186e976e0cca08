"""Readers of the formats that samples are stored in: tar shards, ArrayRecord, TFDS, folders of images."""
