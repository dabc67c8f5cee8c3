"""Features of a batch as vectors and soft tokens, in PyTorch.

All tables of one width lie in two `nn.Embedding`: a short one, whose gradient is dense,
and a long one (tables of more than `LONG` rows) with sparse gradients. A part of a batch
is looked up with one call of each. Importing this needs PyTorch.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

from tokenrec.config import Config
from tokenrec.data.schema import Feature, Schema, columns
from tokenrec.errors import InputError

# Tables of more rows than this have sparse gradients.
LONG = 100_000
CLIP = 5.0


class Tables(nn.Module):
    """The embedding tables of a schema.

    Args:
      schema: features and table sizes.
      width: width of all tables.
    """

    def __init__(self, schema: Schema, width: int):
        super().__init__()
        self.width = width
        # First row of each table in the embedding that holds it.
        self.first: dict[str, int] = {}
        self.is_long: dict[str, bool] = {}
        rows = {False: 0, True: 0}
        for name in sorted(schema.tables):
            long = schema.tables[name] > LONG
            self.first[name], self.is_long[name] = rows[long], long
            rows[long] += schema.tables[name]
        self.short = nn.Embedding(max(rows[False], 1), width)
        self.long = nn.Embedding(rows[True], width, sparse=True) if rows[True] else None


class Features(nn.Module):
    """All features of an entity as one vector.

    The vector holds the rows of the categorical features (those of short tables first),
    the mean row of each multi-valued one, the dense values, and a flag for each dense
    value that is missing.

    Args:
      features: features of the entity, in the order of its columns.
      tables: where they are looked up.
    """

    def __init__(self, features: Sequence[Feature], tables: Tables):
        super().__init__()
        self.features, self.table_width = tuple(features), tables.width
        spans = columns(features).ids
        single = [f for f in features if f.kind == "categorical"]
        self.short = [f for f in single if not tables.is_long[f.table_name]]
        self.long = [f for f in single if tables.is_long[f.table_name]]
        self.several = [f for f in features if f.kind == "multi_valued"]
        self.dense = [f for f in features if f.kind == "dense"]
        known = len(single) + len(self.several) + len(self.dense)
        if known < len(self.features) or any(
            tables.is_long[f.table_name] for f in self.several
        ):
            raise InputError(
                "the peers read categorical and dense features, and multi-valued ones "
                f"of tables of at most {LONG:,} rows"
            )

        def constant(name: str, values: list[float], dtype: torch.dtype) -> None:
            self.register_buffer(name, torch.tensor(values, dtype=dtype), False)

        for name, group in (("short", self.short), ("long", self.long)):
            places = [spans[f.name][0] for f in group]
            constant(f"{name}_columns", places, torch.long)
            first = [tables.first[f.table_name] for f in group]
            constant(f"{name}_first", first, torch.long)
        self.several_spans = [
            (spans[f.name], tables.first[f.table_name]) for f in self.several
        ]
        constant("log1p", [f.transform == "log1p" for f in self.dense], torch.bool)
        constant("mean", [f.mean for f in self.dense], torch.float32)
        deviations = [max(f.deviation, 1e-6) for f in self.dense]
        constant("deviation", deviations, torch.float32)

    @property
    def width(self) -> int:
        """Width of the vector."""
        rows = len(self.short) + len(self.long) + len(self.several)
        return rows * self.table_width + 2 * len(self.dense)

    def forward(
        self, tables: Tables, ids: torch.Tensor, dense: torch.Tensor
    ) -> torch.Tensor:
        """Look up and normalise: ids `[..., I]`, dense `[..., D]` to `[..., width]`."""
        parts = []
        if self.short:
            rows = tables.short(ids[..., self.short_columns] + self.short_first)
            parts.append(rows.flatten(-2))
        if self.long:
            assert tables.long is not None
            rows = tables.long(ids[..., self.long_columns] + self.long_first)
            parts.append(rows.flatten(-2))
        for (start, stop), first in self.several_spans:
            values = ids[..., start:stop]
            present = (values != 0)[..., None]
            total = (tables.short(values + first) * present).sum(-2)
            parts.append(total / present.sum(-2).clamp(min=1))
        if self.dense:
            missing = dense.isnan()
            x = torch.where(missing, self.mean, dense)
            logs = torch.sign(x) * torch.log1p(x.abs())
            x = torch.where(self.log1p & ~missing, logs, x)
            x = ((x - self.mean) / self.deviation).clamp(-CLIP, CLIP)
            parts += [x, missing.to(x.dtype)]
        return torch.cat(parts, dim=-1)

    def order(self) -> np.ndarray:
        """Where each entry of our vector lies in this one, `[width]`.

        Ours holds the features in the order of the schema, and a dense value beside its
        flag.
        """
        place: dict[str, np.ndarray] = {}
        start = 0
        for feature in [*self.short, *self.long, *self.several]:
            place[feature.name] = start + np.arange(self.table_width)
            start += self.table_width
        for number, feature in enumerate(self.dense):
            value = start + number
            place[feature.name] = np.array([value, value + len(self.dense)])
        return np.concatenate([place[f.name] for f in self.features])


class Maker(nn.Module):
    """The vector of an entity to N tokens: linear, GELU, linear.

    Args:
      inputs: width of the vector.
      hidden: inner width.
      tokens: N.
      width: d, the width of a token.
      scaled: the tokens are normalised and scaled (`tokens.output_scale`).
    """

    def __init__(
        self, inputs: int, hidden: int, tokens: int, width: int, *, scaled: bool
    ):
        super().__init__()
        self.tokens = tokens
        self.inner = nn.Linear(inputs, hidden)
        self.output = nn.Linear(hidden, tokens * width)
        self.scale = nn.Parameter(torch.ones(())) if scaled else None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map `[..., inputs]` to `[..., N, d]`."""
        x = self.output(F.gelu(self.inner(x), approximate="tanh"))
        x = x.unflatten(-1, (self.tokens, -1))
        if self.scale is None:
            return x
        return self.scale * F.rms_norm(x, x.shape[-1:], eps=1e-6)


