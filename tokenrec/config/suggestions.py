"""Suggest the config field that a misspelt name meant.

>>> from tokenrec.config import Config
>>> from tokenrec.config.fields import list_fields
>>> names = [field.name for field in list_fields(Config)]
>>> suggest_field("optim.lr", names)
"; did you mean 'optim.learning_rate'?"
>>> suggest_field("model.n_heads", names)
"; did you mean 'model.heads'?"
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence

from tokenrec.errors import suggest

# Names that other codebases give to the last part of a field's name.
_ALIASES = {
    "backbone": "kind",
    "bs": "batch_size",
    "checkpoint_every": "save_every",
    "checkpointing": "remat",
    "clip": "clip_norm",
    "d_ff": "ffn_width",
    "d_model": "width",
    "dataset": "name",
    "depth": "layers",
    "dim": "width",
    "early_stopping": "patience",
    "emb_dim": "embedding_dim",
    "embed_dim": "embedding_dim",
    "eps": "epsilon",
    "eval_interval": "eval_every",
    "ffn_dim": "ffn_width",
    "grad_accum": "accumulate",
    "grad_clip": "clip_norm",
    "gradient_accumulation_steps": "accumulate",
    "hidden_dim": "width",
    "hidden_size": "width",
    "history": "events",
    "intermediate_size": "ffn_width",
    "iterations": "steps",
    "log_interval": "log_every",
    "lr": "learning_rate",
    "max_grad_norm": "clip_norm",
    "max_history": "events",
    "max_len": "events",
    "max_steps": "steps",
    "mlp_dim": "ffn_width",
    "model_dim": "width",
    "model_type": "kind",
    "rope_theta": "rope_base",
    "save_interval": "save_every",
    "seq_len": "events",
    "table_lr": "table_learning_rate",
    "val_every": "eval_every",
    "wd": "weight_decay",
    "window": "windows",
}

# Counts are often written with one of these in front: n_heads, num_layers.
_COUNT_PREFIXES = ("n_", "num_", "nb_")

# As in `difflib.get_close_matches`; names share many letters, so a little stricter.
_CUTOFF = 0.65


def suggest_field(name: str, known: Iterable[str]) -> str:
    """Return `"; did you mean 'model.width'?"`, or the fields of the section.

    The order of preference: the same last part in another section, a known alias, a
    close spelling in the section, a close spelling anywhere.

    Args:
      name: name of a field that does not exist, such as `optim.lr`.
      known: full names of the fields that exist.
    """
    fields = sorted(known)
    section, _, leaf = name.rpartition(".")
    inside = [field for field in fields if section == _section(field)]
    # 1. The right name in the wrong section, or another name for the field.
    for leaf_name in (leaf, *_other_names(leaf)):
        for candidates in (inside, fields):
            same = [field for field in candidates if _leaf(field) == leaf_name]
            if same:
                return suggest(name, same) if len(same) > 1 else _did_you_mean(same[0])
    # 2. A misspelt name, first in the section given, which is right more often.
    for candidates in (inside if section else [], fields):
        closest = _closest_leaf(leaf, candidates)
        if closest:
            return _did_you_mean(closest)
    # 3. Nothing is close: the fields of the section are few, all fields are too many.
    if section and inside:
        return f"; known: {', '.join(inside)}"
    return "; `tokenrec config` lists all fields"


def _other_names(leaf: str) -> list[str]:
    """Names that the last part of a field may stand for."""
    names = [leaf]
    names += [
        leaf.removeprefix(prefix)
        for prefix in _COUNT_PREFIXES
        if leaf.startswith(prefix)
    ]
    return [*names[1:], *(_ALIASES[name] for name in names if name in _ALIASES)]


def _closest_leaf(leaf: str, fields: Sequence[str]) -> str | None:
    leaves = sorted({_leaf(field) for field in fields})
    closest = difflib.get_close_matches(leaf, leaves, n=1, cutoff=_CUTOFF)
    if not closest:
        return None
    return next(field for field in fields if _leaf(field) == closest[0])


def _leaf(field: str) -> str:
    return field.rpartition(".")[2]


def _section(field: str) -> str:
    return field.rpartition(".")[0]


def _did_you_mean(field: str) -> str:
    return f"; did you mean '{field}'?"
