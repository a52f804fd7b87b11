"use strict";
// Shows what GET status answers, once a second. Every text is set as textContent, so none of it can become markup.

const POLL_MS = 1000;
const MAX_TOKENS = 1024;
const byId = (id) => document.getElementById(id);

function element(tag, text, className) {
  const made = document.createElement(tag);
  if (text !== undefined && text !== null) made.textContent = text;
  if (className) made.className = className;
  return made;
}

function table(heads, rows) {
  const made = element("table");
  const head = made.createTHead().insertRow();
  for (const text of heads) head.append(element("th", text));
  const body = made.createTBody();
  for (const cells of rows) {
    const row = body.insertRow();
    for (const cell of cells) {
      const place = row.insertCell();
      if (typeof cell === "number") {
        place.textContent = String(cell);
        place.className = "number";
      } else place.append(cell ?? "");
    }
  }
  return made;
}

// ---- numbers, with their units

const number = (value, digits = 1) =>
  value === null || value === undefined ? "–" : value >= 100 ? Math.round(value).toLocaleString("en") : value.toFixed(digits);
const seconds = (value) =>
  value === null || value === undefined ? "–" : value < 1 ? `${number(value * 1000, value < 0.01 ? 2 : 0)} ms` : `${number(value, 2)} s`;
const share = (value) => (value === null ? "–" : `${(100 * value).toFixed(0)} %`);
const UNITS = ["B", "KB", "MB", "GB", "TB"];

function bytes(value) {
  if (value === null) return "–";
  let unit = 0;
  for (; value >= 1000 && unit < UNITS.length - 1; unit += 1) value /= 1000;
  return `${unit ? number(value) : Math.round(value)} ${UNITS[unit]}`;
}

const slowest = (latency) => `p90 ${seconds(latency.p90_s)}, p99 ${seconds(latency.p99_s)}`;
const clock = (time_s) => new Date(time_s * 1000).toLocaleTimeString();

// ---- the parts of the picture

function showTiles(traffic) {
  const tiles = [
    [number(traffic.num_running, 0), "sequences running"],
    [number(traffic.num_waiting, 0), "waiting for admission"],
    [number(traffic.output_tokens_per_s), "output tokens/s"],
    [number(traffic.prompt_tokens_per_s), "prompt tokens/s"],
    [share(traffic.cached_share), "of these cached"],
    [number(traffic.requests_per_s, 2), "requests/s"],
    [seconds(traffic.time_to_first_token.p50_s), `TTFT p50; ${slowest(traffic.time_to_first_token)}`],
    [seconds(traffic.inter_token_latency.p50_s), `ITL p50; ${slowest(traffic.inter_token_latency)}`],
  ];
  byId("tiles").replaceChildren(
    ...tiles.map(([value, label]) => {
      const tile = element("div", null, "tile");
      tile.append(element("b", value), element("span", label));
      return tile;
    }),
  );
}

function line(points, values, most, className) {
  const first = points[0].time_s;
  const span = Math.max(1, points[points.length - 1].time_s - first);
  const made = document.createElementNS("http://www.w3.org/2000/svg", "polyline");
  const places = points
    .map((point, at) => [point, values[at]])
    .filter(([, value]) => value !== null)
    .map(([point, value]) => `${((300 * (point.time_s - first)) / span).toFixed(1)},${(78 - (76 * value) / most).toFixed(1)}`);
  made.setAttribute("points", places.join(" "));
  if (className) made.setAttribute("class", className);
  return made;
}

function chart(title, points, ...series) {
  const figure = element("figure");
  const all = series.flat().filter((value) => value !== null);
  const most = Math.max(...all, 0);
  const caption = element("figcaption");
  caption.append(element("span", title), element("span", all.length ? `most ${number(most)}` : ""));
  const picture = document.createElementNS("http://www.w3.org/2000/svg", "svg");
  picture.setAttribute("viewBox", "0 0 300 80");
  picture.setAttribute("preserveAspectRatio", "none");
  if (points.length) series.forEach((values, at) => picture.append(line(points, values, most || 1, at ? "second" : "")));
  figure.append(caption, picture);
  return figure;
}

