"""An event as a picture, drawn with Pillow: the heatmap, and below it the imbalance and entropy of each layer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from server.protocol.live import LiveEvent, RoutingShare
from server.terminal.http import ClientError
from server.terminal.screen import printable

if TYPE_CHECKING:
    from PIL.ImageDraw import ImageDraw
    from PIL.ImageFont import FreeTypeFont, ImageFont

_LEFT, _RIGHT, _TOP, _GAP, _STRIP = 86, 30, 58, 34, 64
_INK, _SOFT, _PAPER = (32, 36, 44), (110, 116, 128), (255, 255, 255)
_VIRIDIS = ((68, 1, 84), (59, 82, 139), (33, 145, 140), (94, 201, 98), (253, 231, 37))
"""Five of matplotlib's viridis, evenly spaced."""
_TWICE = 2.0
"""The share, over an even one, at the end of the scale."""

Colour = tuple[int, int, int]


def check_pillow() -> None:
    """Raises ClientError where pictures cannot be drawn."""
    try:
        import PIL  # noqa: F401
    except ImportError:
        raise ClientError("--png needs Pillow, which is not installed: pip install 'mixserve[png]'") from None


def write_picture(event: LiveEvent, path: Path, *, since_start: bool) -> None:
    """Write a PNG. The event must have routing. Raises ClientError."""
    from PIL import Image, ImageDraw, ImageFont

    assert event["routing"] is not None
    part = event["routing"]["total" if since_start else "window"]
    grid = Grid.of(part)
    image = Image.new("RGB", (grid.width, grid.height), _PAPER)
    sheet = Sheet(ImageDraw.Draw(image), ImageFont.load_default(13), grid)
    sheet.title(*_titles(event, part, since_start=since_start))
    sheet.heatmap(part["share"])
    sheet.strip(0, "imbalance", part["imbalance"], 1.0, max(_TWICE, *part["imbalance"]))
    sheet.strip(1, "entropy", part["entropy_share"], 0.0, 1.0)
    sheet.scale()
    try:
        image.save(path, "PNG")
    except OSError as error:
        raise ClientError(f"cannot write {path}: {error.strerror or error}") from None


def _titles(event: LiveEvent, part: RoutingShare, *, since_start: bool) -> tuple[str, str]:
    model = event["model"]
    span = "since the start" if since_start else f"in the latest {part['steps']:,} steps"
    return (
        f"{printable(model['id'])}: share of each layer's choices by expert",
        f"{model['num_layers']} layers, top-{model['num_experts_per_tok']} of {model['num_experts']} experts; "
        f"{part['tokens']:,} tokens {span}",
    )


@dataclass(frozen=True, slots=True)
class Grid:
    """Where things are, in pixels. Layers go to the right, experts down."""

    num_layers: int
    num_experts: int
    cell_width: int
    cell_height: int

    @classmethod
    def of(cls, part: RoutingShare) -> Grid:
        num_layers, num_experts = len(part["share"]), len(part["share"][0])
        return cls(num_layers, num_experts, max(4, min(32, 960 // num_layers)), max(4, min(28, 640 // num_experts)))

    @property
    def bottom(self) -> int:
        """Of the heatmap."""
        return _TOP + self.num_experts * self.cell_height

    @property
    def width(self) -> int:
        return max(480, _LEFT + self.num_layers * self.cell_width + _RIGHT)

    @property
    def height(self) -> int:
        return self.strip_top(2) + _GAP

    def strip_top(self, number: int) -> int:
        return self.bottom + _GAP + number * (_STRIP + _GAP // 2)

    def x(self, layer: int) -> int:
        return _LEFT + layer * self.cell_width


@dataclass(frozen=True, slots=True)
class Sheet:
    draw: ImageDraw
    font: FreeTypeFont | ImageFont
    grid: Grid

    def text(self, x: float, y: float, text: str, anchor: str = "lm", colour: Colour = _INK) -> None:
        """`anchor` as Pillow has it: l, m or r, then t, m or b."""
        self.draw.text((x, y), text, colour, self.font, anchor)

    def title(self, first: str, second: str) -> None:
        self.text(_LEFT, 16, first)
        self.text(_LEFT, 36, second, colour=_SOFT)

    def heatmap(self, share: Sequence[Sequence[float]]) -> None:
        grid = self.grid
        for layer, shares in enumerate(share):
            for expert, value in enumerate(shares):
                x, y = grid.x(layer), _TOP + expert * grid.cell_height
                box = (x, y, x + grid.cell_width - 2, y + grid.cell_height - 2)
                self.draw.rectangle(box, viridis(value * grid.num_experts / _TWICE))
        for expert in range(0, grid.num_experts, -(-14 // grid.cell_height)):
            self.text(_LEFT - 8, _TOP + (expert + 0.5) * grid.cell_height, f"expert {expert}", "rm", _SOFT)
        for layer in range(0, grid.num_layers, -(-22 // grid.cell_width)):
            self.text(grid.x(layer) + grid.cell_width / 2 - 1, grid.bottom + 10, str(layer), "mm", _SOFT)
        self.text(_LEFT - 8, grid.bottom + 10, "layer", "rm", _SOFT)

    def strip(self, number: int, name: str, values: Sequence[float], low: float, high: float) -> None:
        """A bar a layer, from `low` to `high`."""
        top = self.grid.strip_top(number)
        bottom = top + _STRIP
        for layer, value in enumerate(values):
            x = self.grid.x(layer)
            height = round(max(0.0, min(1.0, (value - low) / (high - low))) * _STRIP)
            self.draw.rectangle((x, bottom - height, x + self.grid.cell_width - 2, bottom), _VIRIDIS[1])
        self.text(_LEFT - 8, top + _STRIP / 2, name, "rm")
        self.text(_LEFT - 8, top + 4, f"{high:.3g}", "rm", _SOFT)
        self.text(_LEFT - 8, bottom - 3, f"{low:g}", "rm", _SOFT)

    def scale(self) -> None:
        y = self.grid.height - 18
        for step in range(100):
            self.draw.rectangle((_LEFT + step, y - 5, _LEFT + step, y + 5), viridis(step / 99))
        self.text(_LEFT + 108, y, "idle to twice an even share; entropy: share of the most there can be", colour=_SOFT)


def viridis(value: float) -> Colour:
    """The colour of `value`, from 0 to 1 and more."""
    place = min(1.0, value) * (len(_VIRIDIS) - 1)
    below = min(int(place), len(_VIRIDIS) - 2)
    weight = place - below
    red, green, blue = (
        round(a + (b - a) * weight) for a, b in zip(_VIRIDIS[below], _VIRIDIS[below + 1], strict=True)
    )  # fmt: skip
    return red, green, blue
