// Conversations as lanes over time. Groups keep their place until an idle one has to make room, so that little jumps.
// The turns lie on a belt that moves left; only those that still run are laid out again.

import { ROWS, arrange, describe, kindOf } from "./groups.js";
import { missOf } from "./model.js";
import { byId, color, h, setText, where } from "./util.js";

const PARTS = ["queued", "waited", "prefill", "decode"]; // of a turn, one after the other

export class Lanes {
  constructor(model, show) {
    this.model = model;
    this.show = show; // called with a turn that is pointed at, or null
    this.span = 60;
    this.own = ""; // the chat's conversation
    this.epoch = 0;
    this.order = []; // of the groups shown
    this.drawn = new Map(); // turn -> its elements and what they show
    this.turnOf = new WeakMap();
    this.rows = Array.from({ length: ROWS }, () => {
      const [id, kind, belt] = [h("span"), h("small"), h("div", { class: "belt" })];
      const name = h("span", { class: "name" }, id, kind);
      const element = h("div", { class: "lane" }, name, h("div", { class: "track" }, belt));
      return { name, id, kind, belt, element, conversation: null, depth: 0, up: 0 };
    });
    const box = byId("lanes");
    box.append(...this.rows.map((row) => row.element));
    const turnAt = (event) => this.turnOf.get(event.target.closest(".turn"));
    box.addEventListener("pointerover", (event) => turnAt(event) && show(turnAt(event)));
    box.addEventListener("pointerleave", () => show(this.turnOf.get(document.activeElement) ?? null));
    box.addEventListener("click", (event) => event.target.closest(".turn")?.focus()); // Safari does not by itself
    box.addEventListener("focusin", (event) => turnAt(event) && show(turnAt(event)));
    box.addEventListener("focusout", () => show(null));
    box.addEventListener("keydown", (event) => this.#key(event));
    new ResizeObserver(() => this.#scale()).observe(this.rows[0].belt.parentElement);
  }

  setSpan(span) {
    this.span = span;
    this.#scale();
  }

  clear() {
    for (const row of this.rows) row.conversation = null;
    for (const turn of this.drawn.keys()) this.#remove(turn);
  }

  // Everything is laid out anew.
  #scale() {
    this.width = this.rows[0].belt.parentElement.clientWidth;
    this.epoch = this.model.now();
    for (const drawn of this.drawn.values()) drawn.version = -1;
    const ago = (s) => (s < 100 ? `−${s} s` : `−${s / 60} min`);
    const ticks = [1, 0.75, 0.5, 0.25].map((part) => h("span", {}, ago(part * this.span)));
    byId("axis").replaceChildren(...ticks, h("span", {}, "now"));
    this.update();
  }

  update() {
    if (!this.width) return;
    const now = this.model.now();
    const perSecond = this.width / this.span;
    this.#assign(now);
    const visible = new Set();
    for (const row of this.rows) {
      row.belt.style.transform = `translateX(${this.width - (now - this.epoch) * perSecond}px)`;
      for (const turn of row.conversation?.turns ?? []) {
        if (turn.arrived === undefined || (turn.end ?? now) < now - this.span) continue;
        visible.add(turn);
        this.#draw(turn, row, now, perSecond);
      }
      this.#name(row);
    }
    for (const [turn, { element }] of this.drawn) {
      if (!visible.has(turn) && element !== document.activeElement) this.#remove(turn);
    }
    const last = [...visible].at(-1);
    if (last && !byId("lanes").querySelector('.turn[tabindex="0"]')) this.drawn.get(last).element.tabIndex = 0;
    const shown = this.rows.filter((row) => row.conversation).length;
    const { total, active } = this.model;
    setText(byId("count"), `${shown} of ${total} shown; ${active} turn${active === 1 ? "" : "s"} under way`);
  }

  // Give rows to the groups that were active last, and order them.
  #assign(now) {
    const shown = new Set(this.rows.map((row) => row.conversation));
    const { order, lanes } = arrange(this.model.conversations, this.order, shown, this.own, now - this.span);
    this.order = order;
    const wanted = new Set(lanes.map((lane) => lane.conversation));
    for (const row of this.rows) {
      if (!row.conversation || wanted.has(row.conversation)) continue;
      for (const turn of row.conversation.turns) this.#remove(turn);
      Object.assign(row, { conversation: null, depth: 0, up: 0 });
    }
    const spare = this.rows.filter((row) => !row.conversation);
    const rows = lanes.map((lane) => {
      const row = this.rows.find((row) => row.conversation === lane.conversation) ?? spare.shift();
      return Object.assign(row, lane);
    });
    rows.push(...spare);
    if (rows.every((row, i) => row === this.rows[i])) return;
    this.rows = rows;
    const elements = rows.map((row) => row.element);
    const focused = Math.max(elements.findIndex((element) => element.contains(document.activeElement)), 0);
    // The one with the focus must not be moved: it would lose it.
    elements[focused].before(...elements.slice(0, focused));
    elements[focused].after(...elements.slice(focused + 1));
  }

