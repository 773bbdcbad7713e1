"""Names beside points that overlap neither each other nor the points."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from markupsafe import Markup

from graft.report.svg import line, text, text_width

Box = tuple[float, float, float, float]
"""Left, top, right, bottom."""

SIZE = 12.5
_AROUND = (
    (1, 0, "start"),
    (-1, 0, "end"),
    (0, -1, "middle"),
    (0, 1.25, "middle"),
    (0.8, -0.8, "start"),
    (-0.8, -0.8, "end"),
    (0.8, 1.0, "start"),
    (-0.8, 1.0, "end"),
)


@dataclass(frozen=True)
class Label:
    """Words and where they stand: the point of their anchor and the box they fill."""

    words: str
    x: float
    y: float
    anchor: str
    box: Box

    def draw(self, x: float, y: float) -> Markup:
        """The words, and a thin line to their point at x, y where they had to go some way off."""
        near_x, near_y = min(max(x, self.box[0]), self.box[2]), min(max(y, self.box[1]), self.box[3])
        far = ((near_x - x) ** 2 + (near_y - y) ** 2) ** 0.5
        leader = line(x, y, near_x, near_y, class_="leader") if far > 14 else Markup("")
        return leader + text(self.x, self.y, self.words, text_anchor=self.anchor, class_="label")


def place(words: str, x: float, y: float, taken: Sequence[Box], frame: Box) -> Label | None:
    """The nearest place for the words of the point x, y that overlaps nothing: around it, then further and further off.

    None where there is no such place: a name is left out rather than written over another.
    """
    for away in (1.0, 1.6, 2.4):
        for dx, dy, anchor in _AROUND:
            label = _label(words, x + dx * away * 10, y + 4 + dy * away * 13, anchor)
            if _inside(label.box, frame) and not any(_overlap(label.box, other) for other in taken):
                return label
    return None


def dot_box(x: float, y: float, radius: float) -> Box:
    """The box of a dot."""
    return (x - radius, y - radius, x + radius, y + radius)


def _label(words: str, x: float, y: float, anchor: str) -> Label:
    width = text_width(words, SIZE)
    left = x if anchor == "start" else x - width if anchor == "end" else x - width / 2
    return Label(words, x, y, anchor, (left - 2, y - 12, left + width + 2, y + 4))


def _overlap(a: Box, b: Box) -> float:
    wide, tall = min(a[2], b[2]) - max(a[0], b[0]), min(a[3], b[3]) - max(a[1], b[1])
    return wide * tall if wide > 0 and tall > 0 else 0.0


def _inside(box: Box, frame: Box) -> bool:
    return frame[0] <= box[0] and frame[1] <= box[1] and box[2] <= frame[2] and box[3] <= frame[3]
