"""Pages: one HTML file each, which opens anywhere without a network.

All that comes from data is escaped. The page's own script is allowed by its hash, and nothing else may run or be loaded, so that
a page is safe to open and to mail whatever the labels and file names hold.
"""

from __future__ import annotations

import base64
import hashlib
from functools import cache
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any

from markupsafe import Markup, escape

from melfold.files import write_text

if TYPE_CHECKING:
    from jinja2 import Environment


def write_page(path: Path, template: str, *, script: str = "page.js", **values: Any) -> None:
    """Write a page whole or not at all.

    Args:
        template: its name in `templates/`.
        script: the names of the page's scripts, separated by blanks.
        values: what the template shows; must be escaped unless it is `Markup`.
    """
    code = Markup("\n".join(_asset(name) for name in script.split()))
    digest = base64.b64encode(hashlib.sha256(code.encode()).digest()).decode()
    policy = f"default-src 'none'; img-src data:; media-src data:; style-src 'unsafe-inline'; script-src 'sha256-{digest}'"
    page = _environment().get_template(template)
    write_text(path, page.render(style=Markup(_asset("style.css")), script=code, policy=policy, **values))


@cache
def _asset(name: str) -> str:
    return (resources.files("melfold") / "report" / "templates" / name).read_text()


@cache
def _environment() -> Environment:
    from jinja2 import Environment, FunctionLoader, StrictUndefined

    options: dict[str, Any] = {"autoescape": True, "trim_blocks": True, "lstrip_blocks": True}
    environment = Environment(loader=FunctionLoader(_asset), undefined=StrictUndefined, **options)
    environment.filters |= {"score": score, "percent": percent, "duration": span, "number": number, "breaks": breaks}
    return environment


def breaks(name: str) -> Markup:
    """A label or name that may be broken after each underscore."""
    return Markup("_<wbr>").join(escape(part) for part in name.split("_"))


def score(value: float | None, digits: int = 5) -> str:
    """A score as Kaggle prints it; a dash where there is none."""
    return "–" if value is None or value != value else f"{value:.{digits}f}"


def percent(value: float) -> str:
    """A probability with as many digits as matter: `93 %`, `0.4 %`."""
    share = 100 * value
    return f"{share:.0f} %" if share >= 9.95 else f"{share:.1f} %" if share >= 0.05 else "0 %"


def number(value: float | None) -> str:
    """A count with thousands apart; a dash where there is none."""
    return "–" if value is None or value != value else f"{value:,.0f}"


def span(seconds: float | None) -> str:
    """Seconds as people read them: `45 s`, `12 min`, `3.4 h`."""
    if seconds is None or seconds != seconds:
        return "–"
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
