// Why prompts could not go on where earlier ones had ended: GET /v1/doctor, a line for each client and cause.

import { byId, h, setText, whole } from "./util.js";

// In which text of a prompt, by its role.
const PLACES = { system: "the system prompt", tools: "the tools", assistant: "an answer", tool: "a tool's result" };
const known = new Map(); // causes by kind
let shown = "";

// What the doctor says of a kind of change: {says, advice}.
export const causeOf = (kind) => known.get(kind) ?? { says: kind, advice: "" };

const percent = (part) => (part > 0 && part < 0.01 ? "under 1 %" : `${Math.round(100 * part)} %`);
const saysOf = ({ says, where }) => says.replace(/^it\b|(?<=stands in )it$/, PLACES[where] ?? "a message");

// Returns how many turns have lost something.
export function showPrefixes({ data }) {
  const all = data.flatMap((client) => client.causes);
  for (const cause of all) known.set(cause.kind, cause);
  const now = JSON.stringify(data);
  if (now !== shown) byId("prefixes").replaceChildren(...data.flatMap(lines));
  shown = now;
  const well = data.length ? "all is well: prompts go on as they were" : "no turn has ended yet";
  setText(byId("prefixes-which"), all.length ? "what was computed again, and why; such turns are marked ≠" : well);
  return all.reduce((sum, cause) => sum + cause.turns, 0);
}

function lines({ client, turns, prompt_tokens, computed_tokens, causes }) {
  const computed = `${percent(computed_tokens / Math.max(prompt_tokens, 1))} of prompt tokens computed`;
  const head = [h("b", {}, client), `: ${whole(turns)} turn${turns === 1 ? "" : "s"}, ${computed}, `];
  if (!causes.length) return [h("p", {}, ...head, "no prompt had changed")];
  return causes.map((cause, i) => {
    const why = `${percent(cause.share)} of that because ${saysOf(cause)}. `;
    return h("p", {}, ...(i ? ["and "] : head), why, h("span", { class: "muted" }, cause.advice));
  });
}
