"""Work of a request: soft tokens against the same history written as words.

    python -m benchmarks.language_model_prompts [--configs lrm_gemma3_1b lrm_qwen3_4b]

Nothing is run or compiled, and no data are needed. A table row is one prompt of a config
whose backbone is a language model:

- `soft`: the config's own, an event is one soft token;
- `title`: an event is the words of its title, as many as the schema keeps of one:
  a shorter title is filled up, and what fills it up is computed too;
- `title, as long`: the same, cut to the newest tokens, as many as the soft history has.

User, basket and candidates are the same in all of them. Columns:

- `events`: events of which the history shows at least a word;
- `tokens`, of a whole request with its candidates, and `history_tokens`;
- `forward_gflop`: matrix products of a forward pass, attention over visible pairs only
  (tokenrec/planner/flops.py); `train_gflop`: of a train step in which every weight is
  trained, without recomputation;
- `cache_mib`: keys and values of the prefix in the config's type, which a request
  without a prefix cache holds too;
- `v5e_ms`: the forward FLOPs at the bfloat16 peak of a TPU v5e, a lower bound.
"""

from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path
from typing import Any

import jax.numpy as jnp

from benchmarks.report import markdown_table, run_script, write_result
from tokenrec.config import Config
from tokenrec.config.load import load_config
from tokenrec.data.schema import Schema
from tokenrec.models.backbones.bfts import cached_positions
from tokenrec.models.stream_layout import stream_layout, title_features
from tokenrec.planner.describe import describe
from tokenrec.planner.flops import STEP_OVER_FORWARD
from tokenrec.planner.planned_schema import resolve_schema
from tokenrec.planner.roofline import chip

CONFIGS = ("lrm_gemma3_1b", "lrm_qwen3_4b")
OUT = Path(__file__).parent / "results" / "language_model_prompts"


def prompts(config: Config, schema: Schema) -> dict[str, Config]:
    """The prompts of a table, by name."""
    titles = tuple(f.name for f in title_features(schema))
    written = {"history": titles}
    soft_tokens = config.data.events
    return {
        "soft": config,
        "title": _with_tokens(config, text=written),
        "title, as long": _with_tokens(config, text=written, history_cap=soft_tokens),
    }


def _with_tokens(config: Config, **fields: Any) -> Config:
    tokens = dataclasses.replace(config.tokens, **fields)
    return dataclasses.replace(config, tokens=tokens)


def prompt_row(config: Config, schema: Schema) -> dict[str, Any]:
    """Compute the figures of a prompt, without its name."""
    found = describe(config, schema)
    history = found["history"]
    layout = stream_layout(
        config, schema.without(config.data.exclude), config.data.events
    )
    decoder = config.model.decoder
    number = 2 * decoder.kv_heads * decoder.head_width
    cached = sum(map(len, cached_positions(config.model, layout)))
    flops = found["flops_per_example"]
    return {
        "events": -(-history["tokens"] // layout.stride),
        "history_tokens": history["tokens"],
        "tokens": found["tokens"],
        "forward_gflop": flops / 1e9,
        "train_gflop": STEP_OVER_FORWARD * flops / 1e9,
        "cache_mib": cached * number * jnp.dtype(config.model.dtype).itemsize / 2**20,
        "v5e_ms": 1e3 * flops / chip("TPU v5 lite").flops,
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--configs", nargs="+", default=CONFIGS, choices=CONFIGS)
    parser.add_argument("--out", type=Path, default=OUT, help="stem of the result")
    flags = parser.parse_args()
    rows = []
    for name in flags.configs:
        config = load_config(name)
        schema = resolve_schema(config)[0]
        for prompt, changed in prompts(config, schema).items():
            row = {"config": name, "prompt": prompt} | prompt_row(changed, schema)
            rows.append(row)
    write_result(
        flags.out,
        rows,
        {"schema": "planned", "dtype": "bfloat16"},
        "python -m benchmarks.language_model_prompts",
        title="A request in soft tokens and in words: by arithmetic, nothing was run",
        packages=("tokenrec", "jax", "jaxlib", "flax"),
    )
    print(markdown_table(rows))


if __name__ == "__main__":
    run_script(main)