function showCharts(points) {
  const of = (name) => points.map((point) => point[name]);
  byId("charts").replaceChildren(
    chart("output tokens/s", points, of("output_tokens_per_s")),
    chart("running, and waiting (orange)", points, of("num_running"), of("num_waiting")),
  );
}

const STATES = { ready: "ok", failed: "bad", restarting: "bad" };

function blocks(gang) {
  const kv = gang.blocks;
  if (!kv) return "";
  const box = element("div");
  const bar = element("div", null, "blocks");
  for (const [count, name] of [[kv.num_used, "used"], [kv.num_cached, "cached"]]) {
    const part = element("i", null, name);
    part.style.width = `${(100 * count) / Math.max(1, kv.num_total)}%`;
    bar.append(part);
  }
  box.append(bar, element("span", `${kv.num_used} used, ${kv.num_cached} cached of ${kv.num_total}`, "faint"));
  return box;
}

function ranks(gang) {
  const box = element("div");
  for (const rank of gang.ranks) {
    const age = rank.progress_age_s === null ? "starting" : `stepped ${seconds(rank.progress_age_s)} ago`;
    box.append(element("div", `${rank.rank}: ${rank.host}, pid ${rank.pid} (${age})`));
  }
  const shares = gang.stage_busy_shares ?? [];
  if (shares.length) box.append(element("div", `pipeline stages busy ${shares.map(share).join(" ")}`, "faint"));
  if (gang.rank_link && gang.rank_link.slow) box.append(element("div", gang.rank_link.slow, "trouble"));
  return box;
}

function gangName(gang) {
  const box = element("div", gang.gang_id);
  if (gang.starting) box.append(element("div", gang.starting, "faint"));
  if (gang.reason) box.append(element("div", gang.reason, "trouble"));
  return box;
}

function pool(one) {
  const box = element("div");
  box.append(element("h3", `${one.name} (${one.role}): ${one.num_ready} of ${one.num_wanted} gangs ready`));
  if (one.pressure !== null && one.pressure !== undefined) {
    box.append(element("p", `pressure ${number(one.pressure, 2)}${one.pressure_reason ? `: ${one.pressure_reason}` : ""}`));
  }
  if (one.update) box.append(element("p", `update ${one.update.state}: ${one.update.text}`));
  for (const text of [one.failure, one.notice]) if (text) box.append(element("p", text, "trouble"));
  const rows = one.gangs.map((gang) => [
    gangName(gang),
    element("span", gang.state, `badge ${STATES[gang.state] ?? "wait"}`),
    gang.num_running,
    gang.num_waiting,
    blocks(gang),
    number(gang.prompt_tokens_per_s),
    number(gang.output_tokens_per_s),
    ranks(gang),
  ]);
  box.append(table(["gang", "state", "running", "waiting", "KV blocks", "prompt tok/s", "output tok/s", "ranks"], rows));
  return box;
}

function showTransfers(transfers) {
  const counts = `${bytes(transfers.bytes_per_s)}/s now; ${bytes(transfers.num_bytes)} in ${transfers.num_blocks} blocks, ` +
    `${transfers.num_open} open, ${transfers.num_failures} failed`;
  const parts = [element("p", counts)];
  if (transfers.links.length) {
    const rows = transfers.links.map((link) => [
      link.source, link.target, `${number(link.megabytes_per_s)} MB/s`, `${number(link.latency_ms, 2)} ms`, link.error,
    ]);
    parts.push(table(["from", "to", "measured", "latency", ""], rows));
  }
  byId("transfers").replaceChildren(...parts);
}

function showFaults(faults) {
  const counts = `${faults.num_gang_faults} faults of gangs, ${faults.num_retries} attempts replayed, ` +
    `${faults.num_recovered} sequences recovered, ${faults.num_rejected} requests refused`;
  const rows = faults.events.slice(0, 12).map((event) => [clock(event.time_s), event.pool, event.kind, event.text]);
  byId("faults").replaceChildren(element("p", counts), table(["when", "pool", "what", ""], rows));
}

