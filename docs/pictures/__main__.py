"""Draw every picture into docs/assets/pictures."""

from __future__ import annotations

from pathlib import Path

from docs.pictures.block import gate, windows
from docs.pictures.machine import machine
from docs.pictures.streams import prefix_cache, streams

PICTURES = (machine, streams, windows, gate, prefix_cache)
FOLDER = Path(__file__).parents[1] / "assets" / "pictures"

if __name__ == "__main__":
    FOLDER.mkdir(parents=True, exist_ok=True)
    for draw in PICTURES:
        picture = draw()
        path = FOLDER / f"{picture.name}.svg"
        path.write_text(picture.document(), encoding="utf-8")
        print(path)
