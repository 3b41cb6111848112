// One decision: the ways to serve the turn with their estimated costs, the choice, and what really happened.

import { describe } from "./groups.js";
import { missOf } from "./model.js";
import { causeOf } from "./prefixes.js";
import { byId, color, h, seconds, setText, where, whole } from "./util.js";

const PHASES = ["queue", "prefill", "transfer", "decode", "harm"];
// Columns of what was read of workers.
const READ = {
  free: "free",
  turns: "turns",
  load: "load",
  queued_prefill_tokens: "to do",
  prefilling: "busy",
  known: "known",
};
const number = (s) => (s === null ? "–" : s.toFixed(s < 9.995 ? 3 : 1));
const chip = (worker) => h("b", { class: "chip", "--c": color(worker) }, worker);
const th = (name) => h("th", { scope: "col", class: name }, name);
const head = (names) => h("thead", {}, h("tr", {}, ...names.map(th)));

let shown = [];

export function showDecision(turn, isLatest) {
  setText(byId("detail-which"), isLatest ? "the latest; point at a turn for its own" : "of the turn you point at");
  const notes = turn ? [describe(turn.conversation), causeOf(missOf(turn)?.kind).says] : [];
  const now = turn ? [turn, turn.home, turn.decision, turn.outcome, turn.end, ...notes] : [null];
  if (now.every((part, i) => part === shown[i])) return;
  shown = now;
  byId("detail").replaceChildren(...(turn ? content(turn) : [h("p", { class: "muted" }, "Nothing was decided yet.")]));
}

function content(turn) {
  const { decision, outcome, home, prefillAt } = turn;
  const elsewhere = prefillAt !== home ? [chip(prefillAt), " prefills, ", chip(home), " decodes"] : [];
  const does = !home ? ["It is queued."] : elsewhere.length ? elsewhere : [chip(home), " does all of it"];
  const title = h("h3", { class: "clip" }, `${turn.conversation.id} · turn ${turn.number}`);
  const about = describe(turn.conversation);
  const top = [title, ...(about ? [h("p", { class: "muted clip" }, about)] : [])];
  const lost = missOf(turn) ? missed(missOf(turn)) : [];
  const moved = turn.moved ? ` ${whole(turn.moved)} pages of KV moved.` : "";
  if (!decision) {
    const why = home ? "Its decision was made before this page listened." : "";
    const first = turn.first ? `, the first after ${seconds(turn.first - turn.arrived)}` : "";
    const facts = `${whole(turn.prompt)} tokens in, ${whole(turn.output ?? 0)} out${first}.${moved} ${why}`;
    return [...top, h("p", {}, ...does), h("p", { class: "muted" }, facts), ...lost];
  }
  const { tokens, expected_output, pages, queued } = decision;
  const needs = `${whole(tokens)} tokens in, ${whole(expected_output)} out expected: ${whole(pages)} pages.`;
  return [
    ...top,
    h("p", {}, ...does, `: ${decision.reason}`),
    h("p", { class: "muted" }, `${needs} Queued for ${seconds(queued)}.${moved}`),
    ...lost,
    costs(decision, outcome),
    workers(decision),
  ];
}

// Where the prompt began to differ, and the texts around that if the server gives them.
function missed({ kind, field, token, lost, before, after, before_hash, after_hash }) {
  const { says, advice } = causeOf(kind);
  const change = `the prompt changed at token ${whole(token)}, in ${field}: ${says}. `;
  const told = h("p", {}, `≠ ${whole(lost)} tokens computed again: ${change}`, h("span", { class: "muted" }, advice));
  const known = before !== null && after !== null;
  const text = (name, text) => {
    const box = h("pre", { tabindex: 0, role: "region", "aria-label": `The prompt ${name}` }, ...text);
    return h("div", {}, h("small", { class: "muted" }, name), box);
  };
  const old = text("before", known ? unlike(before, after) : ["hash ", before_hash]);
  return [told, h("div", { class: "texts" }, old, text("now", known ? unlike(after, before) : ["hash ", after_hash]))];
}

// A text with what differs from another one marked.
function unlike(text, other) {
  const least = Math.min(text.length, other.length);
  let [start, end] = [0, 0];
  while (start < least && text[start] === other[start]) start += 1;
  while (end < least - start && text.at(-1 - end) === other.at(-1 - end)) end += 1;
  return [text.slice(0, start), h("mark", {}, text.slice(start, text.length - end)), text.slice(text.length - end)];
}

// A row for each option and one for what happened; the bars below them have one scale.
function costs({ options, home, prefill_at }, outcome) {
  const rows = options.map((option) => {
    const chosen = option.home === home && option.prefill_at === prefill_at;
    const name = where(option.prefill_at, option.home);
    return { ...option, name: chosen ? `✓ ${name}` : name, kind: chosen ? "chosen" : "" };
  });
  if (outcome) {
    const { waited, prefill, exposed, decode, first_token } = outcome;
    const parts = { queue: waited, prefill, transfer: exposed, decode: Math.max(decode - exposed, 0), harm: null };
    rows.push({ ...parts, cost: first_token + decode, name: "real", kind: "real" });
  }
  const most = Math.max(...rows.map((row) => row.cost), 1e-9);
  const bodies = rows.map((row) => {
    const bar = PHASES.map((phase) => h("i", { class: phase, "--part": (row[phase] ?? 0) / most }));
    const cells = [...PHASES, "cost"].map((column) => h("td", {}, number(row[column])));
    const numbers = h("tr", {}, h("th", { scope: "row" }, row.name), ...cells);
    const drawn = h("tr", { "aria-hidden": "true" }, h("td", { colspan: 7 }, h("div", { class: "bar" }, ...bar)));
    return h("tbody", { class: row.kind }, numbers, drawn);
  });
  const what = options.length ? "What each way was expected to cost, in seconds" : "This policy compares no costs";
  const told = h("caption", {}, outcome ? `${what}; what it took` : `${what}; what it took follows at its end`);
  return h("table", {}, told, head(["", ...PHASES, "cost"]), ...bodies);
}

function workers(decision) {
  const words = { load: (x) => x.toFixed(1), prefilling: (x) => `${Math.round(100 * x)} %` };
  const rows = Object.entries(decision.workers).map(([name, read]) => {
    const cells = Object.keys(READ).map((key) => h("td", {}, (words[key] ?? whole)(read[key])));
    return h("tr", {}, h("th", { scope: "row" }, chip(name)), ...cells);
  });
  const told = "Read of workers: free pages, turns now and lately, prompt tokens to do and time spent so, tokens known";
  return h("table", {}, h("caption", {}, told), head(["", ...Object.values(READ)]), h("tbody", {}, ...rows));
}
