"""Hooks of MkDocs: pages that are made from the repository when the site is built.

- The configuration page comes from the config dataclasses, the command-line page from
  `--help`, the module pages from the tree of `tokenrec/`.
- A link from a page to a file of the repository outside `docs/` (a result, a config, a
  module) brings that file into the site, so that the site is complete without a network.
- Pictures are put into the pages as SVG elements, so that they follow the site's switch
  between light and dark.
"""

from __future__ import annotations

import ast
import contextlib
import dataclasses
import importlib.util
import io
import json
import os
import posixpath
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))

# Pages of the site that are files of the repository elsewhere.
ELSEWHERE = {
    "CHANGELOG.md": "reference/changelog.md",
    "launch/README.md": "guides/launching.md",
}
_LINK = re.compile(r"(?<!!)\[(?P<text>[^\]]*)\]\((?P<target>[^)\s]+)\)")
_FENCE = re.compile(r"^(```|~~~).*?^\1", re.MULTILINE | re.DOTALL)
_PICTURE = re.compile(r'<img [^>]*src="[^"]*pictures/(?P<name>\w+)\.svg"[^>]*>')
_LANGUAGES = {
    ".py": "python",
    ".json": "json",
    ".yaml": "yaml",
    ".yml": "yaml",
    ".sh": "bash",
    ".toml": "toml",
    ".parquet": "",
}


def on_files(files: Any, config: Any) -> Any:
    """Add the generated pages."""
    from mkdocs.structure.files import File

    for uri, text in pages().items():
        existing = files.get_file_from_path(uri)
        if existing is not None:
            files.remove(existing)
        files.append(File.generated(config, uri, content=text))
    for path in pictures_of_results():
        files.append(
            File.generated(config, f"repository/{path}", abs_src_path=str(ROOT / path))
        )
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Any) -> str:
    """Point links to files of the repository at their pages in the site."""
    return rewrite_links(markdown, page.file.src_uri)


def on_page_content(html: str, page: Any, config: Any, files: Any) -> str:
    """Replace pictures by their SVG elements, and keep deviations beside values."""

    def inline(match: re.Match[str]) -> str:
        text = (DOCS / "assets" / "pictures" / f"{match['name']}.svg").read_text()
        element = re.sub(r"<style>.*?</style>\n", "", text, flags=re.DOTALL)
        return f'<div class="picture-frame">{element}</div>'

    # A value and its deviation stay on one line.
    return _PICTURE.sub(inline, html).replace(
        " ± ", "\N{NO-BREAK SPACE}±\N{NO-BREAK SPACE}"
    )


def pages() -> dict[str, str]:
    """Text of every generated page, by its path in the site."""
    made = {
        "reference/api.md": api_page(),
        "reference/config.md": config_page(),
        "reference/cli.md": command_line_page(),
        **module_pages(),
    }
    for path, uri in ELSEWHERE.items():
        made[uri] = (ROOT / path).read_text(encoding="utf-8")
    waiting = [
        (uri, path.read_text(encoding="utf-8"))
        for path in sorted(DOCS.rglob("*.md"))
        for uri in [path.relative_to(DOCS).as_posix()]
    ]
    waiting += list(made.items())
    while waiting:
        uri, text = waiting.pop()
        for path in linked_files(text, uri):
            target = site_uri(path)
            if target not in made:
                made[target] = file_page(path)
                waiting.append((target, made[target]))
    return made


def source_of(uri: str) -> str:
    """Path in the repository of the file that a page of the site shows."""
    by_uri = {page: path for path, page in ELSEWHERE.items()}
    if uri in by_uri:
        return by_uri[uri]
    if uri.startswith("repository/"):
        return uri.removeprefix("repository/").removesuffix(".page.md")
    return f"docs/{uri}"


def site_uri(path: str) -> str:
    """Path in the site of the page for a file of the repository."""
    if path in ELSEWHERE:
        return ELSEWHERE[path]
    if path.startswith("docs/"):
        return path.removeprefix("docs/")
    ending = "" if path.endswith(".md") else ".page.md"
    return f"repository/{path}{ending}"


