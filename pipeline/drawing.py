"""Drawings that lie in a page and take their colours from it.

matplotlib draws, and its global state is as before afterwards. The idea is that one drawing serves
the light and the dark page: each colour is a placeholder that becomes a CSS variable, the ground is
transparent, and text stays text, in the page's font. Ids get the plot's name in front, so that many
drawings can share a page.
"""

import io
import re
from collections.abc import Sequence
from itertools import pairwise
from typing import Final
from xml.etree import ElementTree as ET

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.transforms import Bbox

Point = tuple[float, float]

INK, MUTED, LINE = "#000001", "#000002", "#000003"
ACCENT, SECOND, GOOD, BAD = "#000004", "#000005", "#000006", "#000007"
VARIABLES: Final = {
    INK: "--ink",
    MUTED: "--muted",
    LINE: "--line",
    ACCENT: "--accent",
    SECOND: "--second",
    GOOD: "--pass",
    BAD: "--fail",
}
"""Placeholder colour -> CSS variable of the page."""

WIDTH: Final = 4.6
"""Inches; 331 units of the drawing, about a phone's width, so that 9 units are legible there."""
LOOK: Final = {
    "svg.fonttype": "none",
    "svg.hashsalt": "secateur",  # the same ids in every run
    "text.parse_math": False,  # a stage may be called $x$
    "font.sans-serif": ["DejaVu Sans"],  # it comes with matplotlib, and is wider than the page's
    "font.size": 9.5,
    "text.color": INK,
    "axes.edgecolor": LINE,
    "axes.labelcolor": MUTED,
    "axes.labelsize": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "grid.color": LINE,
    "grid.linewidth": 0.6,
    "xtick.color": LINE,
    "ytick.color": LINE,
    "xtick.labelcolor": MUTED,
    "ytick.labelcolor": MUTED,
    "xtick.labelsize": 9,
    "ytick.labelsize": 9,
}
SERIES: Final = ((ACCENT, "o"), (SECOND, "s"), (INK, "D"), (MUTED, "^"))
"""Colour and marker of each series; the marker tells them apart without colour."""


def canvas(height: float) -> tuple[Figure, Axes]:
    """Return a figure as wide as a phone and `height` inches high, and its axes."""
    figure = Figure(figsize=(WIDTH, height), dpi=72, layout="constrained")
    return figure, figure.add_subplot()


def name_rows(axes: Axes, labels: Sequence[str]) -> None:
    """Write a label before each row, the first one on top."""
    axes.set_ylim(len(labels) - 0.5, -0.5)
    axes.set_yticks(range(len(labels)), [short(label) for label in labels], color=INK)
    axes.tick_params(length=0)


def label_points(
    figure: Figure, axes: Axes, labels: Sequence[str], points: Sequence[Point]
) -> None:
    """Write each label near its point, where it covers no other label or point.

    Of such places the one is best that covers least of the line that joins the points. A label that
    had to go far gets a thin line to its point.
    """
    figure.draw_without_rendering()  # lays out, so that pixels are known
    frame, pixels = axes.get_window_extent(), axes.transData.transform(points)
    taken = [_box(pixel, 9, 9) for pixel in pixels]
    joined = [
        _box(start + (end - start) * step / 20, 2, 2)
        for start, end in pairwise(pixels)
        for step in range(21)
    ]

    def cost(box: Bbox) -> int:
        inside = (
            frame.x0 <= box.x0 and box.x1 <= frame.x1 and frame.y0 <= box.y0 and box.y1 <= frame.y1
        )
        return 100 * box.count_overlaps(taken) + 50 * (not inside) + box.count_overlaps(joined)

    for label, point, (x, y) in zip(labels, points, pixels, strict=True):
        text = axes.annotate(short(label), point, fontsize=9, ha="center", va="center")
        extent = text.get_window_extent()
        places = [
            (
                right * (extent.width / 2 + 7 * far),
                up * (extent.height / 2 + 7 * far),
                far,
            )
            for far in (1, 2, 4, 6)
            for right, up in (
                (1, 0),
                (-1, 0),
                (0, 1),
                (0, -1),
                (1, 1),
                (-1, 1),
                (1, -1),
                (-1, -1),
            )
        ]
        boxes = [_box((x + dx, y + dy), extent.width, extent.height) for dx, dy, _ in places]
        best = min(range(len(boxes)), key=lambda place: cost(boxes[place]))
        taken.append(boxes[best])
        dx, dy, far = places[best]
        place = tuple(axes.transData.inverted().transform((x + dx, y + dy)))
        text.set_position(place)
        if far > 1:
            line = {"arrowstyle": "-", "color": MUTED, "linewidth": 0.6, "shrinkB": 4}
            axes.annotate("", point, place, arrowprops=line)


def _box(centre: Sequence[float], width: float, height: float) -> Bbox:
    x, y = centre
    return Bbox.from_bounds(x - width / 2, y - height / 2, width, height)


def short(text: str, longest: int = 14) -> str:
    """Return a text that fits, in the characters that the drawing's font is sure to have."""
    plain = "".join(c if c.isascii() and c.isprintable() else "?" for c in text)
    return plain if len(plain) <= longest else plain[: longest - 2] + ".."


def inline(figure: Figure, name: str, alt: str) -> ET.Element:
    """Return the figure as an element for the page, described by `alt`."""
    file = io.StringIO()
    figure.savefig(file, format="svg", transparent=True, metadata={"Date": None})
    text = file.getvalue()
    for colour, variable in VARIABLES.items():
        text = text.replace(colour, f"var({variable})")
    text = re.sub(r'(\bid="|href="#|url\(#)', rf"\g<1>{name}-", text)
    svg = ET.fromstring(text)  # noqa: S314 - our own drawing
    for element in svg.iter():
        element.tag = element.tag.rpartition("}")[2]
        for key in [key for key in element.attrib if "}" in key]:  # xlink:href
            element.set(key.rpartition("}")[2], element.attrib.pop(key))
        for child in [child for child in element if child.tag.endswith(("}metadata", "}style"))]:
            element.remove(child)
    svg.attrib = {"viewBox": svg.attrib["viewBox"], "role": "img", "aria-label": alt}
    return svg
