"""An event as lines of text: a heatmap of layers and experts in block characters, and figures.

Experts are lines and layers columns, so that 32 layers of 8 experts fit a terminal of 80 x 24.
"""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from dataclasses import dataclass

from server.protocol.live import LiveEvent, Percentiles, RoutingShare
from server.terminal.screen import printable

_LABEL = 10
"""Columns in front of the layers."""
_FIGURE_LINES = 13
"""Lines beside those of the experts."""
_SHADES = " ░▒▓█"
_BARS = "▁▂▃▄▅▆▇█"
_COLOURS = (17, 18, 24, 30, 36, 71, 113, 185, 226)
"""Of xterm's 256: from dark blue over green to yellow."""
_RED, _DIM, _NORMAL = "\x1b[31m", "\x1b[2m", "\x1b[0m"
_TWICE = 2.0
"""The share, over an even one, that has the strongest colour."""


@dataclass(frozen=True, slots=True)
class Canvas:
    """How much room there is, in characters, and whether it takes colours."""

    width: int
    height: int
    colour: bool


def lines(event: LiveEvent, canvas: Canvas, *, since_start: bool) -> list[str]:
    """As wide and high as the canvas at most, unless it is tiny. `since_start`: not of the latest steps but of all."""
    shown = [_cut(_title(event, since_start), canvas)]
    if event["health"]["message"] is not None:
        shown.append(_painted(_cut(event["health"]["message"], canvas), _RED, canvas))
    routing = event["routing"]
    if routing is None:
        shown.append(_cut("waiting for the engine to tell of its routing", canvas))
    else:
        part = routing["total" if since_start else "window"]
        shown += _heatmap(part, canvas)
        shown += _wrapped(_balance(part), canvas)
    return shown + _wrapped(_figures(event), canvas)


def _title(event: LiveEvent, since_start: bool) -> str:
    model = event["model"]
    title = f"{model['id']}: {model['num_layers']} layers, top-{model['num_experts_per_tok']} of {model['num_experts']}"
    if (routing := event["routing"]) is None:
        return title
    part = routing["total" if since_start else "window"]
    steps = "since the start" if since_start else f"in the latest {part['steps']:,} steps"
    return f"{title}; {part['tokens']:,} tokens {steps}"


