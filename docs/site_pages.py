"""What the site adds to the pages of docs/ (a hook of MkDocs; `make docs`).

The pages beside docs/ (README.md is the start page) and the pictures that pages show come in. Links are written for a
reader of the repository, so here they are turned: to the page of the site if there is one, to a copied picture, or to
plain text where the link leads to a source file. A link that leads nowhere is a warning, which strict mode refuses.
"""

from __future__ import annotations

import logging
import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File

ROOT = Path(__file__).parents[1]
BESIDE = {"README.md": "index.md", "CONTRIBUTING.md": "contributing.md", "CHANGELOG.md": "changes.md",
          "SECURITY.md": "security.md"}  # fmt: skip
"""Pages beside docs/, and their names in the site."""
_LINK = re.compile(r"(!?)\[((?:[^\[\]]|\[[^\]]*\])*)\]\(([^)#\s]*)(#[^)\s]*)?\)")
_log = logging.getLogger("mkdocs.hooks.site_pages")


def on_files(files: Any, *, config: Any) -> Any:
    """Adds the pages beside docs/, and every picture that a page names."""
    for name, page in BESIDE.items():
        files.append(File.generated(config, page, content=(ROOT / name).read_text(encoding="utf-8")))
    pictures = {
        target
        for file in files.documentation_pages()
        for mark, _, link, _ in _LINK.findall(file.content_string)
        if mark and "://" not in link and (target := _source_of(file.src_uri).parent.joinpath(link).resolve()).is_file()
    }
    for picture in sorted(pictures):
        if not picture.is_relative_to(ROOT / "docs"):
            files.append(File.generated(config, _copy_of(picture), abs_src_path=str(picture)))
    return files


def on_page_markdown(markdown: str, *, page: Any, files: Any, **_: Any) -> str:
    """Turns the links of a page."""
    folder = _source_of(page.file.src_uri).parent

    def turned(match: re.Match[str]) -> str:
        mark, text, link, anchor = match[1], match[2], match[3], match[4] or ""
        if not link or "://" in link or link.startswith("mailto:"):
            return match[0]
        target = (folder / link).resolve()
        if not target.exists():
            _log.warning("%s: the link to %s leads nowhere", page.file.src_uri, link)
            return match[0]
        name = str(target.relative_to(ROOT))
        if name in BESIDE:
            return f"{mark}[{text}]({BESIDE[name]}{anchor})"
        if target.is_relative_to(ROOT / "docs"):
            return f"{mark}[{text}]({target.relative_to(ROOT / 'docs')}{anchor})"
        return f"![{text}]({_copy_of(target)})" if mark else f"{text} (`{name}`)"

    # Code blocks are no links.
    parts = re.split(r"(^```.*?^```$)", markdown, flags=re.MULTILINE | re.DOTALL)
    return "".join(part if part.startswith("```") else _LINK.sub(turned, part) for part in parts)


def _source_of(page: str) -> Path:
    """The file of the repository that a page of the site was made from."""
    return next((ROOT / name for name, made in BESIDE.items() if made == page), ROOT / "docs" / page)


def _copy_of(picture: Path) -> str:
    return f"pictures/{picture.name}"
