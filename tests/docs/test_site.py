"""Generated pages of the site hold all that they should."""

from __future__ import annotations

import dataclasses
import importlib.util
import tomllib

import pytest

from docs import site_pages
from tests.docs.pages import ROOT
from tokenrec.config import Config


def test_the_configuration_page_has_every_field() -> None:
    page = site_pages.config_page()
    fields = [
        f"{section.name}.{field.name}"
        for section in dataclasses.fields(Config)
        if dataclasses.is_dataclass(section.type)
        for field in dataclasses.fields(section.type)
    ]
    assert not [field for field in fields if field not in page]


def test_the_command_line_page_has_every_verb_and_source() -> None:
    page = site_pages.command_line_page()
    assert page.count("## tokenrec ") >= 11
    assert "### tokenrec prepare delimited" in page
    assert "--valid-from" in page


def test_module_pages_have_every_module() -> None:
    pages = "\n".join(site_pages.module_pages().values())
    modules = [
        ".".join(path.relative_to(ROOT).with_suffix("").parts)
        for path in (ROOT / "tokenrec").rglob("*.py")
        if path.stem not in ("__init__", "__main__")
    ]
    assert not [module for module in modules if f"::: {module}\n" not in pages]


def test_links_to_files_of_the_repository_become_links_to_their_pages() -> None:
    text = "[a](../../benchmarks/results/pods.md#x) [b](pods.md) [c](../../configs/lrm_1b.py)"
    assert site_pages.rewrite_links(text, "guides/any.md") == (
        "[a](../repository/benchmarks/results/pods.md#x) [b](pods.md) "
        "[c](../repository/configs/lrm_1b.py.page.md)"
    )


def test_files_that_pages_link_to_are_pages_of_the_site() -> None:
    made = site_pages.pages()
    assert "repository/benchmarks/results/chaos.md" in made
    assert made["guides/launching.md"] == (ROOT / "launch" / "README.md").read_text()


@pytest.mark.skipif(
    importlib.util.find_spec("griffe") is None, reason="needs the extra docs"
)
def test_doctests_of_docstrings_become_code_blocks() -> None:
    from docs.site_docstrings import fence_doctests

    text = "Twice.\n\n  >>> 2 * 2\n  4\n\nEnd."
    assert fence_doctests(text) == (
        "Twice.\n\n  ```pycon\n  >>> 2 * 2\n  4\n  ```\n\nEnd."
    )


def test_the_extra_docs_is_pinned() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    pins = (ROOT / "constraints.txt").read_text().splitlines()
    names = {pin.partition("==")[0] for pin in pins}
    assert set(project["optional-dependencies"]["docs"]) <= names
