"""The figures of `bench serve` as one HTML file that needs nothing else: no network, no scripts, no fonts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from html import escape

from server.bench.chart import Line, Point, line_chart
from server.bench.metrics import METRICS, RunResult, Spread
from server.bench.results import Measured

_TITLES = {
    "ttft": "Time to first token",
    "tpot": "Time per output token",
    "itl": "Inter-token latency",
    "e2el": "End-to-end latency",
}
_CURVES = ("e2el", "ttft", "tpot")
_STYLE = """
:root { color-scheme: light dark; --page: #fff; --text: #1c1e21; --soft: #5c636d; --line: #e3e6ea; --panel: #f7f8fa;
  --one: #1d5fd1; --two: #c2410c; }
@media (prefers-color-scheme: dark) { :root { --page: #15171b; --text: #e7e9ec; --soft: #9ca4af; --line: #2c3138;
  --panel: #1c1f25; --one: #74a9ff; --two: #ff9a4d; } }
body { margin: 0 auto; padding: 2rem 1.25rem 4rem; max-width: 80rem; background: var(--page); color: var(--text);
  font: 15px/1.5 system-ui, sans-serif; }
h1 { font-size: 1.5rem; margin: 0; } h2 { font-size: 1.05rem; margin: 2rem 0 .25rem; }
figure h2 { margin-top: 0; }
p { margin: .25rem 0; color: var(--soft); }
.charts { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(26rem, 100%), 1fr)); gap: 1.25rem;
  margin: 1.5rem 0; }
figure { margin: 0; padding: 1rem; background: var(--panel); border: 1px solid var(--line); border-radius: 8px; }
svg { display: block; width: 100%; height: auto; }
.grid { stroke: var(--line); } .tick, .axis, .label { fill: var(--soft); font-size: 12px; }
.label { fill: var(--text); font-weight: 600; }
.line { fill: none; stroke-width: 2; } .line.one { stroke: var(--one); }
.line.two { stroke: var(--two); stroke-dasharray: 6 4; }
.dot { stroke: var(--panel); stroke-width: 1.5; } .dot.one { fill: var(--one); } .dot.two { fill: var(--two); }
.key { font-size: .85rem; } .key b { font-weight: 600; }
.key .one { color: var(--one); } .key .two { color: var(--two); }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: .9rem; white-space: nowrap; }
th, td { padding: .35rem .8rem; text-align: right; border-bottom: 1px solid var(--line); }
th { color: var(--soft); font-weight: 600; } th:first-child, td:first-child { text-align: left; }
"""


def html_report(measured: Measured) -> str:
    """The whole page: throughput-latency curves, memory over time, and every figure in tables."""
    runs = measured.runs
    charts = [_curve(runs, metric) for metric in _CURVES if any(run.spreads[metric] for run in runs)]
    if measured.memory:
        charts.append(_memory(measured))
    title = f"{measured.model}: throughput and latency"
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8"/>
<meta name="viewport" content="width=device-width, initial-scale=1"/>
<title>{escape(title)}</title>
<style>{_STYLE}</style>
</head>
<body>
<h1>{escape(title)}</h1>
<p>{escape(_setting(measured))}</p>
<p>{measured.date:%Y-%m-%d %H:%M} UTC, by mixserve bench serve</p>
<div class="charts">
{"".join(charts)}
</div>
<h2>Throughput</h2>
{_table(_THROUGHPUT, [[cell(run) for _, cell in _THROUGHPUT_CELLS] for run in runs])}
{"".join(_latencies(runs, metric) for metric in METRICS)}
{_errors(runs)}
</body>
</html>
"""


def _setting(measured: Measured) -> str:
    options, lengths = measured.options, measured.options.lengths
    work = f"{options.dataset} prompts, "
    if isinstance(options.dataset, str):
        prefix = f"{lengths.prefix_len} shared and " if lengths.prefix_len else ""
        work += f"{prefix}{lengths.input_len} input tokens, "
    work += f"{lengths.output_len} output tokens"
    if lengths.range_ratio:
        work += f", both ±{lengths.range_ratio:.0%}"
    server = options.base_url.partition("://")[2]
    return f"{server}, {options.endpoint}; {work}; seed {options.seed}"


