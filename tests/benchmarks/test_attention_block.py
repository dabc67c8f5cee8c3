"""Blocks by mesh: rows that cannot be made, the picture, and the command line."""

import pytest

from benchmarks import attention, attention_block
from benchmarks.attention_block import block_row, parse_shape, wanted_rows
from benchmarks.block_heat_map import plot_meshes
from tests.worlds import mesh_of


def test_a_mesh_that_does_not_divide_is_a_row_with_the_reason():
    found = block_row(mesh_of(8, 1, 1), 256, 256, None, 4, "dots")
    assert found == {"problem": "4 streams do not divide over 8 devices"}
    found = block_row(mesh_of(1, 1, 8), 256, 256, None, 4, "dots")
    assert found == {"problem": "2 heads do not divide over 8 devices"}


def test_block_is_a_flag_of_the_attention_benchmark(monkeypatch):
    given = []
    monkeypatch.setattr(attention_block, "main", given.extend)
    attention.main(["--block", "--topology", "v5e:2x2"])
    assert given == ["--topology", "v5e:2x2"]


def test_every_mesh_length_and_width_is_wanted_once():
    flags = attention_block.make_parser().parse_args(
        ["--meshes", "4x1x1x1", "1x1x2x2", "--seq-lens", "8", "16", "--windows", "full"]
    )
    rows = list(wanted_rows(flags))
    assert len(rows) == 4
    assert rows[0] == {"mesh": "4x1x1x1", "width": 2048, "seq_len": 8, "window": "full"}
    with pytest.raises(SystemExit):
        attention_block.make_parser().parse_args(["--meshes", "4x1x1"])
    assert parse_shape("1x2x3x4") == (1, 2, 3, 4)


def test_a_heat_map_has_a_cell_for_every_row(tmp_path):
    pytest.importorskip("matplotlib")
    row = {"width": 64, "window": "full", "mesh": "4x1x1x1", "seq_len": 8}
    rows = [row | {"mfu": 0.6}, row | {"seq_len": 16, "problem": "does not fit"}]
    plot_meshes(rows, tmp_path / "map.png")
    assert (tmp_path / "map.png").read_bytes().startswith(b"\x89PNG")
