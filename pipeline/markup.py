"""HTML as a tree of elements, so that nothing that stands in a report can become markup."""

from collections.abc import Iterable
from typing import Final
from xml.etree import ElementTree as ET

Node = ET.Element | str

UNMEASURED: Final = "not measured"


def tag(name: str, /, *content: Node, **attributes: str) -> ET.Element:
    """Return an element; `class_` stands for class, `aria_label` for aria-label."""
    names = {key: key.rstrip("_").replace("_", "-") for key in attributes}
    element = ET.Element(name, {names[key]: value for key, value in attributes.items()})
    for node in content:
        if isinstance(node, ET.Element):
            element.append(node)
        elif len(element):
            element[-1].tail = (element[-1].tail or "") + node
        else:
            element.text = (element.text or "") + node
    return element


def section(title: str, *content: Node) -> ET.Element:
    """Return a titled part of the page."""
    return tag("section", tag("h2", title), *content)


def number(value: float | None, pattern: str = "{:g}", missing: str = UNMEASURED) -> Node:
    """Return a number as text, or a dash that says why there is none."""
    if value is None:
        return tag("span", "\u2013", class_="null", title=missing)
    return pattern.format(value)


def table_head(titles: Iterable[str]) -> ET.Element:
    """Return the head of a table."""
    return tag("thead", tag("tr", *(tag("th", title, scope="col") for title in titles)))


def figure(title: str, caption: str, content: ET.Element) -> ET.Element:
    """Return something to look at, with its title above."""
    return tag("figure", tag("figcaption", tag("b", title), " ", caption), content)
