"""Pages from templates: Jinja2 with autoescape, and one file that runs nothing but our own script.

Every text that goes into a page is `visible` first (foreign_text.py), then escaped. The content-security policy allows
the page's own style and script by their digests, and nothing else: no network, no image, no form, no further script.
"""

from __future__ import annotations

import base64
import functools
import hashlib
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dice_py.reporting.foreign_text import visible

if TYPE_CHECKING:
    from jinja2 import Environment
    from markupsafe import Markup

PAGE = Path(__file__).parent / "page"


@functools.cache
def _environment() -> Environment:
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    environment = Environment(
        loader=FileSystemLoader(PAGE),
        autoescape=True,
        undefined=StrictUndefined,
        finalize=_shown,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["json_data"] = json_data
    return environment


def _shown(value: Any) -> Any:
    """What a template prints: texts without control characters. Markup is made of such texts already."""
    from markupsafe import Markup

    return value if isinstance(value, Markup) or not isinstance(value, str) else visible(value)


def render_page(template: str, *, title: str, styles: list[str], scripts: list[str], **context: Any) -> str:
    """The HTML of one page.

    Args:
        template: the name of a file in `page/` that extends base.html.j2.
        styles, scripts: names of files in `page/`, which are put together, in order.
        context: the variables of the template. A text is escaped unless it is Markup.
    """
    from markupsafe import Markup

    style, script = (_together(names) for names in (styles, scripts))
    policy = "; ".join(
        [
            "default-src 'none'",
            f"script-src '{_source(script)}'" if script else "script-src 'none'",
            f"style-src '{_source(style)}'",
            "base-uri 'none'",
            "form-action 'none'",
        ]
    )
    page = _environment().get_template(template)
    return page.render(title=title, policy=policy, style=Markup(style), script=Markup(script), **context)


def json_data(value: Any) -> Markup:
    """A value as JSON for an element `<script type="application/json">`, which no text in it can end.

    Texts are as they are, also with control characters: the page's script shows them as text, and as `visible` does.
    A lone surrogate becomes a JSON escape.
    """
    from markupsafe import Markup

    text = json.dumps(value, ensure_ascii=True, allow_nan=False, separators=(",", ":"))
    return Markup(text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026"))


def _together(names: list[str]) -> str:
    return "\n".join((PAGE / name).read_text(encoding="utf-8") for name in names)


def _source(text: str) -> str:
    """The digest of an inline style or script, as the policy names it."""
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
