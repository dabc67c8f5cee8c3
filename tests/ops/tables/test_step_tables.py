"""The compiled train step writes rows of a large table in place, and nothing else."""

import dataclasses
import functools
import re

import jax
import pytest

from tests.worlds import SCHEMA, TABLES, TASKS, mesh_of, place, random_batch, tiny
from tokenrec.ops.tables.packed import LANES
from tokenrec.ops.tables.storage import stored_rows
from tokenrec.state import abstract_state, build_model
from tokenrec.step import train_step

# Prime, so that no other shape of the model has it. A batch of `tiny` has 104 ids of
# this table.
ROWS = 104_729
# The width of this table alone, so that it is a stack of its own.
WIDTH = 32
DEVICES = 8
STORED = stored_rows(ROWS)
# Packed lines of the spread table; lines and rows that a device owns. All are sizes that
# nothing else has. In memory, lines are the rows that they hold.
LINES = STORED * WIDTH // LANES
OWNED = {LINES // DEVICES, STORED // DEVICES}

# A line of HLO: `[ROOT] %name = type opcode(operands)...`. A type is `f32[2,3]{1,0}`,
# or a tuple of such in brackets.
LINE = re.compile(
    r"^\s*(?:ROOT )?%?(?P<name>\S+) = (?P<type>\([^()]*\)|\S+) (?P<opcode>[\w-]+)\("
)


@functools.cache
def compiled_step(
    decay: float, accumulate: int, sizes=(1, 1, 1), replicate_rows: int = ROWS
) -> str:
    """HLO text of the train step with a large table `video`.

    Its state is donated, as in `train`.

    Args:
      decay: weight decay of tables.
      accumulate: micro-batches of a step.
      sizes: devices along data, fsdp and tensor.
      replicate_rows: tables of more rows are spread over the devices.
    """
    optim = {"table_weight_decay": decay, "accumulate": accumulate}
    tokens = {"embedding_dims": {"video": WIDTH}, "replicate_rows": replicate_rows}
    config = tiny(tokens=tokens, model={"layers": 1, "windows": ()}, optim=optim)
    mesh = mesh_of(*sizes)
    with jax.set_mesh(mesh):
        schema = dataclasses.replace(SCHEMA, tables=TABLES | {"video": ROWS})
        model = build_model(config, schema, TASKS)
        step = jax.jit(train_step, static_argnums=0, donate_argnums=1)
        batch = place(random_batch(config), mesh)
        return step.lower(model, abstract_state(model), batch).compile().as_text()


def writers(text: str, shape: str) -> list[str]:
    """Opcodes of the entry computation's operations that make a buffer of this shape.

    For a fusion, the opcode is that of its last operation.
    """
    entry = text[text.index("\nENTRY ") :]
    shape_pattern = re.compile(re.escape(shape) + r"(?:\{[\d,]*\})?")
    opcodes = []
    for line in entry.splitlines()[2:]:
        match = LINE.match(line)
        if not match or not shape_pattern.fullmatch(match["type"]):
            continue
        if match["opcode"] == "fusion":
            opcodes.append(_root_opcode(text, line))
        elif match["opcode"] != "parameter":
            opcodes.append(match["opcode"])
    return opcodes


def _root_opcode(text: str, call: str) -> str:
    """Opcode of the last operation of the computation that a fusion calls."""
    called = re.search(r"calls=%?([\w.-]+)", call)
    assert called
    body = re.search(
        rf"^%?{re.escape(called[1])} .*?^\}}", text, re.MULTILINE | re.DOTALL
    )
    assert body
    root = next(
        line for line in body[0].splitlines() if line.lstrip().startswith("ROOT ")
    )
    match = LINE.match(root)
    assert match
    return match["opcode"]


@pytest.mark.parametrize(("decay", "accumulate"), [(0.0, 1), (0.1, 2)])
def test_a_large_table_is_only_written_in_place(decay, accumulate):
    """One scatter makes the new table, one its sums.

    There is no copy, no gradient and no sum of the table's size.
    """
    text = compiled_step(decay, accumulate)
    assert writers(text, f"f32[{ROWS},{WIDTH}]") == ["scatter"]
    assert writers(text, f"f32[{ROWS}]") == ["scatter"]
    sized = re.compile(rf"\[(?:\d+,)*{ROWS}(?:,\d+)*\]")
    matches = [
        LINE.match(line)
        for line in text.splitlines()
        if sized.search(line.split(" = ")[-1].split("(")[0])
    ]
    assert {match["opcode"] for match in matches if match} <= {
        "parameter",
        "scatter",
        "fusion",
        "tuple",
    }


def test_the_new_table_takes_the_memory_of_the_old_one():
    """Parameter and result share a buffer, so that a scatter needs no second table."""
    text = compiled_step(0.0, 1)
    aliased = {
        int(number)
        for number in re.findall(
            r"\((\d+), \{\}, (?:may|must)-alias\)", text.splitlines()[0]
        )
    }
    entry = text[text.index("\nENTRY ") :]
    tables = re.findall(rf"= f32\[{ROWS}[^\n]* parameter\((\d+)\)", entry)
    assert len(tables) == 2
    assert {int(number) for number in tables} <= aliased


def opcodes(text: str, sizes: set[int]) -> set[str]:
    """Opcodes of all operations that make a buffer with a dimension of these sizes.

    Those in loops and fusions are included.
    """
    sized = re.compile(rf"\[(?:\d+,)*(?:{'|'.join(map(str, sizes))})(?:,\d+)*\]")
    matches = [LINE.match(line) for line in text.splitlines()]
    return {
        match["opcode"] for match in matches if match and sized.search(match["type"])
    }


def test_a_spread_table_never_leaves_the_devices_that_own_it():
    """No device makes a buffer of the whole table; owned rows are written in place."""
    text = compiled_step(0.1, 1, (2, 2, 2), replicate_rows=100)
    assert not opcodes(text, {LINES, STORED, ROWS})
    in_place = {
        "parameter",
        "bitcast",
        "scatter",
        "fusion",
        "tuple",
        "get-tuple-element",
        "while",
        "conditional",
    }
    assert {"parameter", "scatter"} <= opcodes(text, OWNED) <= in_place
    exchanged = re.findall(
        r"= \(?(\S+?)\{[^=]*? (all-to-all|all-gather|all-reduce|reduce-scatter)\(", text
    )
    assert any(kind == "all-to-all" for _, kind in exchanged)


def test_on_one_device_a_spread_table_needs_no_exchange():
    text = compiled_step(0.0, 1, replicate_rows=100)
    assert "all-to-all" not in text
    in_place = {"parameter", "bitcast", "scatter", "fusion", "tuple"}
    assert opcodes(text, {LINES, STORED}) <= in_place
