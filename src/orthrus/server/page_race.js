// The race: two answers, each written alone, are replayed on one clock.
const LANES = [["plain", "ar"], ["auto", "auto"]];
const FIGURES = [["speed", "tokens/s"], ["time", "seconds"], ["tokens", "tokens"], ["passes", "passes"], ["ratio", "tokens a pass"]];
let traces = null, drawnTo = {}, frame = 0, verdict = "";

function figures(lane, records, ms) {
  const { speed, tokens, passes, ratio } = totals(records, ms);
  const values = { speed: speed.toFixed(1), time: (ms / 1000).toFixed(2), tokens, passes, ratio: ratio.toFixed(2) };
  for (const [name] of FIGURES) at(lane + "-" + name).textContent = tokens ? values[name] : "–";
}

function bars(records, first, most) {
  const made = [];
  records.forEach((record, i) => {
    let top = most;
    for (const [kind, height] of [["", record.tokens.length - accepted(record)], ["drafted", accepted(record)]]) {
      const bar = document.createElementNS("http://www.w3.org/2000/svg", "rect");
      top -= height;
      const places = { class: kind, x: first + i + .1, y: top, width: .8, height };
      for (const [name, value] of Object.entries(places)) bar.setAttribute(name, value);
      made.push(bar);
    }
  });
  return made;
}

// Draws the race as it stood so many milliseconds after its start.
function draw(ms) {
  for (const [lane] of LANES) {
    const { records } = traces[lane], box = at(lane + "-text");
    let count = records.findIndex((record) => record.ms > ms);
    if (count < 0) count = records.length;
    if (count < drawnTo[lane]) clean(lane);
    const fresh = records.slice(drawnTo[lane], count);
    follow(box, () => box.append(...fresh.map(drawn)));
    if (lane === "auto") at("chart").append(...bars(fresh, drawnTo[lane], at("chart").viewBox.baseVal.height));
    drawnTo[lane] = count;
    figures(lane, records.slice(0, count), Math.min(ms, endOf(records)));
  }
  at("clock").value = ms;
  at("clock").setAttribute("aria-valuetext", (at("clock").value / 1000).toFixed(1) + " seconds");
}

function clean(lane) {
  drawnTo[lane] = 0;
  at(lane + "-text").replaceChildren();
  if (lane === "auto") at("chart").replaceChildren();
}

// The verdict comes last; whoever stops the clock need not wait for it.
function pause() {
  cancelAnimationFrame(frame);
  frame = 0;
  at("play").textContent = "Replay";
  if (!verdict || !at("verdict").hidden) return;
  at("verdict").hidden = false;
  if (!at("race").hidden) say(verdict);
}

function replay(from = 0) {
  const { records } = traces.auto, end = Math.max(...LANES.map(([lane]) => endOf(traces[lane].records)));
  const most = Math.max(1, ...records.map((record) => record.tokens.length));
  at("chart").setAttribute("viewBox", "0 0 " + Math.max(records.length, 1) + " " + most);
  at("chart").setAttribute("aria-label", "Tokens of each cycle: at most " + most + ", " +
    (sum(records, (record) => record.tokens.length) / Math.max(records.length, 1)).toFixed(2) + " on average");
  at("clock").max = Math.ceil(end);
  at("play").setAttribute("aria-disabled", false);
  cancelAnimationFrame(frame);
  if (matchMedia("(prefers-reduced-motion: reduce)").matches) {
    draw(end);
    return pause();
  }
  at("play").textContent = "Pause";
  const start = performance.now() - from;
  let last = -DRAW_MS;
  const tick = (now) => {
    frame = requestAnimationFrame(tick);
    if (now - last < DRAW_MS) return;
    last = now;
    draw(Math.min(now - start, end));
    if (now - start >= end) pause();
  };
  frame = requestAnimationFrame(tick);
}

// Where the answers part, -1 where they do not.
function parting() {
  const [plain, auto] = LANES.map(([lane]) => traces[lane].records.flatMap((record) => record.tokens));
  const first = plain.findIndex((token, i) => !auto[i] || auto[i].id !== token.id);
  return { plain, auto, first: first < 0 && auto.length > plain.length ? plain.length : first };
}

