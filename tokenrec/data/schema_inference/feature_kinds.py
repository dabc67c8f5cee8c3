"""Choose the kind of a feature from the values of its column."""

from __future__ import annotations

import dataclasses
import importlib.util
import re
from collections import Counter

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from tokenrec.data.schema import Entity, Feature, Kind, Transform
from tokenrec.data.schema_inference.column_profile import ColumnProfile

# Integers with at most this many values are categories, unless there are many rows
# and their name says nothing.
FEW_VALUES = 20
_CODE_WORDS = (
    r"(^|_)(id|code|type|status|class|category|kind|group|level|segment|cluster|zip|"
    r"zip_?code|postal\w*|gender|sex|tag|tags|genre|genres|brand|country|region|city|"
    r"language|lang|hour|weekday|dow|month|feat\w*|onehot\w*)(_?\d+)?$|\wId$"
)
_AMOUNT_WORDS = (
    r"time|duration|seconds?$|_ms$|count|num$|amount|price|quantity|length|weight|age$|"
    r"days?$|minutes?$|hours_|width|height|size$|distance|discount|cost|revenue|value$"
)
_TEXT_WORDS = r"title|name|description|summary|headline|text|caption|abstract"
_SEPARATORS = ("|", ";", ",", " ")
# Part of the reason why lists of numbers are left out.
UNEVEN = "a vector has one length"
_LONGEST_LIST = 32
_TEXT_CODES = 2048
_LONGEST_TEXT = 24


@dataclasses.dataclass(frozen=True)
class KindChoice:
    """A feature, and why it has its kind.

    Attributes:
      feature: None if the column is no feature.
      reason: a phrase that follows the reason for its entity.
      key_type: as in `Decision`.
      separator: as in `Decision`.
    """

    feature: Feature | None
    reason: str
    key_type: str = ""
    separator: str = ""


@dataclasses.dataclass(frozen=True)
class _Maker:
    """Make the feature of a column, once its kind is known."""

    name: str
    entity: Entity
    per_row: bool

    def __call__(
        self,
        kind: Kind,
        reason: str,
        key_type: str = "",
        *,
        length: int = 1,
        codes: int = 0,
        transform: Transform = "identity",
        separator: str = "",
    ) -> KindChoice:
        feature = Feature(
            self.name,
            kind,
            self.entity,
            length=length,
            codes=codes,
            transform=transform,
            per_row=self.per_row,
        )
        return KindChoice(feature, reason, key_type, separator)


def choose_kind(
    column: ColumnProfile, name: str, entity: Entity, *, per_row: bool = False
) -> KindChoice:
    """Choose the kind of a feature.

    Args:
      column: the column.
      name: name of the feature.
      entity: whom it describes.
      per_row: the value is stored with the log row.
    """

    make = _Maker(name, entity, per_row)
    if column.type == "list":
        return _list_kind(column, make)
    if column.header_type == "float_seq":
        return _vector_kind(column, make)
    if column.header_type == "float":
        return make("dense", "its header says float", transform=_transform(column))
    if column.type == "string":
        return _string_kind(column, entity, make)
    if column.type == "time":
        return KindChoice(
            None, "dates are not read as features; write its age in days to use it"
        )
    if column.type in ("empty", "other"):
        return KindChoice(None, "its type is not one that a feature can have")
    if column.type == "bool":
        return make(
            "categorical",
            "it is true or false",
            "string" if column.is_text else "int64",
        )
    if column.header_type == "token" or _is_code(column):
        reason = f"its {column.distinct:,} numbers are codes"
        return make(
            "categorical", reason, "int64" if column.type == "int" else "string"
        )
    return make(
        "dense",
        f"it is a number with {column.distinct:,} values",
        transform=_transform(column),
    )


def _is_code(column: ColumnProfile) -> bool:
    """Whether numbers are names of something, and not amounts."""
    if column.distinct > 2 and _named(column, _AMOUNT_WORDS):
        return False
    few = column.distinct <= FEW_VALUES
    return column.type == "int" and (few or _named(column, _CODE_WORDS))


def _named(column: ColumnProfile, words: str) -> bool:
    return re.search(words, column.name) is not None or (
        re.search(words, column.name.lower()) is not None
    )


def _transform(column: ColumnProfile) -> Transform:
    """`log1p` for a long tail: the greatest value far beyond the typical one."""
    numbers = np.abs(column.numbers[~np.isnan(column.numbers)])
    if not len(numbers):
        return "identity"
    typical = np.quantile(numbers, 0.9)
    return "log1p" if numbers.max() > 5 * max(typical, 4) else "identity"


def _string_kind(column: ColumnProfile, entity: Entity, make: _Maker) -> KindChoice:
    # Types in the header say what is a list.
    typed = {"token_seq": " ", "token": ""}
    separator = typed.get(column.header_type, find_separator(column))
    looks_like_text = _is_text(column)
    if separator and not looks_like_text:
        lists = pc.split_pattern(column.values.drop_null(), separator)
        lengths = pc.list_value_length(lists).to_numpy()
        parts = pc.list_flatten(lists)
        length = _list_length(lengths)
        name = {" ": "blanks"}.get(separator, f"'{separator}'")
        reason = (
            f"{name} separate its values, at most {length} of "
            f"{len(pc.unique(parts)):,} different ones"
        )
        return make(
            "multi_valued",
            reason,
            _list_type(parts),
            length=length,
            separator=separator,
        )
    if looks_like_text:
        return _text_kind(column, entity, make)
    if column.distinct > 0.5 * column.known and column.distinct > 200:
        return KindChoice(
            None,
            f"nearly every row has a value of its own ({column.examples(2)}), of which "
            "nothing can be learned",
        )
    return make("categorical", f"it has {column.distinct:,} values", "string")