def _heatmap(part: RoutingShare, canvas: Canvas) -> list[str]:
    num_layers, num_experts = len(part["share"]), len(part["share"][0])
    cell = 2 if _LABEL + 2 * num_layers < canvas.width else 1
    columns = max(1, min(num_layers, (canvas.width - 1 - _LABEL) // cell))
    rows = max(1, min(num_experts, canvas.height - _FIGURE_LINES))
    shown = [_cut(f"{'layer':<{_LABEL}}{_axis(columns, cell)}", canvas)]
    for expert in range(rows):
        ratios = [part["share"][layer][expert] * num_experts for layer in range(columns)]
        shown.append(f"{f'expert {expert}':<{_LABEL}}" + _cells(ratios, cell, canvas))
    for label, bars in (
        ("imbalance", _bars(part["imbalance"], 1.0, max(_TWICE, *part["imbalance"]))),
        ("entropy", _bars(part["entropy_share"], 0.0, 1.0)),
    ):
        shown.append(f"{label:<{_LABEL}}" + "".join(bar * cell for bar in bars[:columns]))
    shown.append(_painted(_cut(_legend(num_layers - columns, num_experts - rows, canvas), canvas), _DIM, canvas))
    return shown


def _axis(columns: int, cell: int) -> str:
    """The numbers of every few layers, each at its column."""
    step = next(step for step in (1, 2, 5, 10, 20, 50, 100, columns) if step * cell > len(str(columns - 1)))
    return "".join(f"{layer:<{step * cell}}" for layer in range(0, columns, step))[: columns * cell]


def _cells(ratios: Sequence[float], cell: int, canvas: Canvas) -> str:
    """`ratios` of shares to an even share."""
    if not canvas.colour:
        return "".join(_SHADES[_level(ratio, len(_SHADES))] * cell for ratio in ratios)
    return (
        "".join(f"\x1b[48;5;{_COLOURS[_level(ratio, len(_COLOURS))]}m{' ' * cell}" for ratio in ratios) + _NORMAL
    )  # fmt: skip


def _level(ratio: float, num_levels: int) -> int:
    """0 for nothing to `num_levels` - 1 for _TWICE an even share and more."""
    return min(num_levels - 1, int(ratio / _TWICE * (num_levels - 1) + 0.5))


def _bars(values: Sequence[float], low: float, high: float) -> list[str]:
    top = len(_BARS) - 1
    return [_BARS[min(top, max(0, int((value - low) / (high - low) * top + 0.5)))] for value in values]


def _legend(hidden_layers: int, hidden_experts: int, canvas: Canvas) -> str:
    scale = "dark: idle, green: even, yellow: twice an even share" if canvas.colour else "▒ even, █ twice an even share"
    parts = ((hidden_layers, "layers"), (hidden_experts, "experts"))
    hidden = " and ".join(f"{number} more {name}" for number, name in parts if number)
    return f"{hidden} in a larger terminal; {scale}" if hidden else scale


def _balance(part: RoutingShare) -> list[str]:
    if not part["tokens"]:
        return ["no tokens yet"]
    imbalance, entropy, drops = part["imbalance"], part["entropy_share"], part["drop_share"]
    worst, surest = imbalance.index(max(imbalance)), entropy.index(min(entropy))
    shown = [
        f"imbalance {_mean(imbalance):.2f} in the mean, most {imbalance[worst]:.2f} in layer {worst}; 1 is even",
        f"entropy   {_mean(entropy):.0%} of the most there can be, least {entropy[surest]:.0%} in layer {surest}",
    ]
    if any(drops):
        most = drops.index(max(drops))
        shown.append(f"dropped   {_mean(drops):.1%} of all choices, most {drops[most]:.1%} in layer {most}")
    return shown


def _figures(event: LiveEvent) -> list[str]:
    engine, throughput, latency, memory = event["engine"], event["throughput"], event["latency"], event["memory"]
    rate = engine["prefix_cache_hit_rate"]
    used = sum(memory["weights"].values()) + memory["kv_cache"] + memory["activations"]
    return [
        f"requests  {engine['num_running']} running, {engine['num_waiting']} waiting, "
        f"{engine['num_preemptions']} preempted since the start",
        f"KV cache  {engine['kv_cache_usage']:.0%} in use; prefix cache "
        + ("not asked yet" if rate is None else f"{rate:.0%} hits"),
        "tokens/s  "
        + (
            "-"
            if throughput is None
            else f"{throughput['prompt_tokens_per_second']:,.1f} read, "
            f"{throughput['output_tokens_per_second']:,.1f} generated"
        ),
        f"latency   first token {_times(latency['time_to_first_token'])}, then "
        f"{_times(latency['inter_token'])} (p50/p90/p99)",
        f"memory    weights {_size(sum(memory['weights'].values()))}, KV cache {_size(memory['kv_cache'])}, "
        f"in all {_size(used)} of {_size(memory['total'])}",
    ]


def _times(times: Percentiles | None) -> str:
    if times is None:
        return "-"
    found = [1000 * seconds for seconds in (times["p50"], times["p90"], times["p99"])]
    return "/".join(f"{number:.0f}" if number >= 100 else f"{number:.3g}" for number in found) + " ms"


def _size(num_bytes: int) -> str:
    return f"{num_bytes / 1e9:.2f} GB"


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def _cut(text: str, canvas: Canvas) -> str:
    return printable(text).replace("\n", " ")[: canvas.width - 1]


def _wrapped(figures: Sequence[str], canvas: Canvas) -> list[str]:
    width = max(_LABEL + 8, canvas.width - 1)
    return [part for figure in figures for part in textwrap.wrap(figure, width, subsequent_indent=" " * _LABEL)]


def _painted(text: str, code: str, canvas: Canvas) -> str:
    return f"{code}{text}{_NORMAL}" if canvas.colour else text