function judge(asked, isShared) {
  const { plain, auto, first } = parting(), isSame = first < 0;
  const quoted = (token) => token ? JSON.stringify(token.text) : "the end";
  const found = isSame ? "Identical: all " + plain.length + " tokens are the same."
    : "Different from token " + (first + 1) + " on: " + quoted(plain[first]) + " plainly, " + quoted(auto[first]) + " with drafts.";
  const [a, b] = LANES.map(([lane]) => totals(traces[lane].records, endOf(traces[lane].records)));
  const times = (value) => Number.isFinite(value) ? value.toFixed(2) + "×" : "–";
  const rows = [
    ["Seconds", (a.ms / 1000).toFixed(2), (b.ms / 1000).toFixed(2), times(a.ms / b.ms)],
    ["Passes", a.passes, b.passes, times(a.passes / b.passes)],
    ["Tokens/s", a.speed.toFixed(1), b.speed.toFixed(1), times(b.speed / a.speed)],
    ["Tokens a pass", a.ratio.toFixed(2), b.ratio.toFixed(2), times(b.ratio / a.ratio)],
    ["Drafts accepted", "", b.kept + " of " + b.drafted, ""],
  ];
  at("sums").replaceChildren(...rows.map((row) => {
    const line = element("tr");
    line.append(...row.map((value, i) => element(i ? "td" : "th", value)));
    line.firstChild.scope = "row";
    return line;
  }));
  const notes = ["Temperature " + asked.temperature + ", seed " + asked.seed + ", at most " + asked.max_tokens + " tokens."];
  if (at("about").textContent) notes.unshift(at("about").textContent + ".");
  if (!isSame) notes.push("A near-tie can fall either way where passes of different shape round differently; orthrus audit tells whether this is one.");
  if (isShared) notes.push("The server had other answers to write, so the times are shared: go by the passes.");
  else notes.push("The prompt was read once before, for both.");
  at("notes").textContent = notes.join(" ");
  const key = at("key").value.trim() ? " -H \"Authorization: Bearer $ORTHRUS_API_KEY\"" : "";
  at("curl").textContent = "curl " + new URL("v1/chat/completions", location.href) + key + " -H 'Content-Type: application/json' -d '" +
    JSON.stringify(asked).replaceAll("'", "'\\''") + "'";
  at("found").textContent = found;
  at("verdict").className = isSame ? "good" : "";
  return found + " Orthrus was " + (a.ms / b.ms).toFixed(2) + " times as fast, with " + b.passes + " passes instead of " + a.passes + ".";
}

async function race(signal) {
  const asked = question([{ role: "user", content: at("prompt").value }], "auto");
  verdict = "";
  pause();
  at("verdict").hidden = true;
  at("play").setAttribute("aria-disabled", true);
  traces = { plain: { records: [] }, auto: { records: [] } };
  for (const [lane] of LANES) {
    clean(lane);
    figures(lane, [], 0);
  }
  try {
    // What the cache holds of the prompt helps whoever comes second: now it helps both.
    await ask({ ...asked, max_tokens: 1 }, { records: [] }, { signal, phase: (what) => say(what + ".") });
    let others = 0;
    const look = async () => {
      const { running, waiting } = await load(signal);
      others += running + waiting;
    };
    for (const [lane, strategy] of LANES) {
      await look();
      const name = at(lane + "-name").textContent, trace = traces[lane];
      at(lane).setAttribute("aria-busy", true);
      let last = 0;
      await ask({ ...asked, orthrus: { strategy } }, trace, {
        signal,
        phase: (what) => say(name + ", alone. " + what + "."),
        seen: () => {
          if (performance.now() - last < 2 * DRAW_MS) return;
          last = performance.now();
          figures(lane, trace.records, endOf(trace.records));
        },
      });
      figures(lane, trace.records, endOf(trace.records));
      at(lane).setAttribute("aria-busy", false);
    }
    await look();
    verdict = judge(asked, others > 0);
    say("Both answers are replayed on one clock.");
    replay();
  } catch (error) {
    for (const [lane] of LANES) at(lane).setAttribute("aria-busy", false);
    if (LANES.some(([lane]) => traces[lane].records.length)) replay();
    throw error;
  }
}

for (const [lane] of LANES) {
  at(lane + "-figures").append(...FIGURES.map(([name, unit]) => {
    const pair = element("div"), value = element("dd", "–");
    value.id = lane + "-" + name;
    pair.append(element("dt", unit), value);
    return pair;
  }));
}
at("race-form").addEventListener("submit", (event) => { event.preventDefault(); run(race); });
at("prompt").addEventListener("keydown", (event) => {
  if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) at("race-form").requestSubmit();
});
at("play").addEventListener("click", () => {
  if (at("play").getAttribute("aria-disabled") === "true") return;
  const value = Number(at("clock").value);
  if (frame) pause();
  else replay(value < Number(at("clock").max) ? value : 0);
});
at("clock").addEventListener("input", () => {
  if (at("play").getAttribute("aria-disabled") === "true") return;
  pause();
  draw(Number(at("clock").value));
});
