"""Convert examples of a TensorFlow Datasets data set to Arrow columns.

The kind of a column follows from its feature spec:

| spec | column |
|---|---|
| Text, or a scalar string | string |
| ClassLabel | string, the name of the class; null for -1 |
| scalar integer, float, bool | int64, float64, bool |
| Sequence or one-dimensional Tensor of these | list |
| FeaturesDict inside | a column `outer/inner` for each part |

Anything else (images, video, audio, matrices) is left out.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa


@dataclasses.dataclass(frozen=True)
class TfdsColumn:
    """A column, and where it is in an example.

    Attributes:
      name: parts of its path, joined by slashes.
      path: keys from the example to the value.
      type: Arrow type of the column.
      class_names: names of the classes of a ClassLabel; empty for other specs.
    """

    name: str
    path: tuple[str, ...]
    type: pa.DataType
    class_names: tuple[str, ...] = ()

    def convert(self, examples: Sequence[Mapping[str, Any]]) -> pa.Array:
        """Take the values of the column out of examples."""
        values = [self._value(example) for example in examples]
        return pa.array(values, self.type)

    def _value(self, example: Any) -> Any:
        for key in self.path:
            example = example[key]
        if pa.types.is_list(self.type):
            return [self._scalar(part) for part in example]
        return self._scalar(example)

    def _scalar(self, value: Any) -> Any:
        if self.class_names:
            return self.class_names[int(value)] if value >= 0 else None
        if isinstance(value, bytes):
            return value.decode(errors="replace")
        return value.item() if isinstance(value, np.generic) else value


def list_columns(features: Any) -> tuple[list[TfdsColumn], list[str]]:
    """List the columns of a FeaturesDict.

    Returns:
      The columns, and the names of the features that are left out.
    """
    columns: list[TfdsColumn] = []
    left_out: list[str] = []
    for path, spec in _leaves(features, ()):
        column = _column(path, spec)
        if column is None:
            left_out.append("/".join(path))
        else:
            columns.append(column)
    return columns, left_out


def _leaves(features: Any, path: tuple[str, ...]) -> Iterator[tuple[Any, Any]]:
    import tensorflow_datasets as tfds

    for name, spec in features.items():
        if isinstance(spec, tfds.features.FeaturesDict):
            yield from _leaves(spec, (*path, name))
        else:
            yield (*path, name), spec


def _column(path: tuple[str, ...], spec: Any) -> TfdsColumn | None:
    import tensorflow_datasets as tfds

    name = "/".join(path)
    if isinstance(spec, tfds.features.Sequence):
        inner = _column(path, spec.feature)
        if inner is None or pa.types.is_list(inner.type):
            return None
        return dataclasses.replace(inner, type=pa.list_(inner.type))
    if isinstance(spec, tfds.features.ClassLabel):
        # Numbers without names are their own names.
        names = tuple(spec.names or ())
        if all(text == str(i) for i, text in enumerate(names)):
            return TfdsColumn(name, path, pa.int64())
        return TfdsColumn(name, path, pa.string(), names)
    kind = _scalar_type(spec)
    if kind is None or len(spec.shape) > 1:
        return None
    return TfdsColumn(name, path, pa.list_(kind) if spec.shape else kind)


def _scalar_type(spec: Any) -> pa.DataType | None:
    import tensorflow_datasets as tfds

    if isinstance(spec, tfds.features.Text):
        return pa.string()
    # Images, audio and the like are Tensors by inheritance.
    if type(spec) not in (tfds.features.Tensor, tfds.features.Scalar):
        return None
    kind = np.dtype(spec.np_dtype)
    if kind == np.bool_:
        return pa.bool_()
    if np.issubdtype(kind, np.integer):
        return pa.int64()
    if np.issubdtype(kind, np.floating):
        return pa.float64()
    return pa.string() if kind == np.object_ else None
