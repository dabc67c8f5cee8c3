"""Links of the pages lead somewhere, and paths named in them exist."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.docs.pages import OTHERS, PAGES, ROOT, anchors, name, without_fences

_LINK = re.compile(r"!?\[[^\]]*\]\(([^)\s]+)\)")
_PATH = re.compile(
    r"`((?:tokenrec|tests|benchmarks|configs|docs|launch)/[\w./-]+\.\w+)`"
)
# The changelog tells of files that are gone, and the guides to adding something of files
# that the reader makes.
TO_CHECK_FOR_PATHS = [
    page
    for page in [*PAGES, *OTHERS]
    if page.name != "CHANGELOG.md" and not page.name.startswith("adding_")
]
_GENERATED = re.compile(r"^docs/reference/(?:cli|config|modules|changelog)\.md$")


@pytest.mark.parametrize("page", [*PAGES, *OTHERS], ids=name)
def test_links_lead_to_files_and_anchors_that_exist(page: Path) -> None:
    wrong = []
    for target in _LINK.findall(without_fences(page.read_text())):
        if "://" in target or target.startswith("mailto:"):
            continue
        path, _, anchor = target.partition("#")
        file = (page.parent / path).resolve() if path else page
        if _GENERATED.match(file.relative_to(ROOT).as_posix()):
            continue
        if not file.is_file() or (
            anchor and file.suffix == ".md" and anchor not in anchors(file.read_text())
        ):
            wrong.append(target)
    assert not wrong


@pytest.mark.parametrize("page", TO_CHECK_FOR_PATHS, ids=name)
def test_paths_in_the_text_exist(page: Path) -> None:
    named = _PATH.findall(without_fences(page.read_text()))
    assert not [path for path in named if not (ROOT / path).exists()]


def test_every_page_is_in_the_navigation() -> None:
    navigation = (ROOT / "mkdocs.yml").read_text()
    pages = {name(page).removeprefix("docs/") for page in PAGES}
    assert not {page for page in pages if page not in navigation}


def test_addresses_name_no_package_registry() -> None:
    registries = re.compile(r"pypi\.org|pythonhosted|registry\.npmjs|deb\.debian")
    assert not [
        name(page) for page in [*PAGES, *OTHERS] if registries.search(page.read_text())
    ]