class PerField(nn.Module):
    """A token per categorical feature, by a linear map of its own.

    Args:
      fields: M, the number of features.
      inputs: width of a table row.
      width: d.
    """

    def __init__(self, fields: int, inputs: int, width: int):
        super().__init__()
        self.kernel = nn.Parameter(torch.randn(fields, inputs, width) * inputs**-0.5)
        self.bias = nn.Parameter(torch.zeros(fields, width))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map the vector of the entity, `[B, M inputs]`, to tokens `[B, M, d]`."""
        fields = x.unflatten(-1, self.kernel.shape[:2])
        return torch.einsum("bme,med->bmd", fields, self.kernel) + self.bias


class Tokens(nn.Module):
    """The soft tokens of a batch by entity, as our makers make them.

    Args:
      config: the run's config: soft tokens by an MLP, fused events in NIO, interleaved
        states and actions in UC.
      schema: features, without the excluded ones.
    """

    def __init__(self, config: Config, schema: Schema):
        super().__init__()
        tokens, width = config.tokens, config.model.width
        if tokens.maker != "mlp" or tokens.prompt or tokens.text:
            raise InputError("the peers make soft tokens with tokens.maker='mlp' only")
        if tokens.fused != (config.data.paradigm == "nio"):
            raise InputError(
                "the peers make fused events in NIO and interleaved ones in UC; set "
                "tokens.fused so"
            )
        self.fused = tokens.fused
        self.tables = Tables(schema, tokens.embedding_dim)
        self.user_features = Features(schema.group("user"), self.tables)
        self.state_features = Features(schema.state, self.tables)
        self.action_features = Features(schema.group("action"), self.tables)

        def maker(inputs: int, count: int = 1) -> Maker:
            hidden = tokens.hidden or 2 * width
            return Maker(inputs, hidden, count, width, scaled=tokens.output_scale)

        fields = len(self.user_features.features)
        self.user: Maker | PerField
        if tokens.user_tokens:
            self.user = maker(self.user_features.width, tokens.user_tokens)
        else:
            self.user = PerField(fields, tokens.embedding_dim, width)
        state, action = self.state_features.width, self.action_features.width
        if self.fused:
            self.event = maker(state + action)
            self.target = maker(state)
        else:
            self.state, self.action = maker(state), maker(action)

    def forward(self, batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Make the tokens `[B, n, d]` of "user", "history", and in NIO "target"."""

        def vector(features: Features, part: str) -> torch.Tensor:
            ids, dense = batch[f"{part}_ids"], batch[f"{part}_dense"]
            return features(self.tables, ids, dense)

        user = self.user(vector(self.user_features, "user"))
        state = vector(self.state_features, "state")
        action = vector(self.action_features, "action")
        if not self.fused:
            # [B, T, 2, d]: the state and the action of an event lie side by side.
            pairs = torch.cat([self.state(state), self.action(action)], dim=2)
            return {"user": user, "history": pairs.flatten(1, 2)}
        history = self.event(torch.cat([state, action], dim=-1)).flatten(1, 2)
        target = self.target(vector(self.state_features, "target")).flatten(1, 2)
        return {"user": user, "history": history, "target": target}
