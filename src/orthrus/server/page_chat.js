// The chat: turns with live figures. What was stopped stays as far as it came.
let turns = [];

function turn(who, kind) {
  const made = element("article", "", kind), body = element("div");
  body.dir = "auto";
  made.append(element("h3", who), body);
  at("log").append(made);
  return { made, body };
}

async function chat(signal) {
  const asked = at("message").value, trace = { records: [] }, mine = turn("You", "asked");
  mine.body.textContent = asked;
  const answer = turn("Orthrus", "answered"), line = element("p", "", "soft");
  answer.made.append(line);
  at("message").value = "";
  at("log").scrollTop = at("log").scrollHeight;
  let count = 0, last = 0, end = "";
  const update = () => follow(at("log"), () => {
    answer.body.append(...trace.records.slice(count).map(drawn));
    count = trace.records.length;
    const { ms, tokens, passes, speed, ratio } = totals(trace.records, endOf(trace.records));
    line.textContent = [speed.toFixed(1) + " tokens/s", (ms / 1000).toFixed(2) + " s", tokens + " tokens", passes + " passes",
      ratio.toFixed(2) + " tokens a pass"].join(" · ") + end;
  });
  const messages = [...turns, { role: "user", content: asked }];
  try {
    await ask(question(messages, "auto"), trace, {
      signal,
      phase: (what) => {
        say(what + ".");
        follow(at("log"), () => { line.textContent = what; });
      },
      seen: () => {
        if (performance.now() - last < DRAW_MS) return;
        last = performance.now();
        update();
      },
    });
    if (trace.metrics && trace.metrics.orthrus.finish_reasons[0] === "length") end = " · as many tokens as were allowed";
    say("Answered: " + totals(trace.records, 0).tokens + " tokens.");
  } catch (error) {
    end = error.name === "AbortError" ? " · stopped" : " · failed";
    if (!trace.records.length) {
      mine.made.remove();
      answer.made.remove();
      at("message").value ||= asked;
    }
    throw error;
  } finally {
    if (trace.records.length) {
      turns = [...messages, { role: "assistant", content: trace.records.map((record) => record.text).join("") }];
      update();
    }
  }
}

at("chat-form").addEventListener("submit", (event) => { event.preventDefault(); run(chat); });
at("message").addEventListener("keydown", (event) => {
  if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
  event.preventDefault();
  at("chat-form").requestSubmit();
});
at("clear").addEventListener("click", () => {
  if (running) return;
  turns = [];
  at("log").replaceChildren();
  say("Cleared.");
  at("message").focus();
});