def _is_text(column: ColumnProfile) -> bool:
    """Whether values are sentences or titles: many different ones, of several words."""
    words = pc.list_value_length(pc.utf8_split_whitespace(column.values.drop_null()))
    several = (pc.mean(words).as_py() or 0) >= 1.5
    varied = column.distinct > 0.5 * column.known
    return (
        several
        and varied
        and (_named(column, _TEXT_WORDS) or column.known > 50)
        and (_vocabulary_is_open(column))
    )


def _vocabulary_is_open(column: ColumnProfile) -> bool:
    """Whether most words occur once or twice: not a list of known values."""
    words = Counter(
        word
        for value in column.values.drop_null().to_pylist()
        for word in value.split()
    )
    rare = sum(1 for count in words.values() if count <= 2)
    return len(words) > 0 and (rare > 0.3 * len(words) or _named(column, _TEXT_WORDS))


def _text_kind(column: ColumnProfile, entity: Entity, make: _Maker) -> KindChoice:
    if entity not in ("user", "item") or importlib.util.find_spec("tokenizers") is None:
        reason = (
            "it is text, which only users and items can have"
            if entity not in ("user", "item")
            else "it is text, which needs the extra text (pip install "
            '"tokenrec[text]"); run init again after that to read it'
        )
        return KindChoice(None, reason)
    words = pc.list_value_length(pc.utf8_split_whitespace(column.values.drop_null()))
    # A word has about 1.5 tokens.
    length = int(np.quantile(words.to_numpy(), 0.95) * 1.5) + 1
    return make(
        "text",
        "it is text, read by its words",
        length=min(max(length, 4), _LONGEST_TEXT),
        codes=_TEXT_CODES,
    )


def find_separator(column: ColumnProfile) -> str:
    """Find what separates several values in one field; empty if nothing does.

    The parts must come again and again, with other parts and on their own, as in
    "Comedy|Drama" and "Drama". Intervals such as "[10,100)" are no lists, and blanks
    need many lists: "Probable Owner" beside "Owner" is a value.
    """
    distinct = pc.unique(column.values.drop_null())
    if pc.any(pc.match_substring_regex(distinct, r"^[\[\(].*[\]\)]$")).as_py():
        return ""
    values = distinct.to_pylist()
    for separator in _SEPARATORS:
        lists = [value for value in values if separator in value]
        parts = Counter(part for value in values for part in value.split(separator))
        alone = set(values) - set(lists)
        if separator == " ":
            reused = sum(parts[part] > 2 for part in parts)
            enough = len(lists) >= 20 and reused >= 0.8 * len(parts)
        else:
            reused = sum(part in alone or parts[part] > 2 for part in parts)
            enough = reused >= 0.6 * len(parts)
        fewer = len(parts) < len(values) or separator == "|"
        if len(lists) >= 0.05 * len(values) > 0 and enough and fewer and lists:
            return separator
    return ""


def _list_kind(column: ColumnProfile, make: _Maker) -> KindChoice:
    parts = pc.list_flatten(column.values)
    if pa.types.is_floating(parts.type):
        return _vector_kind(column, make)
    if not (pa.types.is_string(parts.type) or pa.types.is_integer(parts.type)):
        return KindChoice(None, f"lists of {parts.type} are not read")
    length = _list_length(pc.list_value_length(column.values.drop_null()).to_numpy())
    return make("multi_valued", "it holds lists", _list_type(parts), length=length)


def _vector_kind(column: ColumnProfile, make: _Maker) -> KindChoice:
    values = column.values.drop_null()
    if column.type != "list":
        values = pc.split_pattern(values.cast(pa.string()), " ")
    lengths = pc.unique(pc.list_value_length(values)).to_pylist()
    if len(lengths) > 1:
        return KindChoice(
            None,
            f"its lists of numbers have {min(lengths)} to {max(lengths)} values, and "
            + UNEVEN,
        )
    return make(
        "embedding",
        f"it holds vectors of {lengths[0]} numbers",
        length=lengths[0],
        separator="" if column.type == "list" else " ",
    )


def _list_length(lengths: np.ndarray) -> int:
    longest = int(lengths.max(initial=1))
    if longest > _LONGEST_LIST:
        longest = int(np.quantile(lengths, 0.99))
    return min(max(longest, 1), _LONGEST_LIST)


def _list_type(parts: pa.Array | pa.ChunkedArray) -> str:
    if pa.types.is_integer(parts.type):
        return "int64"
    whole = pc.all(pc.match_substring_regex(parts, r"^(0|-?[1-9][0-9]{0,17})$")).as_py()
    return "int64" if whole else "string"
