"""Draw every picture into docs/assets/pictures."""

from __future__ import annotations

from pathlib import Path

from docs.pictures.block import gate, windows
from docs.pictures.machine import machine
from docs.pictures.server import server
from docs.pictures.streams import prefix_cache, streams
from docs.pictures.svg import site_style

PICTURES = (machine, streams, windows, gate, prefix_cache, server)
FOLDER = Path(__file__).parents[1] / "assets" / "pictures"


def files() -> dict[str, str]:
    """Name and text of every file of the folder."""
    pictures = [draw() for draw in PICTURES]
    texts = {f"{picture.name}.svg": picture.document() for picture in pictures}
    return texts | {"pictures.css": site_style()}


if __name__ == "__main__":
    FOLDER.mkdir(parents=True, exist_ok=True)
    for name, text in files().items():
        (FOLDER / name).write_text(text, encoding="utf-8")
        print(FOLDER / name)
