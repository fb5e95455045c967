// Imbalance, entropy and tokens a second over time. The server keeps no history: this page does.
//
// uPlot.esm.js and uPlot.min.css are those of uPlot 1.6.32, unchanged; its licence is uPlot.LICENSE.txt.

import uPlot from "./uPlot.esm.js";
import { byId, element, setText } from "./dom.js";
import { count, decimal, percent } from "./format.js";

const LENGTH = 600; // events kept: ten minutes of one a second
const HEIGHT = 140;

const mean = (values) => values.reduce((sum, value) => sum + value, 0) / values.length;

const CHARTS = [
  {
    name: "imbalance",
    series: ["worst layer", "mean"],
    values: ({ routing }) =>
      routing?.window.tokens ? [Math.max(...routing.window.imbalance), mean(routing.window.imbalance)] : [null, null],
    low: 1,
    show: (value) => decimal(value),
  },
  {
    name: "entropy",
    series: ["lowest layer", "mean"],
    values: ({ routing }) =>
      routing?.window.tokens
        ? [Math.min(...routing.window.entropy_share), mean(routing.window.entropy_share)]
        : [null, null],
    low: 0,
    show: (value) => percent(value, 0),
  },
  {
    name: "tokens",
    series: ["prompts", "output"],
    values: ({ throughput }) => [
      throughput?.prompt_tokens_per_second ?? null,
      throughput?.output_tokens_per_second ?? null,
    ],
    low: 0,
    show: count,
  },
];

export class Charts {
  constructor() {
    this.times = [];
    this.colours = probe();
    this.charts = CHARTS.map((chart) => this.build(chart));
  }

  build({ name, series, ...rest }) {
    const holder = byId(`chart-${name}`);
    const words = series.map((label, index) =>
      element("span", { class: `of-${series.length - index}` }, `${label} `, element("b")),
    );
    byId(`now-${name}`).append(...words);
    const chart = { ...rest, words, series, data: series.map(() => []) };
    chart.plot = new uPlot(this.options(chart, holder), [this.times, ...chart.data], holder);
    new ResizeObserver(() => {
      const width = holder.clientWidth;
      if (width > 0 && width !== chart.plot.width) chart.plot.setSize({ width, height: HEIGHT });
    }).observe(holder);
    return chart;
  }

  options(chart, holder) {
    const { series, show, low } = chart;
    const colour = (name) => () => getComputedStyle(this.colours[name]).color;
    const axis = {
      stroke: colour("axis"),
      grid: { stroke: colour("grid"), width: 1 },
      ticks: { show: false },
      font: "11px system-ui, sans-serif",
    };
    const line = (label, index) => ({
      label,
      stroke: colour(`series-${series.length - index}`),
      width: index ? 2 : 1.25,
      points: { show: false },
    });
    return {
      width: holder.clientWidth || 300,
      height: HEIGHT,
      legend: { show: false },
      hooks: { setCursor: [() => chart.plot && showValues(chart)] },
      cursor: { drag: { x: false, y: false }, points: { size: 6 } },
      scales: {
        y: {
          range: (_, __, most) => [low, Math.max(low ? low + 1 : 1, (most ?? 0) * (low === 0 && most <= 1 ? 1 : 1.08))],
        },
      },
      axes: [
        { ...axis, size: 26, space: 70, values: "{HH}:{mm}:{ss}" },
        { ...axis, size: 46, space: 30, values: (_, splits) => splits.map(show) },
      ],
      series: [{}, ...series.map(line)],
    };
  }

  /** One more point in each chart. */
  add(event) {
    const drop = this.times.length >= LENGTH;
    push(this.times, event.time, drop);
    for (const chart of this.charts) {
      chart.values(event).forEach((value, index) => push(chart.data[index], value, drop));
      chart.plot.setData([this.times, ...chart.data]);
      showValues(chart);
    }
  }

  /** The theme has changed. */
  recolour() {
    for (const { plot } of this.charts) plot.redraw(false);
  }
}

/** Elements that have the theme's colours as computed values, for a canvas knows no custom properties. */
function probe() {
  const names = ["series-1", "series-2", "axis", "grid"];
  const spans = names.map((name) => element("span", { class: name }));
  document.body.append(element("div", { class: "probe", "aria-hidden": "true" }, ...spans));
  return Object.fromEntries(names.map((name, index) => [name, spans[index]]));
}

/** The values under the cursor; without one, the latest. */
function showValues({ data, words, plot, show }) {
  const at = plot.cursor.idx ?? data[0].length - 1;
  words.forEach((word, index) => setText(word.lastChild, show(data[index][at] ?? null)));
}

function push(values, value, drop) {
  if (drop) values.shift();
  values.push(value);
}
