"""Writes plots as SVG. Series differ in shape and dash as well as in colour, so that prints without colour work too."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from html import escape

WIDTH, HEIGHT = 780, 400
_LEFT, _TOP, _BOTTOM, _LEGEND = 64, 16, 52, 246
# Okabe and Ito's palette: apart for colour-blind eyes, and of different greys.
BLACK = 4
"""The style of what sums the others up."""
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#000000", "#E69F00", "#56B4E9", "#7F7F7F")
DASHES = ("", "7 3", "2 3", "9 3 2 3", "12 4", "4 2", "1 2", "6 2 1 2 1 2")
_HATCHES = (
    "",
    "M0,8 L8,0",
    "M0,0 L8,8",
    "M0,4 L8,4",
    "M0,0 L8,8 M0,8 L8,0",
    "M4,0 L4,8",
    "M0,4 L8,4 M4,0 L4,8",
)
"""Strokes of a tile of 8 x 8."""


@dataclass(frozen=True, slots=True)
class Series:
    """Points (x, y), joined where `is_line`; `bounds`: (low, high) of each y. `marks`: draw a shape at each.

    One without a name stands in no legend; `style` makes it look like another.
    """

    name: str
    points: Sequence[tuple[float, float]]
    bounds: Sequence[tuple[float, float]] = ()
    is_line: bool = True
    marks: bool = True
    style: int | None = None


@dataclass(frozen=True, slots=True)
class Axis:
    """`label` says the unit. `low`, `high`: None for what the data needs. `log2`: doublings are equal steps."""

    label: str
    low: float | None = None
    high: float | None = None
    log2: bool = False
    whole: bool = False


@dataclass(frozen=True, slots=True)
class Lines:
    """A plot of series over two axes. `levels`: horizontal lines with a name."""

    x: Axis
    y: Axis
    series: Sequence[Series]
    levels: Sequence[tuple[float, str]] = field(default=())

    def svg(self, label: str) -> str:
        xs = [x for s in self.series for x, _ in s.points]
        ys = [y for s in self.series for _, y in s.points] + [level for level, _ in self.levels]
        ys += [bound for s in self.series for pair in s.bounds for bound in pair]
        across = _Scale(self.x, xs, _LEFT, WIDTH - _LEGEND)
        up = _Scale(self.y, ys, HEIGHT - _BOTTOM, _TOP)
        parts = _frame(across, up)
        for value, name in self.levels:
            at = up(value)
            parts.append(_line(_LEFT, at, WIDTH - _LEGEND, at, "#000", "2 2"))
            parts.append(_text(WIDTH - _LEGEND - 4, at - 5, name, "end", size=12))
        keys = 0
        for number, series in enumerate(self.series):
            style = number if series.style is None else series.style
            parts += _drawn(series, style, across, up)
            if series.name:
                parts += _key(series, style, keys)
                keys += 1
        return _picture(parts, label)


@dataclass(frozen=True, slots=True)
class Bar:
    """A bar of a height, with its interval where it has one."""

    name: str
    value: float
    low: float | None = None
    high: float | None = None


@dataclass(frozen=True, slots=True)
class Bars:
    """Bars from zero, each hatched in a way of its own, with its value above it."""

    y: Axis
    bars: Sequence[Bar]

    def svg(self, label: str) -> str:
        highest = max(bar.high or bar.value for bar in self.bars)
        up = _Scale(Axis(self.y.label, 0.0, highest * 1.08), [0.0], HEIGHT - _BOTTOM, _TOP)
        parts = [_hatches(), *_frame(None, up, right=WIDTH - 16)]
        step = (WIDTH - 16 - _LEFT) / len(self.bars)
        for number, bar in enumerate(self.bars):
            x, width, top = _LEFT + step * (number + 0.18), step * 0.64, up(bar.value)
            box = f'x="{x:.1f}" y="{top:.1f}" width="{width:.1f}" height="{HEIGHT - _BOTTOM - top:.1f}"'
            colour = COLOURS[number % len(COLOURS)]
            parts.append(f'<rect {box} fill="{colour}" fill-opacity="0.35" stroke="{colour}"/>')
            parts.append(f'<rect {box} fill="url(#hatch{number % len(_HATCHES)})" stroke="#000"/>')
            middle, above = x + width / 2, top
            if bar.low is not None and bar.high is not None:
                parts += _error(middle, up(bar.low), up(bar.high))
                above = up(bar.high)
            parts.append(_text(middle, above - 6, f"{bar.value:.2f}", "middle", bold=True))
            for line, word in enumerate(_wrapped(bar.name, int(step / 7))):
                parts.append(_text(middle, HEIGHT - _BOTTOM + 18 + 14 * line, word, "middle", size=12))
        return _picture(parts, label)


class _Scale:
    """From values to places."""

    def __init__(self, axis: Axis, values: Sequence[float], first: float, last: float) -> None:
        self.axis, self.first, self.last = axis, first, last
        low = min(values) if axis.low is None else axis.low
        high = max(values) if axis.high is None else axis.high
        if axis.log2:
            low, high = math.log2(low), math.log2(high)
        if high <= low:
            high = low + 1.0
        if axis.low is None:
            low -= 0.04 * (high - low)
        if axis.high is None:
            high += 0.06 * (high - low)
        self.low, self.high = low, high

    def __call__(self, value: float) -> float:
        place = math.log2(value) if self.axis.log2 else value
        return self.first + (self.last - self.first) * (place - self.low) / (self.high - self.low)

    def ticks(self) -> list[tuple[float, str]]:
        if self.axis.log2:
            powers = range(math.ceil(self.low - 1e-9), math.floor(self.high + 1e-9) + 1)
            return [(2.0**n, f"{2**n:,}" if n >= 0 else f"{2.0**n:g}") for n in powers]
        rough = (self.high - self.low) / 6
        power = 10.0 ** math.floor(math.log10(rough))
        step = next(power * n for n in (1, 2, 2.5, 5, 10) if power * n >= rough)
        if self.axis.whole:
            step = max(1.0, round(step))
        first = math.ceil(self.low / step - 1e-9)
        return [(n * step, f"{n * step:.6g}") for n in range(first, math.floor(self.high / step + 1e-9) + 1)]


def _frame(across: _Scale | None, up: _Scale, right: float = WIDTH - _LEGEND) -> list[str]:
    bottom = HEIGHT - _BOTTOM
    parts = []
    for value, name in up.ticks():
        parts.append(_line(_LEFT, up(value), right, up(value), "#ddd"))
        parts.append(_text(_LEFT - 8, up(value) + 4, name, "end"))
    if across is not None:
        for value, name in across.ticks():
            parts.append(_line(across(value), bottom, across(value), bottom + 5, "#000"))
            parts.append(_text(across(value), bottom + 20, name, "middle"))
        parts.append(_text((_LEFT + right) / 2, HEIGHT - 8, across.axis.label, "middle"))
    parts.append(_line(_LEFT, bottom, right, bottom, "#000"))
    parts.append(_line(_LEFT, _TOP, _LEFT, bottom, "#000"))
    middle = (_TOP + bottom) / 2
    turned = f'transform="rotate(-90 16 {middle:.1f})"'
    parts.append(_text(16, middle, up.axis.label, "middle", more=turned))
    return parts


def _drawn(series: Series, style: int, across: _Scale, up: _Scale) -> list[str]:
    colour, dash = COLOURS[style % len(COLOURS)], DASHES[style % len(DASHES)]
    places = [(across(x), up(y)) for x, y in series.points]
    parts = []
    if series.is_line and len(places) > 1:
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in places)
        parts.append(
            f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="2" '
            f'stroke-dasharray="{dash}"/>'
        )
    for (x, _), (low, high) in zip(places, series.bounds, strict=False):
        parts += _error(x, up(low), up(high), colour)
    return parts + ([_mark(x, y, style) for x, y in places] if series.marks else [])


def _key(series: Series, style: int, number: int) -> list[str]:
    x, y = WIDTH - _LEGEND + 14, _TOP + 14 + 22 * number
    parts = []
    if series.is_line:
        colour, dash = COLOURS[style % len(COLOURS)], DASHES[style % len(DASHES)]
        parts.append(_line(x, y, x + 30, y, colour, dash, width=2))
    if series.marks:
        parts.append(_mark(x + 15, y, style))
    return [*parts, _text(x + 38, y + 4, series.name, "start", size=12)]


def _mark(x: float, y: float, style: int) -> str:
    """A shape of its own for each style, filled with white or colour in turn."""
    colour = COLOURS[style % len(COLOURS)]
    paint = f'fill="{colour if style % 2 == 0 else "#fff"}" stroke="{colour}" stroke-width="1.8"'
    shapes = (
        lambda: f'<circle cx="{x:.1f}" cy="{y:.1f}" r="4.2" {paint}/>',
        lambda: f'<rect x="{x - 4:.1f}" y="{y - 4:.1f}" width="8" height="8" {paint}/>',
        lambda: _polygon(((x, y - 5.5), (x + 5, y + 4), (x - 5, y + 4)), paint),
        lambda: _polygon(((x, y - 5.5), (x + 5.5, y), (x, y + 5.5), (x - 5.5, y)), paint),
        lambda: _polygon(((x, y + 5.5), (x + 5, y - 4), (x - 5, y - 4)), paint),
        lambda: _strokes(((x - 4, y - 4, x + 4, y + 4), (x - 4, y + 4, x + 4, y - 4)), colour),
        lambda: _strokes(((x - 5, y, x + 5, y), (x, y - 5, x, y + 5)), colour),
        lambda: _polygon(((x - 6, y - 2.5), (x + 6, y - 2.5), (x + 6, y + 2.5), (x - 6, y + 2.5)), paint),
    )
    return shapes[style % len(shapes)]()


def _polygon(points: Sequence[tuple[float, float]], paint: str) -> str:
    return f'<polygon points="{" ".join(f"{x:.1f},{y:.1f}" for x, y in points)}" {paint}/>'


def _strokes(lines: Sequence[tuple[float, float, float, float]], colour: str) -> str:
    return "".join(_line(*line, colour, width=2.2) for line in lines)


def _error(x: float, low: float, high: float, colour: str = "#000") -> list[str]:
    ends = [_line(x - 4, y, x + 4, y, colour) for y in (low, high)]
    return [_line(x, low, x, high, colour), *ends]


def _line(
    x: float, y: float, to_x: float, to_y: float, colour: str, dash: str = "", width: float = 1.0
) -> str:
    ends = f'x1="{x:.1f}" y1="{y:.1f}" x2="{to_x:.1f}" y2="{to_y:.1f}"'
    return f'<line {ends} stroke="{colour}" stroke-width="{width}" stroke-dasharray="{dash}"/>'


def _text(
    x: float, y: float, text: str, anchor: str, *, size: int = 13, bold: bool = False, more: str = ""
) -> str:
    weight = ' font-weight="600"' if bold else ""
    return (
        f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" font-size="{size}"{weight} {more}>'
        f"{escape(text)}</text>"
    )


def _hatches() -> str:
    return "<defs>" + "".join(
        f'<pattern id="hatch{number}" width="8" height="8" patternUnits="userSpaceOnUse">'
        f'<path d="{line}" stroke="#000" stroke-width="0.8"/></pattern>'
        for number, line in enumerate(_HATCHES)
    ) + "</defs>"  # fmt: skip


def _wrapped(name: str, width: int) -> list[str]:
    lines: list[str] = []
    for word in name.replace(":", ": ").split():
        if lines and len(lines[-1]) + len(word) < width:
            lines[-1] += f" {word}"
        else:
            lines.append(word)
    return lines


def _picture(parts: Sequence[str], label: str) -> str:
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" width="{WIDTH}" '
        f'height="{HEIGHT}" role="img" aria-label="{escape(label, quote=True)}" '
        f'font-family="system-ui, sans-serif" fill="#111">'
        f'<rect width="{WIDTH}" height="{HEIGHT}" fill="#fff"/>{"".join(parts)}</svg>'
    )