def links_out(text: str, uri: str) -> Iterator[tuple[re.Match[str], str, str]]:
    """Yield each relative link of a page, its path in the repository, and its anchor."""
    folder = posixpath.dirname(source_of(uri))
    fences = [match.span() for match in _FENCE.finditer(text)]
    for match in _LINK.finditer(text):
        target, _, anchor = match["target"].partition("#")
        if not target or "://" in target or target.startswith("mailto:"):
            continue
        if any(start <= match.start() < end for start, end in fences):
            continue
        yield match, posixpath.normpath(posixpath.join(folder, target)), anchor


def linked_files(text: str, uri: str) -> list[str]:
    """Files of the repository outside `docs/` that a page links to."""
    return [
        path
        for _, path, _ in links_out(text, uri)
        if not path.startswith("docs/") and (ROOT / path).is_file()
    ]


def rewrite_links(text: str, uri: str) -> str:
    """Replace links to files by links to the pages that show them."""
    pieces, end = [], 0
    for match, path, anchor in links_out(text, uri):
        if path.startswith("docs/") and source_of(uri).startswith("docs/"):
            continue
        if not (ROOT / path).is_file():
            continue
        target = posixpath.relpath(site_uri(path), posixpath.dirname(uri) or ".")
        hash_mark = f"#{anchor}" if anchor else ""
        pieces += [text[end : match.start()], f"[{match['text']}]({target}{hash_mark})"]
        end = match.end()
    return "".join([*pieces, text[end:]])


def file_page(path: str) -> str:
    """The page of a file of the repository."""
    text = (ROOT / path).read_text(encoding="utf-8")
    if path.endswith(".md"):
        return text
    language = _LANGUAGES.get(Path(path).suffix, "text")
    fence = "~~~~"
    return f"# `{path}`\n\n{fence}{language}\n{text.rstrip()}\n{fence}\n"


def pictures_of_results() -> list[str]:
    """Figures that pages of results show."""
    folder = ROOT / "benchmarks" / "results"
    return [path.relative_to(ROOT).as_posix() for path in sorted(folder.rglob("*.png"))]


def api_page() -> str:
    """The page of the public API: its introduction, and every public name."""
    introduction = (DOCS / "reference" / "api.md").read_text(encoding="utf-8")
    parts = [introduction.rstrip(), ""]
    for name, path in public_names().items():
        parts += [f"::: {path}", "    options:", "      heading_level: 3"]
        parts += [f'      heading: "tokenrec.{name}"', ""]
    return "\n".join(parts)


def public_names() -> dict[str, str]:
    """Dotted path of the definition of each public name that `tokenrec` exports.

    Names come from the imports in `tokenrec/__init__.py`, those under `TYPE_CHECKING`
    included, and from functions and classes that are defined there.
    """
    tree = ast.parse((ROOT / "tokenrec" / "__init__.py").read_text(encoding="utf-8"))
    names: dict[str, str] = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith(
            "tokenrec"
        ):
            for alias in node.names:
                names[alias.asname or alias.name] = f"{node.module}.{alias.name}"
        elif isinstance(node, ast.FunctionDef | ast.ClassDef):
            names[node.name] = f"tokenrec.{node.name}"
    return {name: path for name, path in names.items() if not name.startswith("_")}


def config_page() -> str:
    """Every field of a config with its type, its default and its description."""
    if importlib.util.find_spec("tokenrec.config.reference"):
        from tokenrec.config import reference

        return reference.to_markdown()
    from tokenrec.config import Config

    lines = [
        "# Configuration",
        "",
        "Every field of a config. `tokenrec train --config=NAME --config.FIELD=VALUE` "
        "sets one on the command line.",
    ]
    for section in dataclasses.fields(Config):
        if not dataclasses.is_dataclass(section.type):
            continue
        lines += ["", f"## {section.name}", ""]
        documented = attributes(section.type.__doc__ or "")
        for field in dataclasses.fields(section.type):
            default = (
                field.default_factory()
                if callable(field.default_factory)
                else field.default
            )
            lines += [
                f"`{section.name}.{field.name}` = `{default!r}`",
                f":   {documented.get(field.name, '')}",
                "",
            ]
    return "\n".join(lines)