def _curve(runs: Sequence[RunResult], metric: str) -> str:
    def line(name: str, style: str, *, labelled: bool) -> Line:
        points = [
            Point(
                x=run.output_throughput,
                y=getattr(spread, name),
                label=_streams(run) if labelled else "",
                tip=f"{_streams(run)} at once: {run.output_throughput:.1f} tokens/s, {getattr(spread, name):.1f} ms",
            )
            for run in runs
            if (spread := run.spreads[metric]) is not None
        ]
        return Line(name, style, points)

    title = f"{_TITLES[metric]} over throughput"
    chart = line_chart(
        [line("p99", "two", labelled=False), line("median", "one", labelled=True)],
        title=title,
        x_title="output tokens/s",
        y_title="milliseconds",
    )
    key = '<b class="one">median</b>, <b class="two">99th percentile</b>; the numbers are requests at once'
    return _figure(title, key, chart)


def _memory(measured: Measured) -> str:
    points = [Point(sample.seconds, sample.num_bytes / 1e9) for sample in measured.memory]
    line = Line("memory", "one", points, marked=False)
    chart = line_chart([line], title="Memory of the server", x_title="seconds", y_title="GB")
    peak = max(point.y for point in points)
    return _figure("Memory of the server", f'<b class="one">all its processes</b>; at most {peak:.2f} GB', chart)


def _figure(title: str, key: str, chart: str) -> str:
    return f'<figure>\n<h2>{escape(title)}</h2>\n<p class="key">{key}</p>\n{chart}\n</figure>\n'


_THROUGHPUT_CELLS: tuple[tuple[str, Callable[[RunResult], str]], ...] = (
    ("requests at once", lambda run: _streams(run)),
    ("arrivals/s", lambda run: "-" if run.request_rate is None else f"{run.request_rate:g}"),
    ("done", lambda run: str(run.completed)),
    ("failed", lambda run: str(run.failed)),
    ("seconds", lambda run: f"{run.duration:.2f}"),
    ("requests/s", lambda run: f"{run.request_throughput:.2f}"),
    ("input tokens/s", lambda run: f"{run.input_throughput:.1f}"),
    ("output tokens/s", lambda run: f"{run.output_throughput:.1f}"),
    ("goodput/s", lambda run: "-" if run.request_goodput is None else f"{run.request_goodput:.2f}"),
    ("peak GB", lambda run: "-" if run.peak_memory_bytes is None else f"{run.peak_memory_bytes / 1e9:.2f}"),
)
_THROUGHPUT = [head for head, _ in _THROUGHPUT_CELLS]


def _latencies(runs: Sequence[RunResult], metric: str) -> str:
    rows = []
    for run in runs:
        spread = run.spreads[metric]
        rows.append([_streams(run), *(["-"] * 4 if spread is None else map("{:.1f}".format, _values(spread)))])
    head = ["requests at once", "mean", "median", "p90", "p99"]
    return f"<h2>{_TITLES[metric]}, milliseconds</h2>\n{_table(head, rows)}"


def _errors(runs: Sequence[RunResult]) -> str:
    rows = [
        [_streams(run), kind, str(error.count), error.message] for run in runs for kind, error in run.errors.items()
    ]
    return f"<h2>Errors</h2>\n{_table(['requests at once', 'kind', 'requests', 'first message'], rows)}" if rows else ""


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    top = "".join(f"<th>{escape(cell)}</th>" for cell in head)
    body = "\n".join("<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>" for row in rows)
    return f'<div class="wide"><table>\n<thead><tr>{top}</tr></thead>\n<tbody>\n{body}\n</tbody>\n</table></div>\n'


def _streams(run: RunResult) -> str:
    return "all" if run.max_concurrency is None else str(run.max_concurrency)


def _values(spread: Spread) -> tuple[float, ...]:
    return spread.mean, spread.median, spread.p90, spread.p99
