"""Labels that do not collide: each goes to the free place nearest to its point, or nowhere."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

EM = 12.5  # the font's size in the plot's own units
RADII = (9.0, 16.0, 26.0, 40.0, 58.0, 80.0)
ANGLES = (0, 180, 270, 90, 315, 225, 45, 135, 340, 200, 20, 160, 290, 250, 70, 110)
LONGEST = 30  # characters of a label
_MARK = 5.0  # half the side of the square that a point's mark keeps free


@dataclass(frozen=True, slots=True)
class Box:
    """A rectangle, y downwards."""

    left: float
    top: float
    right: float
    bottom: float

    def meets(self, other: Box) -> bool:
        """Return whether the two have a point inside both."""
        return (
            self.left < other.right and other.left < self.right and self.top < other.bottom and other.top < self.bottom
        )

    def holds(self, other: Box) -> bool:
        """Return whether the other lies within this one."""
        return (
            self.left <= other.left
            and other.right <= self.right
            and self.top <= other.top
            and other.bottom <= self.bottom
        )


@dataclass(frozen=True, slots=True)
class Placed:
    """A label's box and whether it is so far from its point that a line must lead to it."""

    box: Box
    led: bool


def text_width(text: str, size: float = EM) -> float:
    """Return about how wide a sans-serif text is, rather too much than too little."""
    return size * sum(1.05 if ord(character) > 0x2E7F else 0.62 for character in text)


def shorten(text: str) -> str:
    """Return a text of at most 30 characters; the middle goes, for labels differ at their ends."""
    return text if len(text) <= LONGEST else f"{text[: LONGEST // 2 - 1]}…{text[-LONGEST // 2 :]}"


def place_labels(
    points: Sequence[tuple[float, float]], labels: Sequence[str], within: Box, lines: Sequence[Box] = ()
) -> list[Placed | None]:
    """Return a place for each label, None where there is none left: no label meets another, a point's mark, or the edge.

    Places that meet none of `lines` are taken first. The most crowded points choose first.
    """
    marks = [Box(x - _MARK, y - _MARK, x + _MARK, y + _MARK) for x, y in points]
    found: list[Placed | None] = [None] * len(points)
    taken = list(marks)
    for index in sorted(range(len(points)), key=lambda i: _room(points, i)):
        others = [other for other in taken if other is not marks[index]]
        places = list(_places(points[index], text_width(labels[index])))
        for radius, box in (*((r, b) for r, b in places if not any(b.meets(line) for line in lines)), *places):
            if within.holds(box) and not any(box.meets(other) for other in others):
                found[index] = Placed(box, led=radius > RADII[1])
                taken.append(box)
                break
    return found


def _room(points: Sequence[tuple[float, float]], index: int) -> float:
    """Return the distance to the nearest other point."""
    return min((math.dist(points[index], other) for i, other in enumerate(points) if i != index), default=math.inf)


def _places(point: tuple[float, float], width: float) -> Iterator[tuple[float, Box]]:
    height = 1.25 * EM
    for radius in RADII:
        for angle in ANGLES:
            turn = math.radians(angle)
            x, y = point[0] + radius * math.cos(turn), point[1] + radius * math.sin(turn)
            # The side of the box that faces the point touches the circle around it.
            left = x - width * (1 - math.cos(turn)) / 2
            top = y - height * (1 - math.sin(turn)) / 2
            yield radius, Box(left, top, left + width, top + height)
