// A card for each worker: its KV, its load, its measured speed.

import { bytes, byId, color, h, seconds, setText, whole } from "./util.js";

const cards = new Map();

function card(name) {
  let found = cards.get(name);
  if (!found) {
    const part = (name, text) => h("i", { class: name, title: text });
    found = {
      bar: h("div", { class: "kv", role: "img" }, part("held", "held"), part("cached", "cached")),
      host: h("div", { class: "kv host", role: "img", hidden: "" }, part("held", "in host memory")),
      role: h("span", { class: "muted" }),
      lines: [h("p"), h("p"), h("p", { class: "muted" })],
    };
    const title = h("h3", {}, h("b", { class: "chip", "--c": color(name) }, name), " ", found.role);
    found.element = h("article", { class: "worker", "--c": color(name) }, title, found.bar, found.host, ...found.lines);
    cards.set(name, found);
    byId("workers").append(...[...cards.keys()].sort().map((key) => cards.get(key).element));
  }
  return found;
}

export function showWorkers(list) {
  for (const worker of list.data) {
    const { element, bar, host, role, lines } = card(worker.name);
    const { kv, rates } = worker;
    element.classList.remove("gone");
    setText(role, worker.role + (worker.epoch > 1 ? `, started ${worker.epoch} times` : ""));
    bar.style.setProperty("--held", kv.held / kv.total);
    bar.style.setProperty("--cached", kv.cached / kv.total);
    const pages = `KV: ${whole(kv.held)} held, ${whole(kv.cached)} cached, ${whole(kv.free)} free`;
    bar.setAttribute("aria-label", pages);
    host.hidden = !kv.host_total;
    if (kv.host_total) {
      host.style.setProperty("--held", kv.host_used / kv.host_total);
      host.setAttribute("aria-label", `host memory: ${whole(kv.host_used)} of ${whole(kv.host_total)} pages`);
    }
    const hosted = kv.host_total ? `; host ${whole(kv.host_used)} of ${whole(kv.host_total)}` : "";
    const state = kv.snapshot_pages ? `; ${whole(kv.snapshots)} snapshots of ${bytes(kv.snapshot_pages * kv.page_bytes)}` : "";
    setText(lines[0], `${pages} of ${bytes(kv.total * kv.page_bytes)}${hosted}${state}`);
    const queue = worker.queued_prefill_tokens ? `, ${whole(worker.queued_prefill_tokens)} prompt tokens to do` : "";
    setText(lines[1], `${worker.running} running, ${worker.waiting} waiting${queue}`);
    const prompt = rates.prefill_512 ? `512 tokens in ${seconds(rates.prefill_512)}` : "no prompt measured yet";
    const step = rates.decode_step ? `, a step in ${seconds(rates.decode_step)}` : "";
    setText(lines[2], prompt + step);
  }
  const alive = new Set(list.data.map((worker) => worker.name));
  for (const [name, { element, role }] of cards) {
    if (alive.has(name)) continue;
    element.classList.add("gone");
    setText(role, "is gone");
  }
  const links = list.links.filter((link) => link.moves).map((link) => {
    const speed = link.bandwidth ? ` at ${bytes(link.bandwidth)}/s` : "";
    return `${link.source} ▸ ${link.destination} ${whole(link.moves)}×, ${bytes(link.bytes)}${speed}`;
  });
  setText(byId("links"), links.length ? `KV moved: ${links.join("; ")}` : "no KV has moved yet");
  return list.queued;
}

export function forgetWorkers() {
  cards.clear();
  byId("workers").replaceChildren();
}
