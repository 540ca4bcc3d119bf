"use strict";
// What both tabs share: settings, requests, and how an answer is drawn.
const at = (id) => document.getElementById(id);
const NUMBERS = ["tokens", "temperature", "seed"];
// Often enough for the eye; a page that draws each token slows the machine that is measured.
const DRAW_MS = 50;
let running = null;

function say(text, isBad = false) {
  at("status").textContent = text;
  at("status").className = isBad ? "bad" : "";
}

function element(name, text = "", kind = "") {
  const made = document.createElement(name);
  made.textContent = text;
  if (kind) made.className = kind;
  return made;
}

function headers() {
  const key = at("key").value.trim();
  return { "Content-Type": "application/json", ...(key ? { Authorization: "Bearer " + key } : {}) };
}

function question(messages, strategy) {
  const [max_tokens, temperature, seed] = NUMBERS.map((id) => Number(at(id).value));
  return { messages, max_tokens, temperature, seed, orthrus: { strategy } };
}

// One thing at a time: whatever else runs on the server makes times untrue. `work` gets a signal that Stop gives.
async function run(work) {
  if (running || !at("settings").reportValidity()) return;
  running = new AbortController();
  enable(true);
  try {
    await work(running.signal);
  } catch (error) {
    if (error.name === "AbortError") say("Stopped.");
    else say(error instanceof TypeError ? "The server cannot be reached: is it running?" : error.message, true);
  } finally {
    running = null;
    enable(false);
  }
}

// A button that were disabled would lose the keyboard's focus.
function enable(isRunning) {
  for (const id of ["go", "send", "clear"]) at(id).setAttribute("aria-disabled", isRunning);
  for (const button of document.querySelectorAll(".stop")) button.setAttribute("aria-disabled", !isRunning);
}

// Answers that run and that wait at the server.
async function load(signal) {
  const response = await fetch("metrics", { headers: headers(), signal });
  const text = response.ok ? await response.text() : "";
  const read = (name) => Number((text.match(new RegExp("^orthrus_num_requests_" + name + " (\\S+)", "m")) || [0, 0])[1]);
  return { running: read("running"), waiting: read("waiting") };
}

async function events(response, take) {
  const reader = response.body.getReader(), decoder = new TextDecoder();
  for (let rest = "";;) {
    const piece = await reader.read();
    if (piece.done) return;
    const lines = (rest + decoder.decode(piece.value, { stream: true })).split("\n");
    rest = lines.pop();
    for (const line of lines) if (line.startsWith("data: ") && line !== "data: [DONE]") take(JSON.parse(line.slice(6)));
  }
}

// Asks and reads: `trace` gets a record a cycle, each with the milliseconds since the request was sent. `phase` is
// told what happens, `seen` that records have come.
async function ask(body, trace, { signal, phase = () => {}, seen = () => {} }) {
  const start = performance.now();
  let isRead = false;
  phase("Queued");
  const silent = setInterval(async () => {
    const { waiting } = await load(signal).catch(() => ({ waiting: 0 }));
    if (waiting && !trace.records.length) phase("Queued, or reading the prompt: answers that wait at the server: " + waiting);
  }, 1000);
  try {
    const asked = { ...body, stream: true, orthrus: { ...body.orthrus, provenance: true } };
    const response = await fetch("v1/chat/completions",
      { method: "POST", headers: headers(), body: JSON.stringify(asked), signal });
    if (!response.ok) {
      const told = await response.json().catch(() => null);
      throw new Error(told && told.error ? told.error.message : "The server answered " + response.status + ".");
    }
    await events(response, (event) => {
      if (event.error) throw new Error(event.error.message);
      trace.metrics = event.metrics || trace.metrics;
      if (!isRead) phase("Reading the prompt" + (event.prompt_token_ids ? ", " + event.prompt_token_ids.length + " tokens" : ""));
      isRead = true;
      const choice = event.choices && event.choices[0];
      if (!choice || !choice.orthrus) return;
      if (!trace.records.length) {
        clearInterval(silent);
        phase("Writing");
      }
      trace.records.push({ ms: performance.now() - start, text: choice.delta.content || "", ...choice.orthrus });
      seen();
    });
  } finally {
    clearInterval(silent);
  }
}

