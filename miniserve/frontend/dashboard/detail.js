// One decision: the ways to serve the turn with their estimated costs, the choice, and what really happened.

import { byId, color, h, seconds, setText, where, whole } from "./util.js";

const PHASES = ["queue", "prefill", "transfer", "decode", "harm"];
const short = (s) => (s === null || s === undefined ? "–" : s.toFixed(s < 9.995 ? 3 : 1));

let shown = null;
let version = -1;

export function showDecision(turn, isLatest) {
  setText(byId("detail-which"), isLatest ? "the latest; point at a turn for its own" : "of the turn you point at");
  if (turn === shown && (turn?.version ?? -1) === version) return;
  // Numbers of a running turn change each second; what is shown of it does not, until it has ended.
  if (turn === shown && turn && !turn.end && turn.decision === byId("detail").decision) return;
  [shown, version] = [turn, turn?.version ?? -1];
  byId("detail").decision = turn?.decision;
  byId("detail").replaceChildren(...(turn ? content(turn) : [h("p", { class: "muted" }, "Nothing was decided yet.")]));
}

function content(turn) {
  const { decision: d, outcome: o } = turn;
  const chips = [turn.prefillAt !== turn.home ? [turn.prefillAt, "prefills"] : null, [turn.home, ""]];
  const [pre, at] = chips.map((c) => c && h("b", { class: "chip", "--c": color(c[0]) }, c[0] ?? "queue"));
  const does = !turn.home ? ["waits in the ", at] : pre ? [pre, " prefills, ", at, " decodes"] : [at, " does all of it"];
  const parts = [h("h3", { class: "clip" }, `${turn.conversation.id} · turn ${turn.number}`)];
  parts.push(h("p", {}, ...does, d ? `: ${d.reason || "no other way"}` : ""));
  const moved = turn.moved ? ` ${whole(turn.moved)} pages of KV moved.` : "";
  const tokens = `${whole(turn.prompt)} tokens`;
  if (d) {
    const read = `${tokens}, ${whole(d.expected_output)} more expected: ${whole(d.pages)} pages.`;
    parts.push(h("p", { class: "muted" }, `${read} It was queued for ${seconds(d.queued)}.${moved}`));
    parts.push(options(d, o), workers(d));
  } else {
    const why = "It was decided before this page listened; its numbers are in the decision log, if there is one.";
    const first = turn.first ? `, the first token after ${seconds(turn.first - turn.arrived)}` : "";
    parts.push(h("p", { class: "muted" }, `${tokens}${first}.${moved} ${turn.home ? why : ""}`));
  }
  return parts;
}

// Bars of all rows have one scale.
function options(d, o) {
  const chosen = (option) => option.home === d.home && option.prefill_at === d.prefill_at;
  const rows = d.options.map((option) => ({ ...option, name: where(option.prefill_at, option.home), chosen: chosen(option) }));
  if (o) {
    const real = { queue: o.waited, prefill: o.prefill, transfer: o.exposed, decode: Math.max(o.decode - o.exposed, 0) };
    rows.push({ ...real, harm: null, cost: o.first_token + o.decode, name: "real", real: true });
  }
  const most = Math.max(...rows.map((row) => row.cost), 1e-9);
  const head = h("tr", {}, h("th", { scope: "col" }, "s"), ...PHASES.map((phase) => h("th", { scope: "col", class: phase }, phase)), h("th", { scope: "col" }, "cost"));
  const table = h("table", {}, h("caption", {}, rows.length > Number(Boolean(o)) ? "Expected costs in seconds, and what happened" : "This policy compares no costs"), h("thead", {}, head));
  for (const row of rows) {
    const name = h("th", { scope: "row" }, `${row.chosen ? "✓ " : ""}${row.name}`);
    const cells = [...PHASES, "cost"].map((phase) => h("td", {}, short(row[phase])));
    const bar = h("div", { class: "bar" }, ...PHASES.map((phase) => h("i", { class: phase, "--part": (row[phase] ?? 0) / most })));
    const kind = row.chosen ? "chosen" : row.real ? "real" : "";
    table.append(h("tbody", { class: kind }, h("tr", {}, name, ...cells), h("tr", { "aria-hidden": "true" }, h("td", { colspan: 7 }, bar))));
  }
  if (!o) table.append(h("tbody", { class: "real" }, h("tr", {}, h("th", { scope: "row" }, "real"), h("td", { colspan: 6 }, "when it has ended"))));
  return table;
}

function workers(d) {
  const columns = { free: "free", turns: "turns", load: "load", queued_prefill_tokens: "to do", prefilling: "prefilling", known: "known" };
  const cell = { load: (x) => x.toFixed(1), prefilling: (x) => `${Math.round(100 * x)} %` };
  const head = h("tr", {}, h("th", { scope: "col" }, ""), ...Object.values(columns).map((name) => h("th", { scope: "col" }, name)));
  const rows = Object.entries(d.workers).map(([name, read]) =>
    h("tr", {}, h("th", { scope: "row" }, h("b", { class: "chip", "--c": color(name) }, name)), ...Object.keys(columns).map((key) => h("td", {}, (cell[key] ?? whole)(read[key])))));
  return h("table", {}, h("caption", {}, "Read of the workers: pages free, turns now and on average, tokens to prefill, tokens known"), h("thead", {}, head), h("tbody", {}, ...rows));
}
