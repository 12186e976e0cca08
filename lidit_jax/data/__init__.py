"""Data pipeline: from the `data` section of a config to batches of images (or latents) and tokenized captions.

A stored sample passes through

    formats/tar_shards.py, formats/parquet_shards.py, …   files -> `Sample`: texts, metadata, the encoded image
    indexed/source.py or streamed/sample_stream.py        filters, buckets, decoding (`sources.decode_to_bucket`)
    assembler.py                                          captions chosen and tokenized, images stacked: a batch
    indexed/loader.py or streamed/loader.py               the sequence of batches, made by threads or worker processes

`open_dataset.py` puts these together.
"""