  #name({ conversation, name, id, kind, element, depth, up }) {
    setText(id, conversation?.id ?? "");
    setText(kind, conversation ? kindOf(conversation) || conversation.client : "");
    const home = `at ${conversation?.home || "no worker yet"}`;
    name.title = conversation ? `${conversation.id}: ${[describe(conversation), home].filter(Boolean).join(", ")}` : "";
    element.classList.toggle("own", Boolean(conversation && conversation.id === this.own));
    element.classList.toggle("child", up > 0);
    element.classList.toggle("side", conversation?.kind === "side");
    element.style.setProperty("--depth", depth);
    element.style.setProperty("--up", up);
    name.style.setProperty("--c", conversation?.home ? color(conversation.home) : "transparent");
  }

  #draw(turn, row, now, perSecond) {
    let drawn = this.drawn.get(turn);
    if (!drawn) {
      const part = (kind) => h("i", { class: `seg ${kind}` });
      const parts = Object.fromEntries(PARTS.map((kind) => [kind, part(kind)]));
      const marks = h("i", { class: "mark" });
      const element = h("button", { class: "turn", type: "button", tabindex: "-1" }, ...Object.values(parts), marks);
      drawn = { element, parts, marks, version: -1 };
      this.drawn.set(turn, drawn);
      this.turnOf.set(element, turn);
      row.belt.append(element);
    }
    if (drawn.version === turn.version && turn.end) return;
    const { element, parts, marks } = drawn;
    const end = turn.end ?? now;
    const first = Math.min(turn.first ?? end, end);
    const placed = Math.min(turn.home ? turn.placed ?? end : end, first);
    const began = turn.prefill === undefined ? placed : Math.max(first - turn.prefill, placed);
    const times = [turn.arrived, placed, began, first, end];
    element.style.left = `${(turn.arrived - this.epoch) * perSecond}px`;
    element.style.width = `${Math.max((end - turn.arrived) * perSecond, 4)}px`;
    element.classList.toggle("live", !turn.end);
    const miss = missOf(turn);
    element.classList.toggle("missed", Boolean(miss));
    for (const [i, kind] of PARTS.entries()) {
      const [from, to] = times.slice(i, i + 2);
      const { style } = parts[kind];
      const width = (to - from) * perSecond;
      const worker = kind === "decode" ? turn.home : turn.prefillAt;
      style.left = `${(from - turn.arrived) * perSecond}px`;
      style.width = `${to > from ? Math.max(width, 1) : 0}px`;
      if (kind !== "queued" && worker) style.setProperty("--c", color(worker));
      if (kind === "prefill" || kind === "decode") setText(parts[kind], width > (kind === "prefill" ? 22 : 40) ? worker ?? "" : "");
    }
    const handed = turn.home && turn.prefillAt !== turn.home && turn.first;
    const failed = turn.finish === "abort" || turn.finish === "error";
    const kind = failed ? "failed" : turn.movedFrom ? "move" : handed ? "handoff" : "";
    marks.className = `mark ${kind}`;
    setText(marks, { failed: "✕", move: "⇄", handoff: "▸" }[kind] ?? "");
    marks.style.left = `${((failed ? end : turn.movedFrom ? placed : first) - turn.arrived) * perSecond}px`;
    drawn.version = turn.version;
    const state = turn.end ? turn.finish : turn.first ? "decodes" : turn.home ? "prefills" : "is queued";
    const moved = turn.movedFrom ? `, moved from ${turn.movedFrom}` : "";
    const place = turn.home ? where(turn.prefillAt, turn.home) : "no place yet";
    const again = miss ? `, ${miss.lost} tokens computed again` : "";
    const label = `${turn.conversation.id}, turn ${turn.number}: ${place}${moved}, ${state}${again}`;
    if (element.getAttribute("aria-label") !== label) element.setAttribute("aria-label", label);
  }

  #remove(turn) {
    this.drawn.get(turn)?.element.remove();
    this.drawn.delete(turn);
  }

  // Arrow keys: the turn before and after in this lane, the nearest in time of the lanes above and below.
  #key(event) {
    const turn = this.turnOf.get(event.target);
    const steps = { ArrowLeft: -1, ArrowRight: 1, ArrowUp: -1, ArrowDown: 1, Escape: 0 };
    if (!turn || !(event.key in steps)) return;
    event.preventDefault();
    if (event.key === "Escape") return event.target.blur();
    const turnsOf = (row) => (row.conversation?.turns ?? []).filter((other) => this.drawn.has(other));
    const at = this.rows.findIndex((row) => row.conversation === turn.conversation);
    let next;
    if (event.key === "ArrowLeft" || event.key === "ArrowRight") {
      const here = turnsOf(this.rows[at]).sort((a, b) => a.arrived - b.arrived);
      next = here[here.indexOf(turn) + steps[event.key]];
    } else {
      const rows = event.key === "ArrowUp" ? this.rows.slice(0, at).reverse() : this.rows.slice(at + 1);
      const others = rows.map(turnsOf).find((turns) => turns.length) ?? [];
      const far = (other) => Math.abs(other.arrived - turn.arrived);
      next = others.reduce((a, b) => (a && far(a) <= far(b) ? a : b), undefined);
    }
    if (!next) return;
    event.target.tabIndex = -1;
    const { element } = this.drawn.get(next);
    element.tabIndex = 0;
    element.focus({ preventScroll: true });
  }
}
