"""From text to rows on disk, and from rows on disk to batches.

In come a corpus and a method's rows.  Out go Parquet shards with a manifest, and batches of them with an
explicit attention mask.

Do not touch lightly: the schema and the bytes of a shard, the keys of the manifest, the place in the corpus
where the next shard begins, and the mask, without which the end prompt never sees the text.
"""
