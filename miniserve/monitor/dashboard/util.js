// What all parts use: elements, numbers in words, colours of workers.

// An element. Text only ever becomes text nodes: names of conversations come from clients.
export function h(tag, attributes = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (name === "class") element.className = value;
    else if (name.startsWith("--")) element.style.setProperty(name, value);
    else if (value !== null) element.setAttribute(name, value);
  }
  element.append(...children.map((child) => (child instanceof Node ? child : String(child))));
  return element;
}

export const byId = (id) => document.getElementById(id);

// Sets text only where it changed, so that a selection or a screen reader is left in peace.
export function setText(element, text) {
  if (element.textContent !== text) element.textContent = text;
}

export const whole = (number) => Math.round(number).toLocaleString("en");

export function seconds(s) {
  if (s === null || s === undefined || Number.isNaN(s)) return "–";
  if (s < 0.00005) return "0 ms";
  if (s < 0.9995) return `${(1000 * s).toFixed(s < 0.01 ? 1 : 0)} ms`;
  return s < 100 ? `${s.toFixed(s < 10 ? 2 : 1)} s` : `${whole(s)} s`;
}

export function bytes(n) {
  const units = ["B", "KiB", "MiB", "GiB", "TiB"];
  const at = Math.min(Math.max(Math.floor(Math.log2(n || 1) / 10), 0), units.length - 1);
  return `${(n / 1024 ** at).toFixed(at > 2 ? 1 : 0)} ${units[at]}`;
}

// Okabe and Ito's colours, as in the figures of `miniserve replay`: they stay apart for the colour-blind. Names and
// shapes say the same again.
const DECODERS = ["#0072b2", "#e69f00", "#cc79a7", "#56b4e9", "#a58848"];
const PREFILLERS = ["#009e73", "#d55e00", "#999999"];

export function color(worker) {
  const found = /^([a-z])(\d+)$/.exec(worker ?? "");
  if (!found) return "#888888";
  const colors = found[1] === "p" ? PREFILLERS : DECODERS;
  return colors[Number(found[2]) % colors.length];
}

export function where(prefillAt, home) {
  return !prefillAt || prefillAt === home ? `${home}` : `${prefillAt} ▸ ${home}`;
}
