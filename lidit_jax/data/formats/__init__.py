"""Readers of the storage formats of samples: tar shards, ArrayRecord files, TFDS data sets, folders of images."""