const sum = (records, count) => records.reduce((so_far, record) => so_far + count(record), 0);
const accepted = (record) => record.tokens.filter((token) => token.draft).length;
const endOf = (records) => records.length ? records[records.length - 1].ms : 0;

// What an answer took. ms: until now.
function totals(records, ms) {
  const tokens = sum(records, (record) => record.tokens.length), passes = sum(records, (record) => record.passes);
  const drafted = sum(records, (record) => record.num_drafted), kept = sum(records, accepted);
  return { ms, tokens, passes, drafted, kept, speed: tokens && ms ? tokens / ms * 1000 : 0, ratio: passes ? tokens / passes : 0 };
}

// One record: runs of tokens that were drafted are marked, and rejected drafts are struck before the token that the model
// put in their place. Where tokens hold parts of characters the text goes as a whole.
function drawn(record) {
  const made = document.createDocumentFragment();
  const visible = record.tokens.filter((token) => !token.special);
  const isWhole = visible.map((token) => token.text).join("") === record.text;
  const tokens = isWhole ? visible : [{ text: record.text, draft: accepted(record) > 0 }];
  const replaces = isWhole && visible.length && !visible[visible.length - 1].draft ? 1 : 0;
  made.append(...marked(tokens.slice(0, tokens.length - replaces)), ...struck(record), ...marked(tokens.slice(tokens.length - replaces)));
  return made;
}

function marked(tokens) {
  const runs = [];
  for (const { text, draft } of tokens) {
    const last = runs[runs.length - 1];
    if (last && last.draft === draft) last.text += text;
    else runs.push({ text, draft });
  }
  return runs.filter((run) => run.text).map(({ text, draft }) => draft ? element("span", text, "draft") : text);
}

// The drafts that the model rejected: the text of those that would have come next, and how many there were.
function struck(record) {
  const missed = record.num_drafted - accepted(record);
  if (missed <= 0) return [];
  const mark = element("span", "", "missed");
  mark.dataset.struck = record.rejected.map((token) => token.text).join("").replaceAll("\n", "↵").replace(/\s+/g, " ");
  mark.dataset.missed = missed;
  return [mark];
}

// Changes what is in a box that scrolls, which follows unless its reader has scrolled away.
function follow(box, change) {
  const follows = box.scrollTop + box.clientHeight >= box.scrollHeight - 60;
  change();
  if (follows) box.scrollTop = box.scrollHeight;
}

function show(name) {
  for (const tab of document.querySelectorAll("[role=tab]")) {
    const isShown = tab.id === name + "-tab";
    tab.setAttribute("aria-selected", isShown);
    tab.tabIndex = isShown ? 0 : -1;
    at(tab.getAttribute("aria-controls")).hidden = !isShown;
  }
}

for (const name of ["race", "chat"]) at(name + "-tab").addEventListener("click", () => show(name));
document.querySelector("[role=tablist]").addEventListener("keydown", (event) => {
  const step = { ArrowLeft: -1, ArrowRight: 1, Home: -1, End: 1 }[event.key];
  if (!step) return;
  event.preventDefault();
  // Of two tabs the other one lies on either side.
  const isRace = at("race-tab").getAttribute("aria-selected") === "true";
  const name = event.key === "Home" ? "race" : event.key === "End" || isRace ? "chat" : "race";
  show(name);
  at(name + "-tab").focus();
});
const halt = () => running && running.abort();
for (const button of document.querySelectorAll(".stop")) button.addEventListener("click", halt);
addEventListener("keydown", (event) => event.key === "Escape" && halt());
addEventListener("pagehide", halt);
at("settings").addEventListener("submit", (event) => event.preventDefault());
// The page itself says it where no key is needed.
const tell = () => at("about").textContent || fetch("v1/models", { headers: headers() })
  .then((response) => response.ok ? response.json() : null)
  .then((found) => { if (found) at("about").textContent = found.data[0].id; })
  .catch(() => {});
tell();
at("key").addEventListener("change", tell);
at("marks").addEventListener("change", () => document.body.classList.toggle("unmarked", !at("marks").checked));
