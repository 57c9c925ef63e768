"""A page as a tree of elements, read by Python's parser of HTML, and what the tests ask of it."""

from __future__ import annotations

from html.parser import HTMLParser
from pathlib import Path
from xml.etree import ElementTree
from xml.etree.ElementTree import Element

_VOID = ("meta", "link", "br", "hr", "img", "input", "wbr", "base")


class _Reader(HTMLParser):
    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.tree = ElementTree.TreeBuilder()
        self.open: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tree.start(tag, {name: value or "" for name, value in attrs})
        if tag in _VOID:
            self.tree.end(tag)
        else:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tree.start(tag, {name: value or "" for name, value in attrs})
        self.tree.end(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag, f"</{tag}> closes another element"
        self.tree.end(tag)

    def handle_data(self, data: str) -> None:
        if self.open:
            self.tree.data(data)


class Page:
    """A page that is well formed: every element that is opened is closed, in order."""

    def __init__(self, file: Path) -> None:
        reader = _Reader()
        reader.feed(file.read_text(encoding="utf-8"))
        reader.close()
        assert reader.open == []
        self.root: Element = reader.tree.close()

    def all(self, tag: str, of_class: str | None = None) -> list[Element]:
        """The elements of a tag, in order."""
        found = list(self.root.iter(tag))
        return [each for each in found if of_class is None or of_class in each.get("class", "").split()]

    def table(self, caption: str) -> dict[str, list[str]]:
        """The rows of the one table with this caption: the other cells by the heading of the row."""
        (table,) = [each for each in self.all("table") if text(each.find("caption")) == caption]
        rows = [row for body in table.iter("tbody") for row in body.iter("tr")]
        return {text(row.find("th")): [text(cell) for cell in row.iter("td")] for row in rows}

    def captions(self) -> list[str]:
        """Of all tables."""
        return [text(each.find("caption")) for each in self.all("table")]

    def items(self, of_class: str) -> list[str]:
        """The items of all lists in elements of a class."""
        return [text(item) for block in self.root.iter() if of_class in _classes(block) for item in block.iter("li")]

    def plots(self, section: str | None = None) -> dict[str, str]:
        """The text alternative of each plot by its title; of all sections, or of the one with this id."""
        found = {}
        inside = [each for each in self.all("section") if section in (None, each.get("aria-labelledby"))]
        for figure in (figure for each in inside for figure in each.iter("figure")):
            svg = figure.find("svg")
            assert svg is not None
            assert svg.get("role") == "img"
            found[text(figure.find("figcaption"))] = svg.get("aria-label", "")
        return found

    def headings(self) -> list[tuple[int, str]]:
        """(level, text), in order."""
        return [(int(each.tag[1]), text(each)) for each in self.root.iter() if each.tag in ("h1", "h2", "h3", "h4")]


def _classes(element: Element) -> list[str]:
    return element.get("class", "").split()


def text(element: Element | None) -> str:
    """All text of an element, with single spaces."""
    assert element is not None
    return " ".join("".join(element.itertext()).split())
