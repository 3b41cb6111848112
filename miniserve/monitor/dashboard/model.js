// What is known of conversations and their turns, put together from live events and from GET /conversations/{id}.
// All times are seconds of the scheduler's clock.

export const KEEP_SECONDS = 610;
const MOST_TURNS = 20000;

// What a turn could have found of its prompt, had that not changed; undefined if nothing.
export const missOf = ({ conversation, number }) => conversation.misses.find((miss) => miss.turn === number);

export class Model {
  conversations = new Map();
  latest = null; // the turn that was decided last
  total = 0;
  active = 0;
  stale = new Set(); // conversations whose past should be asked for
  #turns = new Map(); // by request
  #offset = 0;

  now() {
    return performance.now() / 1000 + this.#offset;
  }

  // Called with the server's clock. The first reading counts, unless ours has slept since.
  setClock(time, anew = false) {
    if (anew || Math.abs(time - this.now()) > 1) this.#offset = time - performance.now() / 1000;
  }

  clear() {
    this.conversations.clear();
    this.#turns.clear();
    this.stale.clear();
    this.latest = null;
  }

  decision(d) {
    const conversation = this.#conversation(d.conversation, d.turn);
    const own = typeof d.conversation === "number"; // without a name its parent is a guess, which its card confirms
    const said = { ...d, id: conversation.id, client: d.said.client ?? "", kind: "", by: "" };
    if (!conversation.kind) this.identify(own ? { ...said, parent: null, group: said.id } : said);
    const turn = this.#turn(d.run.slice(0, d.run.lastIndexOf(".")), conversation, d.turn);
    turn.arrived = d.time - d.queued;
    if (!turn.first) turn.placed = d.time;
    if (conversation.home && conversation.home !== d.home) turn.movedFrom = conversation.home;
    conversation.home = turn.home = d.home;
    turn.prefillAt = d.prefill_at || d.home;
    turn.decision = d;
    turn.prompt = d.tokens;
    if (d.turn === 1) conversation.began ??= turn.arrived;
    this.latest = turn;
    turn.version += 1;
  }

  outcome(o) {
    const conversation = this.#conversation(o.conversation, o.turn);
    const turn = this.#turn(o.run.slice(0, o.run.lastIndexOf(".")), conversation, o.turn);
    turn.end = o.time;
    turn.first = o.output ? o.time - o.decode : null;
    turn.placed = o.time - o.decode - o.first_token;
    turn.arrived ??= turn.placed;
    Object.assign(turn, { prefill: o.prefill, moved: o.moved_pages, output: o.output, finish: o.finish, outcome: o });
    turn.live = false;
    turn.version += 1;
    if (!turn.home) this.stale.add(conversation.id); // it was decided before we listened
  }

  // The turns that wait or run now; those that we take to and that are not among them were cancelled in the queue.
  liveTurns(message) {
    this.setClock(message.time);
    this.total = message.conversations;
    this.active = message.total;
    const seen = new Set();
    for (const t of message.data) {
      const conversation = this.#conversation(t.conversation, t.turn);
      const turn = this.#turn(t.request, conversation, t.turn);
      seen.add(turn);
      turn.live = true;
      turn.arrived = t.arrived;
      turn.placed = t.placed;
      turn.first ??= t.first_token;
      Object.assign(turn, { home: t.home, prefillAt: t.prefill_at, prompt: t.prompt_tokens, output: t.output_tokens });
      conversation.home ||= t.home ?? "";
      if (t.turn === 1) conversation.began ??= t.arrived;
      turn.version += 1;
    }
    if (message.total > message.data.length) return;
    for (const turn of this.#turns.values()) if (!turn.end && !seen.has(turn)) this.#drop(turn);
  }

  // What a conversation is, as GET /conversations tells it: a guess may have been taken back since.
  identify({ id, kind, client, group, parent, by }) {
    const known = { kind, client, group: String(group), parent: parent === null ? null : String(parent), by };
    if (this.conversations.has(id)) Object.assign(this.conversations.get(id), known);
  }

  // The past of a conversation, as GET /conversations/{id} tells it.
  history(detail) {
    const conversation = this.#conversation(detail.id, 1);
    this.identify(detail);
    conversation.began ??= this.now() - detail.age;
    conversation.home ||= detail.home;
    conversation.misses = detail.misses;
    for (const turn of conversation.turns) turn.version += 1;
    for (const card of detail.history) {
      const known = conversation.turns.find((turn) => turn.number === card.turn);
      if (known?.home) continue;
      const turn = known ?? this.#turn(`${detail.id}#${card.turn}`, conversation, card.turn);
      const { queued, first_token, prefill, decode } = card.phases;
      turn.arrived = conversation.began + card.arrived;
      turn.placed = turn.arrived + queued;
      turn.first = turn.arrived + first_token;
      turn.end ??= turn.first + decode;
      Object.assign(turn, { home: card.home, prefillAt: card.prefill_at, moved: card.moved_pages, prefill });
      Object.assign(turn, { prompt: card.prompt_tokens, output: card.output_tokens, finish: card.finish });
      turn.version += 1;
    }
    conversation.turns.sort((a, b) => a.number - b.number);
    let home = null;
    for (const turn of conversation.turns) {
      if (home && turn.home && turn.home !== home) turn.movedFrom = home;
      home = turn.home || home;
    }
  }

  ended() {
    return [...this.#turns.values()].filter((turn) => turn.end && turn.first && turn.home);
  }

  // Forget what is too old to be shown.
  prune() {
    const before = this.now() - KEEP_SECONDS;
    let spare = this.#turns.size - MOST_TURNS;
    for (const turn of this.#turns.values()) {
      if (turn.end && (turn.end < before || spare-- > 0)) this.#drop(turn);
    }
  }

  #conversation(key, turn) {
    const id = String(key);
    let found = this.conversations.get(id);
    if (!found) {
      found = { id, turns: [], home: "", began: null, misses: [], kind: "", client: "", group: id, parent: null };
      this.conversations.set(id, found);
      if (turn > 1) this.stale.add(id); // when it began is not known yet
    }
    return found;
  }

  #turn(request, conversation, number) {
    let found = this.#turns.get(request);
    if (!found) {
      found = { request, conversation, number, live: true, first: null, version: 0 };
      this.#turns.set(request, found);
      conversation.turns.push(found);
    }
    return found;
  }

  #drop(turn) {
    const { conversation } = turn;
    this.#turns.delete(turn.request);
    conversation.turns.splice(conversation.turns.indexOf(turn), 1);
    if (!conversation.turns.length) this.conversations.delete(conversation.id);
    if (this.latest === turn) this.latest = null;
  }
}
