"""Rendering of the page templates; values are escaped, and a missing value is an error."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jinja2
from markupsafe import Markup


def render(template: str, figures: Mapping[str, str], **values: Any) -> str:
    """Returns a page as HTML.

    Args:
        template: file name of the template in this package.
        figures: SVG elements by name; inserted without escaping.
        values: the other variables of the template.
    """
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("cnnjax.report", "."),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"number": _number, "signed": _signed}
    shown = {name: Markup(figure) for name, figure in figures.items()}
    return environment.get_template(template).render(figures=shown, **values)


def _number(value: float | None, digits: int = 3) -> str:
    return "undefined" if value is None else f"{value:.{digits}f}"


def _signed(value: float | None) -> str:
    # Adding zero turns -0.0 into 0.0.
    return "undefined" if value is None else f"{round(value, 4) + 0.0:+.4f}"
