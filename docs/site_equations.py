"""Equations of the site: LaTeX in `math` fences becomes MathML when the site is built.

Browsers draw MathML themselves, so that a page needs no script and no font from
elsewhere. In a text editor the source of an equation stays readable.
"""

from __future__ import annotations

from typing import Any

from latex2mathml.converter import convert


def block(source: str, language: str, css_class: str, *_: Any, **__: Any) -> str:
    """Render one fenced block; each line that is not empty is an equation of its own.

    The signature is that of a formatter of `pymdownx.superfences`.

    Raises:
      ValueError: the source is not LaTeX that can be converted.
    """
    equations = []
    for part in source.strip().split("\n\n"):
        latex = " ".join(part.split())
        try:
            mathml = convert(latex, display="block")
        except Exception as error:
            raise ValueError(f"equation {latex!r}: {error}") from error
        equations.append(mathml)
    return f'<div class="{css_class}">{"".join(equations)}</div>'
