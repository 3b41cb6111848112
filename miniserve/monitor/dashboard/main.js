// Listens to GET /v1/events, asks for what was before, and has all parts drawn.

import { Refused, events, getJson, hasKey, request, setKey } from "./api.js";
import { Charts } from "./charts.js";
import { Chat } from "./chat.js";
import { showDecision } from "./detail.js";
import { Lanes } from "./lanes.js";
import { Model } from "./model.js";
import { showPrefixes } from "./prefixes.js";
import { byId, setText } from "./util.js";
import { forgetWorkers, showWorkers } from "./workers.js";

const SILENCE_SECONDS = 10; // the server says something every second
const LONGEST_WAIT = 10;
const READING_SECONDS = 3;
const PAST = 40; // conversations whose past is asked for at the start, and later what they are
const LOOK_SECONDS = 1.5; // between looks at what they are and at what the doctor found

const model = new Model();
let policy = "";
let pointed = null;
let latest = null;
let latestSince = 0;
let lostUntil = 0;
let [lookAt, misses] = [0, 0];
const lanes = new Lanes(model, (turn) => {
  pointed = turn;
  showDetail();
});
const charts = new Charts(model);
new Chat((id) => (lanes.own = id));

const sleep = (s) => new Promise((resolve) => setTimeout(resolve, 1000 * s));

function status(state, text) {
  byId("status").dataset.state = state;
  setText(byId("status"), text);
}

// The turn that is pointed at, else the latest, which stays long enough to be read.
function showDetail() {
  const now = model.now();
  if (!latest || now - latestSince > READING_SECONDS) [latest, latestSince] = [model.latest, now];
  showDecision(pointed ?? latest, !pointed);
}

async function listen() {
  const abort = new AbortController();
  let timer;
  const alive = () => {
    clearTimeout(timer);
    timer = setTimeout(() => abort.abort(), 1000 * SILENCE_SECONDS);
  };
  alive();
  try {
    const response = await request("/v1/events", { signal: abort.signal });
    byId("key").hidden = true;
    for await (const { event, data } of events(response, alive)) take(event, JSON.parse(data));
  } finally {
    clearTimeout(timer);
    abort.abort();
  }
}

function take(event, data) {
  if (event === "start") {
    // Perhaps another server than before: what we knew may not be so any more.
    [model, lanes].forEach((part) => part.clear());
    forgetWorkers();
    [policy, pointed, latest, lookAt, misses] = [data.policy, null, null, 0, 0];
    model.setClock(data.time, true);
    lanes.setSpan(lanes.span);
    status("live", "live");
    begin().catch(() => {}); // the stream will tell if the server is gone
  } else if (event === "workers") {
    const queued = showWorkers(data);
    if (model.now() > lostUntil) status("live", queued ? `live, ${queued} queued` : "live");
    if (model.now() > lookAt && !document.hidden) look().catch(() => {});
  } else if (event === "turns") model.liveTurns(data);
  else if (event === "decision") model.decision(data);
  else if (event === "outcome") model.outcome(data);
  else if (event === "lost") {
    status("wait", `too much at once: ${data.events} events were lost`);
    lostUntil = model.now() + 5;
    begin().catch(() => {});
  }
}

async function begin() {
  const { data } = await getJson("/v1/models");
  setText(byId("about"), `${data[0].id}, policy ${policy}`);
  for (const card of (await getJson(`/conversations?limit=${PAST}`)).data) model.stale.add(card.id);
}

// What conversations are, and what the doctor found. If that is news, those that were active lately may have it.
async function look() {
  lookAt = model.now() + LOOK_SECONDS;
  const { data } = await getJson(`/conversations?limit=${PAST}`);
  data.forEach((card) => model.identify(card));
  const found = showPrefixes(await getJson("/v1/doctor"));
  if (found !== misses) for (const card of data) if (card.idle < 5 * LOOK_SECONDS) model.stale.add(card.id);
  misses = found;
}

// One after the other: the past is worth no crowd of requests.
async function askForPast() {
  for (;;) {
    const [id] = model.stale;
    if (id === undefined) {
      await sleep(0.5);
      continue;
    }
    model.stale.delete(id);
    try {
      model.history(await getJson(`/conversations/${encodeURIComponent(id)}`));
    } catch {
      await sleep(0.5); // forgotten meanwhile, or the server is gone: nothing to show either way
    }
  }
}

async function forever() {
  let wait = 1;
  for (;;) {
    const began = performance.now();
    try {
      await listen();
      status("gone", "the server has ended");
    } catch (error) {
      if (error instanceof Refused && error.status === 401) {
        await askForKey();
        continue;
      }
      status("gone", error instanceof Refused ? error.message : "the server is gone");
    }
    wait = performance.now() - began > 5000 ? 1 : Math.min(2 * wait, LONGEST_WAIT);
    const said = byId("status").textContent;
    for (let left = wait; left > 0; left--) {
      setText(byId("status"), `${said}; trying again in ${left} s`);
      await sleep(1);
    }
  }
}

function askForKey() {
  status("gone", hasKey() ? "the API key is wrong" : "an API key is needed");
  byId("key").hidden = false;
  byId("key-input").focus();
  return new Promise((resolve) => {
    byId("key").addEventListener("submit", (event) => {
      event.preventDefault();
      setKey(byId("key-input").value);
      byId("key-input").value = "";
      resolve();
    }, { once: true });
  });
}

byId("window").addEventListener("change", (event) => lanes.setSpan(Number(event.target.value)));
setInterval(() => {
  if (document.hidden) return;
  lanes.update();
  showDetail();
}, 200);
setInterval(() => {
  model.prune();
  if (!document.hidden) charts.update();
}, 1000);
forever();
askForPast();
