"""The pictures in the repository are those that the script draws."""

from __future__ import annotations

import re
import xml.etree.ElementTree

import numpy as np
import pytest

from docs.pictures.__main__ import FOLDER, files
from docs.pictures.attention import sees, toy_stream
from docs.pictures.svg import DARK, LIGHT
from tokenrec.analysis.figure_style import INK, PALE
from tokenrec.ops.attention.pattern import Pattern


def test_the_folder_holds_what_the_script_draws() -> None:
    assert {path.name for path in FOLDER.iterdir()} == set(files())
    assert not [
        name
        for name, text in files().items()
        if (FOLDER / name).read_text(encoding="utf-8") != text
    ]


@pytest.mark.parametrize("name", [name for name in files() if name.endswith(".svg")])
def test_a_picture_is_complete_in_itself(name: str) -> None:
    text = files()[name]
    root = xml.etree.ElementTree.fromstring(text)
    assert root.get("aria-label")
    addresses = set(re.findall(r"https?://[^\"' )]+", text))
    assert addresses == {"http://www.w3.org/2000/svg"}
    used = set(re.findall(r"var\(--(\w+)\)", text))
    assert used <= set(LIGHT)


def test_light_and_dark_have_the_same_colours_and_those_of_the_report() -> None:
    assert LIGHT.keys() == DARK.keys()
    assert (LIGHT["ink"], LIGHT["line"]) == (INK, PALE)


@pytest.mark.parametrize("window", [None, 6, 3])
def test_the_picture_of_windows_shows_the_rule_of_the_code(window: int | None) -> None:
    stream = toy_stream()
    every = np.arange(len(stream.roles))
    candidate = np.where(np.array(stream.roles) == "target", 0, -1)
    pattern = Pattern(every, every, every, np.array(stream.static), candidate)
    expected = pattern.visible(window) | pattern.diagonal()
    drawn = [[sees(stream, int(i), int(j), window) for j in every] for i in every]
    np.testing.assert_array_equal(drawn, expected)
