"""Statistics of the past: features of a log row from strictly earlier log rows.

Any source can have them. They are declared once (`PastStatistics`), and computed while
the log is read in the order of time:

- declaration.py: what to count, as dataclasses, with the names of the features;
  declaration_json.py reads it from JSON and refuses what does not fit.
- source.py: `WithStatistics`, a source with the features added.
- features.py: blocks of the log in the order of time to features, and the state;
  log_rows.py checks the columns.
- keys.py: the keys of a log row, as 64-bit hashes.
- totals.py: running totals per key, of all the past or with a half-life;
  key_index.py numbers the keys, runs.py sums entries of a key.
- last_events.py: the same over the last n events of the user.
- measures.py: what a log row adds to the totals; rows that repeat another add nothing.
- plan.py: what is counted by which key; rates.py: smoothed rates and means of it.
- user_times.py: gaps and sessions of a user.
- frozen.py: the same of scored rows, as if the log had ended before their split.
- partitions.py: the same for a part of the users, with totals from elsewhere
  (tokenrec/data/beam).

Two rules hold everywhere. A log row sees strictly earlier times only, so that neither
its own outcome, nor that of a row shown at the same moment, nor the future enters a
feature. And the totals are integers or follow from integers on a fixed grid of time, so
that the features are equal in every bit wherever the log is cut: a log that is
prepared in two steps (`prepare --like`) has the features of the whole log.
"""

from tokenrec.data.past.declaration import (
    KeyStatistics,
    Matches,
    PastStatistics,
    UserTimes,
)
from tokenrec.data.past.declaration_json import parse_statistics
from tokenrec.data.past.source import WithStatistics

__all__ = [
    "KeyStatistics",
    "Matches",
    "PastStatistics",
    "UserTimes",
    "WithStatistics",
    "parse_statistics",
]
