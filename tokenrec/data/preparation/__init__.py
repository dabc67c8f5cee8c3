"""Prepare a raw log: `prepare.py` has the passes in order; read it first.

Then, in the order in which they run: `intake.py` (first pass),
`raw_columns.py`, `encode.py` and `entities.py` (values to ids), `spill.py` (grouping by
user), `folder.py` (vocabularies, catalogue, metadata), `partition.py` and `chunks.py`
(second pass), `repeats.py` (rows that repeat one another), `moments.py`
(normalisation), `staging.py` (a folder that appears when it is complete).

Statistics as of the start of a split pass by the encoded rows (`frozen.py`). What later
rows go on from is written by `state.py` and read by `like.py`. What the user is told
comes from `matches.py`, `notices.py`, `leaks.py` and `summary.py`.
"""
