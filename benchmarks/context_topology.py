"""Compile one stream of 32,768 events per batch shard for v5e:16x16, by `mesh.context`.

    python -m benchmarks.context_topology [--context N ...]

No TPU is needed, and nothing is run. The model is `lrm_1b` with 4 of its 24 layers: an
event is two tokens, so that a stream has 65,552, and every one is read out. The full
layers are the whole model in one case; in the other the upper two layers have windows
of 2,048 and 1,024 tokens. `mesh.fsdp` is 16, `mesh.context` as given and `mesh.data`
the rest; a batch shard (`data` x `fsdp`) has one stream, so that the batch is smaller
the larger `context` is. Figures are those of `tokenrec compile` for one chip; times are
lower bounds.

A finished table row is written at once, and skipped when the command is given again;
delete the result files to start over. Some minutes a table row on two cores.
"""

from __future__ import annotations
