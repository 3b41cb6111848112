// Which conversations have a lane, and in which order: those of a group stand together, each below its parent.

export const ROWS = 20;

// When a conversation had a turn last: Infinity while one runs.
function lately({ turns }) {
  return turns.some((turn) => !turn.end) ? Infinity : Math.max(...turns.map((turn) => turn.end));
}

// In words, what a conversation is to its parent; "" if it has none.
export function kindOf({ kind, by }) {
  if (kind === "side") return "side request: not counted as a turn";
  if (kind === "sub-agent") return by === "prefix" ? "perhaps a sub-agent" : "sub-agent";
  return kind === "fork" ? "fork" : "";
}

export function describe(conversation) {
  const parent = conversation.parent === null ? "" : `parent ${conversation.parent}`;
  return [conversation.client, kindOf(conversation), parent].filter(Boolean).join(", ");
}

// Parents come from clients: they may be unknown, or go round in a circle.
function groupOf(conversation, all) {
  const seen = new Set();
  let top = conversation;
  for (; all.has(top.parent) && !seen.has(top); top = all.get(top.parent)) seen.add(top);
  return top.parent === null ? top.id : top.group;
}

// The lanes of the groups that were active after `after` or are still `shown`: the latest that there is room for, the
// last of them perhaps in part. Those of `order` stay in place, others come where some have left; `own` is among them.
export function arrange(all, order, shown, own, after) {
  const when = new Map([...all.values()].map((c) => [c, c.id === own ? Infinity : lately(c)]));
  const recent = (c) => when.get(c) > after;
  const found = [...when.keys()].filter((c) => recent(c) || shown.has(c));
  const newest = (a, b) => (when.get(b) > when.get(a)) - (when.get(b) < when.get(a));
  found.sort((a, b) => newest(a, b) || shown.has(b) - shown.has(a));
  let room = ROWS;
  const groups = new Map();
  for (const [key, members] of Map.groupBy(found, (c) => groupOf(c, all))) {
    const first = [all.get(key)].filter((c) => c && groupOf(c, all) === key);
    const rest = members.filter((c) => c !== first[0] && (recent(c) || found.length <= ROWS));
    const lanes = [...first, ...rest].slice(0, room);
    if (lanes.length) groups.set(key, lanes);
    room -= lanes.length;
  }
  const fresh = [...groups.keys()].filter((key) => !order.includes(key));
  const kept = order.map((key) => (groups.has(key) ? key : fresh.shift())).filter((key) => key !== undefined);
  kept.push(...fresh);
  return { order: kept, lanes: kept.flatMap((key) => tree(groups.get(key))) };
}

// Each with its depth, and how many lanes above it its parent is (0: it is not shown).
function tree(members) {
  const began = (c) => (c.parent === null ? 0 : c.began ?? 1e12);
  members.sort((a, b) => began(a) - began(b));
  const [at, lanes] = [new Map(), []];
  const visit = (conversation, depth) => {
    if (at.has(conversation.id)) return;
    const up = at.has(conversation.parent) ? lanes.length - at.get(conversation.parent) : 0;
    at.set(conversation.id, lanes.length);
    lanes.push({ conversation, depth: Math.min(depth, 3), up });
    for (const child of members) if (child.parent === conversation.id) visit(child, depth + 1);
  };
  const alone = ({ parent }) => !members.some((member) => member.id === parent);
  for (const member of members.filter(alone)) visit(member, member.parent === null ? 0 : 1);
  for (const member of members) visit(member, 0); // those in a circle
  return lanes;
}
