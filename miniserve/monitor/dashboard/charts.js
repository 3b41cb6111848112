// Latencies of the last minutes: a dot for each turn or conversation, a line for the median of a few seconds.

import { byId, color, h, seconds, setText } from "./util.js";

const SPAN = 300;
const BIN = 15;
const STEPS = [0.001, 0.01, 0.1, 1, 10, 100, 1000];

// Each gives [time, seconds] of a turn, or null.
const CHARTS = [
  {
    name: "TTFT",
    about: "from a turn's arrival to its first token",
    dot: (turn) => [turn.first, turn.first - turn.arrived],
  },
  {
    name: "TBT",
    about: "mean gap between tokens of a turn",
    dot: (turn) => (turn.output > 1 ? [turn.end, (turn.end - turn.first) / (turn.output - 1)] : null),
  },
  {
    name: "TTFET",
    about: "from a conversation's arrival to the first token of its last turn so far",
    last: true,
    dot: ({ first, conversation }) => (conversation.began === null ? null : [first, first - conversation.began]),
  },
];

export class Charts {
  constructor(model) {
    this.model = model;
    this.charts = CHARTS.map((chart) => {
      const canvas = h("canvas", { "aria-hidden": "true" });
      const summary = h("p", { class: "muted" }, "nothing yet");
      const title = h("h2", { title: chart.about }, chart.name, " ", h("small", {}, chart.about));
      byId("charts").append(h("figure", {}, title, summary, canvas));
      return { ...chart, canvas, summary };
    });
    new ResizeObserver(() => this.update()).observe(byId("charts"));
  }

  update() {
    const now = this.model.now();
    const turns = this.model.ended();
    for (const chart of this.charts) {
      let of = turns;
      if (chart.last) {
        const latest = new Map();
        for (const turn of turns) {
          if (!(latest.get(turn.conversation)?.first > turn.first)) latest.set(turn.conversation, turn);
        }
        of = [...latest.values()];
      }
      const dots = [];
      for (const turn of of) {
        const [time, value] = chart.dot(turn) ?? [0, 0];
        if (time > now - SPAN && value > 0) dots.push({ time, value, turn });
      }
      const values = dots.map((dot) => dot.value).sort((a, b) => a - b);
      const at = (q) => seconds(values[Math.min(Math.floor(q * values.length), values.length - 1)]);
      const number = `${values.length} ${chart.last ? "conversation" : "turn"}${values.length === 1 ? "" : "s"}`;
      setText(chart.summary, values.length ? `p50 ${at(0.5)} · p95 ${at(0.95)} · ${number}` : "nothing yet");
      draw(chart.canvas, dots, values, now);
    }
  }
}

function draw(canvas, dots, values, now) {
  const [width, height] = [canvas.clientWidth, canvas.clientHeight];
  const ratio = window.devicePixelRatio || 1;
  if (!width) return;
  if (canvas.width !== Math.round(width * ratio) || canvas.height !== Math.round(height * ratio)) {
    [canvas.width, canvas.height] = [Math.round(width * ratio), Math.round(height * ratio)];
  }
  const style = getComputedStyle(canvas);
  const [ink, faint] = [style.color, style.borderTopColor];
  const pen = canvas.getContext("2d");
  pen.setTransform(ratio, 0, 0, ratio, 0, 0);
  pen.clearRect(0, 0, width, height);
  pen.font = `11px ${style.fontFamily}`;
  // A logarithmic axis of whole decades: it seldom changes, and small and large are both to be seen.
  const from = STEPS.findLast((step) => step <= (values[0] ?? 0.01)) ?? STEPS[0];
  const to = STEPS.find((step) => step >= (values.at(-1) ?? 1) && step > from) ?? STEPS.at(-1);
  const [left, right, top, bottom] = [46, 6, 6, 18];
  const x = (time) => width - right - ((now - time) / SPAN) * (width - left - right);
  const y = (value) => height - bottom - (Math.log(value / from) / Math.log(to / from)) * (height - top - bottom);
  // Of few decades, their parts too.
  const parts = to / from > 10 ? [1] : [1, 2, 5];
  const all = STEPS.flatMap((step) => parts.map((part) => part * step));
  const ticks = all.filter((tick) => tick >= from && tick <= to * 1.001);
  pen.strokeStyle = faint;
  pen.fillStyle = ink;
  pen.textBaseline = "middle";
  for (const step of ticks) {
    pen.textAlign = "right";
    pen.fillText(seconds(step).replace(/\.0+ /, " "), left - 6, y(step));
    pen.beginPath();
    pen.moveTo(left, Math.round(y(step)) + 0.5);
    pen.lineTo(width - right, Math.round(y(step)) + 0.5);
    pen.stroke();
  }
  for (let ago = 0; ago <= SPAN; ago += 60) {
    pen.textAlign = ago ? "center" : "right";
    pen.fillText(ago ? `−${ago / 60} min` : "now", ago ? Math.max(x(now - ago), left) : width - right, height - 7);
  }
  for (const { time, value, turn } of dots) {
    // Triangles: prefilled elsewhere than at home.
    pen.fillStyle = color(turn.prefillAt);
    pen.globalAlpha = 0.75;
    pen.beginPath();
    const [cx, cy] = [x(time), y(value)];
    if (turn.prefillAt === turn.home) pen.arc(cx, cy, 3, 0, 7);
    else for (const [dx, dy] of [[-3.5, 3], [3.5, 3], [0, -4]]) pen.lineTo(cx + dx, cy + dy);
    pen.fill();
  }
  pen.globalAlpha = 1;
  const bins = new Map();
  for (const { time, value } of dots) {
    const bin = Math.floor(time / BIN);
    bins.set(bin, [...(bins.get(bin) ?? []), value]);
  }
  pen.strokeStyle = ink;
  pen.lineWidth = 1.5;
  pen.beginPath();
  for (const bin of [...bins.keys()].sort((a, b) => a - b)) {
    const sorted = bins.get(bin).sort((a, b) => a - b);
    pen.lineTo(Math.max(Math.min(x((bin + 0.5) * BIN), width - right), left), y(sorted[Math.floor(sorted.length / 2)]));
  }
  pen.stroke();
  pen.lineWidth = 1;
}
