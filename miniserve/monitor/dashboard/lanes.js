// Conversations as lanes over time. Each keeps its row until an idle one has to make room, so that nothing jumps. The
// turns lie on a belt that moves left; only those that still run are laid out again.

import { byId, color, h, setText, where } from "./util.js";

const ROWS = 20;
const PARTS = ["queued", "waited", "prefill", "decode"]; // of a turn, one after the other

export class Lanes {
  constructor(model, show) {
    this.model = model;
    this.show = show; // called with a turn that is pointed at, or null
    this.span = 60;
    this.own = ""; // the chat's conversation
    this.epoch = 0;
    this.drawn = new Map(); // turn -> its elements and what they show
    this.turnOf = new WeakMap();
    this.rows = Array.from({ length: ROWS }, () => {
      const [name, belt] = [h("span", { class: "name" }), h("div", { class: "belt" })];
      const element = h("div", { class: "lane" }, name, h("div", { class: "track" }, belt));
      return { name, belt, element, conversation: null };
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
      this.#name(row, now);
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

  // Give rows to the conversations that were active last.
  #assign(now) {
    const lately = (c) => (c.turns.some((turn) => !turn.end) ? Infinity : Math.max(...c.turns.map((turn) => turn.end)));
    for (const row of this.rows) {
      if (row.conversation && !this.model.conversations.has(row.conversation.id)) row.conversation = null;
    }
    const have = new Set(this.rows.map((row) => row.conversation));
    const rest = [...this.model.conversations.values()].filter((c) => !have.has(c) && lately(c) > now - this.span);
    rest.sort((a, b) => lately(b) - lately(a));
    for (const conversation of rest.slice(0, ROWS)) {
      let row = this.rows.find((row) => !row.conversation);
      if (!row) {
        const when = (row) => (row.conversation.id === this.own ? Infinity : lately(row.conversation));
        row = this.rows.reduce((a, b) => (when(b) < when(a) ? b : a));
        if (when(row) >= Math.min(lately(conversation), now)) return;
        for (const turn of row.conversation.turns) this.#remove(turn);
      }
      row.conversation = conversation;
    }
  }

  #name(row, now) {
    const { conversation, name } = row;
    setText(name, conversation?.id ?? "");
    name.title = conversation ? `${conversation.id}: at ${conversation.home || "no worker yet"}` : "";
    row.element.classList.toggle("own", Boolean(conversation && conversation.id === this.own));
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
    const label = `${turn.conversation.id}, turn ${turn.number}: ${place}${moved}, ${state}`;
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
