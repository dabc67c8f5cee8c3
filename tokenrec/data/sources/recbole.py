"""Read RecBole's atomic files: NAME.inter, and NAME.user and NAME.item if there are any.

https://recbole.io/docs/user_guide/data/atomic_files.html describes them: tables with
tabs, and a type behind each name in the header, such as `user_id:token`. The types
decide the kinds of features:

| type | kind |
|---|---|
| `token` | categorical; left out where nearly every row has a value of its own |
| `token_seq` | multi-valued; text where it holds titles or sentences |
| `float` | dense |
| `float_seq` | embedding; all rows must have one length |

All columns are read but those that hold one value, and those that follow the time. What
a column of the log means is inferred as `tokenrec init` does (`schema_inference/`): a
rating is the label, with a threshold, and an `action` feature, which a model sees for
earlier rows only. Times are seconds, milliseconds, micro- or nanoseconds since 1970,
whichever makes dates between 1980 and 2100. Splits are made by time, 80/10/10. Other
files (`.link`, `.kg`, `.net`) are not read. Licences are those of the data sets.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path

from tokenrec.data.schema_inference.feature_kinds import UNEVEN
from tokenrec.data.schema_inference.find_keys import Flags
from tokenrec.data.schema_inference.proposal import Proposal, propose
from tokenrec.data.schema_inference.statistics import ProposedStatistics
from tokenrec.data.schema_inference.write import schema_json, summary_lines
from tokenrec.data.sources.delimited import DelimitedSource
from tokenrec.data.sources.delimited_schema import LogFiles, SchemaFile
from tokenrec.errors import InputError


class RecBoleSource(DelimitedSource):
    """Log rows of RecBole's atomic files, as a `PartitionedSource`.

    Args:
      root: folder of the files.
      name: name of the data set; needed where the folder holds several.
      labels: tasks, as `tokenrec init --label` takes them: a column of 1 and 0, or
        `liked: rating >= 4`. Empty: what is found.
      user: field of users; empty to find it.
      item: field of items.
      time: field of times.
      valid_from: start of the valid split, as `DelimitedSource` takes it; None splits
        80/10/10.
      test_from: start of the test split.

    Attributes:
      summary: what was found in the files, and why, in sentences.

    Raises:
      InputError: a file is missing or has no types in its header, or as
        `schema_inference.proposal.propose` and `DelimitedSource`.
    """

    def __init__(
        self,
        root: Path,
        name: str = "",
        labels: Sequence[str] = (),
        *,
        user: str = "",
        item: str = "",
        time: str = "",
        valid_from: str | None = None,
        test_from: str | None = None,
    ) -> None:
        root = Path(root)
        log = _find_log(root, name)
        tables = [log.with_suffix(suffix) for suffix in (".user", ".item")]
        users, items = (path if path.is_file() else None for path in tables)
        flags = Flags(user, item, time, tuple(labels))
        # Statistics of the past are for `init` to propose: here --statistics adds them.
        proposal = dataclasses.replace(
            propose([log], users, items, flags), statistics=ProposedStatistics()
        )
        for table, sample in proposal.samples.items():
            _require_types(sample.paths[0], table, sample.names)
        _refuse_uneven_vectors(proposal)
        # Not the proposal itself: sources are pickled for the workers of Beam.
        self.summary = tuple(summary_lines(proposal))
        schema = SchemaFile.from_json(schema_json(proposal, root), str(log), root)
        if valid_from is None:
            valid_from = proposal.splits.valid_from
            test_from = test_from or proposal.splits.test_from
        super().__init__(
            # Files and splits are those given here.
            dataclasses.replace(schema, files=LogFiles()),
            (log,),
            users,
            items,
            valid_from,
            test_from,
            delimiter="\t",
        )
        self.provenance = dataclasses.replace(
            self.provenance,
            name=f"recbole {log.stem}",
            licence="that of the data set's authors",
            citation="the data set's authors; W. X. Zhao et al., RecBole, CIKM 2021",
        )


def _find_log(root: Path, name: str) -> Path:
    """Find NAME.inter.

    Raises:
      InputError: the folder holds none, or several and no name is given.
    """
    found = sorted(root.glob("*.inter"))
    wanted = [path for path in found if not name or path.stem == name]
    if len(wanted) == 1:
        return wanted[0]
    names = ", ".join(path.stem for path in found)
    if not found:
        raise InputError(
            f"root '{root}' holds no NAME.inter; name the folder of RecBole's atomic "
            "files"
        )
    raise InputError(
        f"root '{root}' holds {names}; name one of them with --name"
        if not name
        else f"name='{name}': root '{root}' holds {names}; name one of them"
    )


def _require_types(path: Path, table: str, names: Sequence[str]) -> None:
    typed = [name for name in names if ":" in name]
    if len(typed) < len(names):
        bare = next(name for name in names if ":" not in name)
        raise InputError(
            f"{path}: the header's field '{bare}' has no type, such as '{bare}:token'; "
            f"add it, or read the {table} with `tokenrec init --log ...`, which needs "
            "no types"
        )


def _refuse_uneven_vectors(proposal: Proposal) -> None:
    """Refuse a float_seq whose rows have different lengths: no vector is left out."""
    for decision in proposal.decisions:
        if decision.column.endswith(":float_seq") and UNEVEN in decision.reason:
            path = proposal.samples[decision.table].paths[0]
            raise InputError(
                f"{path}: field '{decision.column}': {decision.reason}; fill the lists "
                "up to one length, or give the field the type token_seq"
            )