function show(status) {
  model = status.model;
  byId("model").textContent = `${status.model} · version ${status.version}`;
  byId("health").textContent = status.health;
  byId("health").className = `badge ${status.health === "ok" ? "ok" : "bad"}`;
  byId("reason").textContent = status.reason;
  const span = status.window_s === null ? "" : ` · rates over ${number(status.window_s, 0)} s`;
  byId("age").textContent = `${clock(status.time_s)}${span}`;
  showTiles(status.traffic);
  showCharts(status.history);
  byId("pools").replaceChildren(...status.pools.map(pool));
  showTransfers(status.transfers);
  showFaults(status.faults);
  const routers = status.routers.map((router) => [
    router.name, router.num_running, router.num_waiting, `${seconds(router.report_age_s)} ago`,
  ]);
  byId("routers").replaceChildren(table(["router", "running", "waiting", "reported"], routers));
}

async function poll() {
  if (!document.hidden) {
    try {
      const answer = await fetch("status", { cache: "no-store", signal: AbortSignal.timeout(10000) });
      if (!answer.ok) throw new Error(`status ${answer.status}`);
      show(await answer.json());
    } catch (error) {
      byId("health").textContent = "no answer";
      byId("health").className = "badge bad";
      byId("reason").textContent = String(error.message ?? error);
    }
  }
  setTimeout(poll, POLL_MS);
}

// ---- the chat

let model = "";
let conversation = [];
let asking = null;

function say(role, text) {
  const made = element("p", text, role);
  byId("talk").append(made);
  made.scrollIntoView({ block: "nearest" });
  return made;
}

async function* events(answer) {
  let rest = "";
  for await (const part of answer.body.pipeThrough(new TextDecoderStream())) {
    rest += part;
    for (let end; (end = rest.indexOf("\n\n")) >= 0; rest = rest.slice(end + 2)) {
      const data = rest.slice(0, end).split("\n").filter((row) => row.startsWith("data: ")).map((row) => row.slice(6)).join("\n");
      if (data) yield data;
    }
  }
}

async function ask(question) {
  conversation.push({ role: "user", content: question });
  say("user", question);
  const shown = say("assistant", "");
  let text = "";
  asking = new AbortController();
  try {
    const body = JSON.stringify({ model, messages: conversation, temperature: 0, max_tokens: MAX_TOKENS, stream: true });
    const headers = { "content-type": "application/json" };
    const answer = await fetch("chat", { method: "POST", headers, body, signal: asking.signal });
    if (!answer.ok) throw new Error((await answer.json()).error.message);
    let isWhole = false;
    for await (const data of events(answer)) {
      if (data === "[DONE]") { isWhole = true; break; }
      const event = JSON.parse(data);
      if (event.error) throw new Error(event.error.message);
      const delta = event.choices[0]?.delta ?? {};
      text += delta.content ?? "";
      shown.textContent = text;
    }
    if (!isWhole) throw new Error("the answer broke off");
  } catch (error) {
    if (error.name !== "AbortError") say("error", String(error.message ?? error));
  } finally {
    asking = null;
    if (text) conversation.push({ role: "assistant", content: text });
    else conversation.pop();
  }
}

async function submit(event) {
  event.preventDefault();
  const question = byId("question").value.trim();
  if (!question || asking) return;
  byId("question").value = "";
  byId("send").disabled = true;
  byId("stop").disabled = false;
  await ask(question);
  byId("send").disabled = false;
  byId("stop").disabled = true;
}

byId("chat").addEventListener("submit", submit);
byId("question").addEventListener("keydown", (event) => {
  if (event.key === "Enter" && !event.shiftKey) {
    event.preventDefault();
    byId("chat").requestSubmit();
  }
});
byId("stop").addEventListener("click", () => asking?.abort());
byId("clear").addEventListener("click", () => {
  asking?.abort();
  conversation = [];
  byId("talk").replaceChildren();
});
poll();
