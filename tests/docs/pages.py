"""Pages of the documentation, and what stands in them."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
PAGES = sorted(DOCS.rglob("*.md"))
# Files outside docs/ that the site shows or that link into it.
OTHERS = [
    ROOT / name
    for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "launch/README.md")
]

_FENCE = re.compile(r"^(```|~~~~?)(.*?)\n(.*?)^\1", re.MULTILINE | re.DOTALL)


def name(path: Path) -> str:
    """Path within the repository, as the id of a test."""
    return path.relative_to(ROOT).as_posix()


def without_fences(text: str) -> str:
    """The text of a page without its code blocks."""
    return _FENCE.sub("", text)


def blocks(text: str, *languages: str) -> list[str]:
    """Code blocks of a page in some languages; a title after the language is ignored."""
    return [
        body
        for _, info, body in _FENCE.findall(text)
        if info.split(" ")[0] in languages
    ]


def titled_block(text: str, title: str) -> str:
    """The code block of a page with this title."""
    (body,) = [body for _, info, body in _FENCE.findall(text) if f'"{title}"' in info]
    return body


def command_lines(text: str) -> list[str]:
    """Shell commands of a page, continued lines joined, without comments."""
    lines: list[str] = []
    for block in blocks(text, "sh", "bash", "console"):
        joined = block.replace("\\\n", " ")
        for line in joined.splitlines():
            command = line.removeprefix("$ ").split(" #")[0].strip()
            lines += re.split(r"\s+(?:&&|\||;)\s+", command)
    return [line for line in lines if line]


def anchors(text: str) -> set[str]:
    """Anchors of the headings of a page, as Python-Markdown makes them."""
    made = set()
    for heading in re.findall(r"^#+ (.*)$", without_fences(text), re.MULTILINE):
        plain = re.sub(r"<[^>]+>|[`*]", "", heading).lower()
        plain = re.sub(r"[^\w\s-]", "", plain).strip()
        made.add(re.sub(r"[-\s]+", "-", plain))
    return made