def attributes(docstring: str) -> dict[str, str]:
    """Descriptions under `Attributes:` of a docstring, by name."""
    found: dict[str, str] = {}
    _, _, listing = docstring.partition("Attributes:")
    names: list[str] = []
    for line in listing.splitlines():
        match = re.match(r"\s{2,8}([\w, ]+): (.*)", line)
        if match:
            names = [name.strip() for name in match[1].split(",")]
            found |= dict.fromkeys(names, match[2])
        elif names and line.strip():
            found |= {name: f"{found[name]} {line.strip()}" for name in names}
    return found


def help_text(*words: str) -> str:
    """What `tokenrec WORDS --help` prints, in lines of 88 characters."""
    from tokenrec.cli.main import main

    os.environ["COLUMNS"] = "88"
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed), contextlib.suppress(SystemExit):
        main([*words, "--help"])
    return printed.getvalue().rstrip()


def choices(text: str) -> list[str]:
    """Verbs that a help text lists."""
    return re.findall(r"^    ([a-z][\w-]*)(?:\s|$)", text, re.MULTILINE)


def command_line_page() -> str:
    """The help text of every verb."""
    top = help_text()
    lines = [
        "# Command line",
        "",
        "Every verb and every flag, as `tokenrec VERB --help` prints them. "
        "`python -m tokenrec` is the same program. The meaning of the exit codes is in "
        "[Troubleshooting](../troubleshooting.md).",
        "",
        f"~~~~text\n{top}\n~~~~",
    ]
    for verb in choices(top):
        text = help_text(verb)
        lines += ["", f"## tokenrec {verb}", "", f"~~~~text\n{text}\n~~~~"]
        if verb == "prepare":
            for source in choices(text):
                lines += [
                    "",
                    f"### tokenrec {verb} {source}",
                    "",
                    f"~~~~text\n{help_text(verb, source)}\n~~~~",
                ]
    return "\n".join(lines) + "\n"


def _without_public_names(module: str) -> list[str]:
    """Options that leave out what the page of the public API documents.

    A name that is documented twice has two addresses, and links to it are ambiguous.
    """
    public = [
        name for name, path in public_names().items() if path == f"{module}.{name}"
    ]
    if not public:
        return []
    filters = ["!^_[^_]", *(f"!^{name}$" for name in public)]
    names = ", ".join(f"`{name}`" for name in public)
    return [
        "    options:",
        f"      filters: {json.dumps(filters)}",
        "",
        f"Documented under [Python API](../api.md): {names}.",
    ]


def module_pages() -> dict[str, str]:
    """One page for each package, and the list of them."""
    package = ROOT / "tokenrec"
    folders = sorted({path.parent for path in package.rglob("*.py")})
    made, listing = (
        {},
        ["# Modules", "", "Every module of tokenrec, package by package.", ""],
    )
    for folder in folders:
        name = ".".join(folder.relative_to(ROOT).parts)
        modules = [
            f"{name}.{path.stem}"
            for path in sorted(folder.glob("*.py"))
            if path.stem not in ("__init__", "__main__")
        ]
        if not modules:
            continue
        body = [f"# {name}", ""]
        for module in modules:
            body += [f"::: {module}", *_without_public_names(module), ""]
        made[f"reference/modules/{name}.md"] = "\n".join(body)
        words = ", ".join(f"`{module.rpartition('.')[2]}`" for module in modules)
        listing.append(f"- [{name}](modules/{name}.md): {words}")
    made["reference/modules.md"] = "\n".join(listing) + "\n"
    return made
