"""Infer the schema of a log from a sample of it, with a reason for each decision.

`tokenrec init` calls `propose` (`proposal.py`). The files, in reading order:

- `sample.py` reads parts of the head, the middle and the end of a file;
- `column_profile.py` finds the type of each column;
- `keys.py`, `times.py` and `find_keys.py` find who, what and when;
- `labels.py` finds what is to be predicted;
- `log_columns.py` and `entity_columns.py` decide about all other columns;
- `feature_kinds.py` chooses the kind of a feature;
- `splits.py` chooses the days of the splits;
- `statistics.py` proposes statistics of the past;
- `write.py` writes schema.json and README.md, and the commands that come next.

A column whose meaning is not clear becomes an `action` feature, which a model sees for
earlier events only: that may lose a signal, but never shows an outcome.
"""
