"""Data: from raw logs to batches.

Two halves meet in a prepared data set on disk.

*Preparing*, once per data set (`tokenrec prepare`):

- source.py: interface of a source; sources/ has one file per source.
- preparation/: streams a source into chunks of users' log rows; beam/ does the same on
  many machines.
- schema.py, schema_problems.py: features, entities, tasks. Read this first.
- vocabulary.py, tokenizer.py, past_counts.py, time_order.py: what preparation derives
  from values, texts and times.
- past/: statistics of the past that any source can declare.
- metadata.py, records.py: the files of a prepared data set.

*Reading*, in training and evaluation. pipeline.py lists the steps in order:

- dataset.py, log_decoder.py, value_checks.py, interaction_log.py: opening a data set,
  and its chunks as arrays in memory.
- semantic_id_file.py, semantic_id_feature.py: semantic ids of the items.
- frozen_rows.py: statistics of the past as of the start of a split.
- samples.py, nio_samples.py, uc_samples.py, log_index.py: cutting requests and streams.
- windows.py, two_slot_cache.py, batch_order.py: windows in memory, and the order of
  training batches.
- batch.py, batch_shapes.py, gather.py, sample_positions.py: batches, their shapes, and
  how they are filled.
"""
