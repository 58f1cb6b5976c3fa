// What does each part of the page show of an overview?

import { drawChart, makeChart, watchPointer } from "./charts.js";
import { each, el, text } from "./dom.js";
import { NOTHING, clock, count, duration, plural, share, size } from "./format.js";

const byId = (id) => document.getElementById(id);

export function showHead(seen) {
  text(byId("model"), seen.api.model);
  const own = `API process ${seen.api.pid} on ${seen.api.host}, up ${duration(seen.at - seen.api.since)}`;
  text(byId("process"), seen.others.length ? `${own}; with ${plural(seen.others.length, "other")}` : own);
  byId("process").title = seen.others.map((api) => `API process ${api.pid} on ${api.host}`).join("\n");
  document.title = `${seen.api.model} · pdtasks`;
}

export function showProblems(lines) {
  const place = byId("problems");
  place.hidden = lines.length === 0;
  text(place, lines.join("\n"));
}

const serves = (worker, stage) => worker.role === stage || worker.role === "both";

// -- the pipeline ----------------------------------------------------------------------------------

export function showFlow(seen) {
  const flight = seen.in_flight;
  const queues = new Map(seen.queues.map((queue) => [queue.name, queue]));
  const ready = (stage) => seen.workers.filter((worker) => serves(worker, stage) && worker.state === "ready");
  const queued = (name) => {
    const queue = queues.get(name);
    return queue && queue.ready !== null ? `${count(queue.ready)} in queue` : "queue unknown";
  };
  const busy = (stage) => {
    const workers = ready(stage);
    const sum = (name) => workers.reduce((total, worker) => total + worker[name], 0);
    return workers.length ? `${plural(workers.length, "worker")}, ${sum("active")} of ${sum("slots")} slots` : "no worker is ready";
  };
  const oldest = (name) => queues.get(name)?.oldest_s ?? null;
  const waits = (seconds) => (seconds !== null && seconds > 0.5 ? `oldest waits ${duration(seconds)}` : "");
  const dead = queues.get("pdtasks.dead")?.ready;
  const steps = [
    { name: "In line", class: "line", count: flight.in_line, more: "until it is their turn", waits: "" },
    { name: "Prefill", class: "prefill", count: flight.prefill, more: `${queued("prefill")}; ${busy("prefill")}`, waits: waits(oldest("prefill")) },
    { name: "Hand-over", class: "handover", count: flight.handover, more: queued("decode"), waits: waits(oldest("decode")) },
    { name: "Decode", class: "decode", count: flight.decode, more: busy("decode"), waits: dead ? `${plural(dead, "dead letter")}` : "" },
  ];
  each(
    byId("flow"),
    steps,
    (step) => step.name,
    (step) => el("li", { className: step.class }, ...["name", "count", "more", "waits"].map((part) => el("p", { className: part }))),
    (item, step) => {
      const [name, number, more, late] = item.children;
      text(name, step.name);
      text(number, count(step.count));
      text(more, step.more);
      text(late, step.waits);
    },
  );
  text(byId("flight-note"), seen.others.length ? `requests of all ${seen.others.length + 1} API processes` : "");
}

// -- latencies -------------------------------------------------------------------------------------

const ratio = (kv) => share(kv.blocks_loaded, kv.blocks_loaded + kv.blocks_recomputed);
const CARDS = [
  { name: "First token", class: "ttft", big: (w) => duration(w.ttft.p50_s), small: (w) => tails(w.ttft), series: (s) => s.ttft_p50_s, unit: duration },
  { name: "Gap to the second", class: "gap", big: (w) => duration(w.gap.p50_s), small: (w) => tails(w.gap), series: (s) => s.gap_p50_s, unit: duration },
  { name: "Between tokens", class: "itl", big: (w) => duration(w.itl.p50_s), small: (w) => tails(w.itl), series: (s) => s.itl_p50_s, unit: duration },
  {
    name: "Tokens",
    class: "rate",
    big: (w) => `${count(Math.round(w.tokens_per_s))}`,
    after: " /s",
    small: (w) => `${plural(w.requests, "answer")}, ${count(w.failed)} failed`,
    series: (s, w) => s.tokens / w.slot_s,
    unit: (value) => `${count(Math.round(value))} /s`,
  },
  {
    name: "KV handed over",
    class: "kv",
    big: (w) => ratio(w.kv),
    after: " of blocks",
    small: (w) => `${size(w.kv.bytes_loaded)} loaded, ${size(w.kv.bytes_written)} written`,
    more: (w, seen) => stored(w, seen),
    series: (s, w) => s.kv_bytes / w.slot_s,
    unit: (value) => `${size(value)}/s`,
  },
];

const tails = (q) => `p95 ${duration(q.p95_s)} · p99 ${duration(q.p99_s)}`;

function stored(window, seen) {
  const kv = window.kv;
  const parts = [`${share(kv.cached_tokens, kv.prompt_tokens)} of prompt tokens cached`];
  for (const store of seen.stores) {
    const fill = store.max_bytes ? `${share(store.used_bytes, store.max_bytes)} of ${size(store.max_bytes)}` : size(store.used_bytes);
    const asked = store.hits + store.misses;
    parts.push(`store ${fill}${asked ? `, ${share(store.hits, asked)} hits` : ""}${store.evicted ? `, ${count(store.evicted)} evicted` : ""}`);
  }
  return parts.join("\n");
}

const drawn = new Map();

export function showCards(seen) {
  const window = seen.window;
  // (the last slot has only begun: a rate of it would always fall)
  const full = window.slots.slice(0, -1);
  const slots = Math.max(full.length, Math.round(300 / window.slot_s) - 1);
  text(byId("window-note"), `medians of the last ${duration(window.seconds)}`);
  each(
    byId("cards"),
    CARDS,
    (card) => card.name,
    (card) => makeCard(card, slots),
    (element, card) => {
      const [, big, small, more, , chart, foot] = element.children;
      text(big.firstChild, card.big(window));
      text(small, card.small(window));
      more.hidden = !card.more;
      if (card.more) text(more, card.more(window, seen));
      const values = full.map((slot) => card.series(slot, window));
      drawn.set(card.name, { values, slots: full });
      drawChart(chart, values, slots);
      const highest = Math.max(...values.map((value) => value ?? -1), -1);
      chart.setAttribute("aria-label", `${card.name} over the last ${duration(window.seconds)}, at most ${highest < 0 ? NOTHING : card.unit(highest)}`);
      if (!foot.dataset.held) {
        text(foot.firstChild, "5 min ago");
        text(foot.lastChild, highest < 0 ? "" : `max ${card.unit(highest)}`);
      }
    },
  );
}

function makeCard(card, slots) {
  const chart = makeChart(card.name);
  const foot = el("p", { className: "foot" }, el("span"), el("span"));
  const big = el("p", { className: "big" }, el("span"), el("small", {}, card.after ?? ""));
  watchPointer(chart, () => drawn.get(card.name)?.values.length ?? 0, slots, (index) => {
    if (index === null) {
      delete foot.dataset.held;
      return;
    }
    foot.dataset.held = "yes";
    const { values, slots: at } = drawn.get(card.name);
    text(foot.firstChild, clock(at[index].at));
    text(foot.lastChild, values[index] === null ? "nothing" : card.unit(values[index]));
  });
  return el("article", { className: `card ${card.class}` }, el("h3", {}, card.name), big, el("p", { className: "small" }), el("p", { className: "small" }), el("div", { className: "fill" }), chart, foot);
}

// -- workers ---------------------------------------------------------------------------------------

function meter(label) {
  const fill = el("div", { className: "fill" });
  return el("div", { className: "meter", "aria-label": label }, el("div", { className: "track", "aria-hidden": "true" }, fill), el("span"));
}

function fillMeter(place, part, words) {
  place.firstChild.firstChild.style.width = `${Math.min(100, 100 * part)}%`;
  text(place.lastChild, words);
}

export function showWorkers(seen, onDrain, onRole) {
  const states = seen.workers.filter((worker) => worker.state === "ready").length;
  text(byId("workers-note"), `${states} of ${seen.workers.length} ready`);
  each(
    byId("workers"),
    seen.workers,
    (worker) => worker.name,
    (worker) => {
      const drain = el("button", { type: "button", "aria-label": `Drain ${worker.name}` }, "Drain");
      drain.addEventListener("click", () => onDrain(worker.name, row.isLast));
      const role = el("button", { type: "button", "aria-label": `Role of ${worker.name}` }, "Role");
      role.addEventListener("click", () => onRole(worker.name, row.role));
      const cells = [
        el("td", {}, el("span"), worker.name),
        el("td", {}, el("span"), el("span", { className: "reason" })),
        el("td", { className: "slim" }),
        el("td", {}, meter("slots in use")),
        el("td", {}, meter("KV in use")),
        el("td", { className: "num" }),
        el("td", { className: "acts" }, role, " ", drain),
      ];
      const row = el("tr", {}, ...cells);
      return row;
    },
    (row, worker) => {
      const others = seen.workers.filter((other) => other.name !== worker.name && other.state === "ready");
      row.isLast = ["prefill", "decode"].some((stage) => serves(worker, stage) && !others.some((other) => serves(other, stage)));
      row.role = worker.role;
      const [name, state, device, slots, kv, up, act] = row.children;
      name.firstChild.className = `role ${worker.role}`;
      name.firstChild.title = worker.role;
      slots.className = kv.className = worker.role;
      text(state.firstChild, worker.state);
      state.firstChild.className = `pill ${worker.state}`;
      text(state.lastChild, worker.reason);
      text(device, worker.device || NOTHING);
      fillMeter(slots.firstChild, worker.slots ? worker.active / worker.slots : 0, `${worker.active} of ${worker.slots}`);
      fillMeter(kv.firstChild, worker.kv_usage, `${Math.round(100 * worker.kv_usage)}%`);
      text(up, duration(seen.at - worker.since));
      const [change, drain] = act.querySelectorAll("button");
      change.hidden = !seen.viewer.may_act || !["ready", "changing"].includes(worker.state);
      drain.hidden = !seen.viewer.may_act || !["ready", "changing", "stalled"].includes(worker.state);
    },
  );
}

// -- requests and jobs -----------------------------------------------------------------------------

const RUNNING = ["line", "prefill", "handover", "decode", "queued"];
const NAMES = { line: "in line", handover: "hand-over" };
const PARTS = ["queue", "prefill", "handover", "decode"];

function pill(element, state) {
  const kind = RUNNING.includes(state) ? "run" : ["done", "stopped", "succeeded", "cancelled"].includes(state) ? state : "failed";
  element.className = `pill ${kind}`;
  text(element, NAMES[state] ?? state.replaceAll("_", " "));
}

export function makeBar() {
  return el("div", { className: "bar", role: "img" }, ...PARTS.map((part) => el("span", { className: part })));
}

export function fillBar(bar, way, longest) {
  PARTS.forEach((part, index) => {
    bar.children[index].style.width = `${(100 * way[`${part}_s`]) / longest}%`;
  });
  bar.setAttribute("aria-label", PARTS.map((part) => `${part} ${duration(way[`${part}_s`])}`).join(", "));
}

const whole = (way) => PARTS.reduce((sum, part) => sum + way[`${part}_s`], 0);

function idCell(id, open) {
  const button = el("button", { className: "id", type: "button", title: id }, id);
  button.addEventListener("click", (event) => {
    event.stopPropagation();
    open();
  });
  return el("td", {}, button, el("span", { className: "key" }));
}

export function showRequests(seen, onOpen) {
  const requests = seen.requests;
  const longest = Math.max(...requests.map((request) => whole(request.way)), 0.001);
  text(byId("requests-note"), `the newest ${requests.length}; bars of ${duration(longest)} are full`);
  byId("no-requests").hidden = requests.length > 0;
  const seenIds = new Map(); // several answers to one request share its id
  const keys = new Map(requests.map((request) => {
    const nth = seenIds.get(request.id) ?? 0;
    seenIds.set(request.id, nth + 1);
    return [request, `${request.id} ${request.submitted_at} ${nth}`];
  }));
  each(
    byId("requests"),
    requests,
    (request) => keys.get(request),
    (request) => {
      const open = () => onOpen(request.id);
      const numbers = ["num slim", "num slim", "num slim", "num slim", "num"].map((className) => el("td", { className }));
      const row = el("tr", {}, idCell(request.id, open), el("td", {}, el("span")), ...numbers, el("td", { className: "way" }, makeBar()));
      row.addEventListener("click", open);
      return row;
    },
    (row, request) => {
      const [id, state, prompt, answer, first, gap, total, way] = row.children;
      text(id.lastChild, request.key);
      pill(state.firstChild, request.state);
      text(prompt, count(request.prompt_tokens));
      text(answer, count(request.output_tokens));
      text(first, duration(request.first_s));
      text(gap, request.second_s === null ? NOTHING : duration(request.second_s - request.first_s));
      text(total, duration(request.seconds));
      fillBar(way.firstChild, request.way, longest);
    },
  );
}

// A job's way, from when its stages began.
function wayOfJob(job, at) {
  const end = job.finished_at ?? at;
  const [first] = job.stages;
  const decode = job.stages.findLast((stage) => stage[0] === "decode");
  const began = first ? first[2] : end;
  const token = Math.min(job.first_token_at ?? decode?.[2] ?? end, end);
  const decoding = Math.min(Math.max(decode ? decode[2] : end, token), end);
  const positive = (seconds) => Math.max(0, seconds);
  return { queue_s: positive(began - job.created_at), prefill_s: positive(token - began), handover_s: positive(decoding - token), decode_s: positive(end - decoding) };
}

export function showJobs(seen, onOpen) {
  const { waiting, running, recent } = seen.jobs;
  text(byId("jobs-note"), `${count(waiting)} wait, ${count(running)} run`);
  byId("no-jobs").hidden = recent.length > 0;
  const jobs = recent.map((job) => ({ ...job, way: wayOfJob(job, seen.at) }));
  const longest = Math.max(...jobs.map((job) => whole(job.way)), 0.001);
  each(
    byId("jobs"),
    jobs,
    (job) => job.id,
    (job) => {
      const cells = [idCell(job.id, () => onOpen(row.job)), el("td", {}, el("span")), el("td", { className: "slim" }), el("td", { className: "num slim" }), el("td", { className: "num" }), el("td", { className: "way" }, makeBar())];
      const row = el("tr", {}, ...cells);
      row.addEventListener("click", () => onOpen(row.job));
      return row;
    },
    (row, job) => {
      row.job = job;
      const [id, state, workers, first, total, way] = row.children;
      text(id.lastChild, job.key);
      pill(state.firstChild, job.state);
      text(workers, [...new Set(job.stages.map((stage) => stage[1].split("@")[0]))].join(" → ") || NOTHING);
      text(first, duration(job.first_token_at === null ? null : job.first_token_at - job.created_at));
      text(total, duration((job.finished_at ?? seen.at) - job.created_at));
      fillBar(way.firstChild, job.way, longest);
    },
  );
}

// -- the report of one -----------------------------------------------------------------------------

const ROWS = [
  ["worker", (r) => r.worker],
  ["waited", (r) => duration(r.queue_s)],
  ["at work", (r) => duration(r.seconds)],
  ["prompt tokens", (r) => count(r.prompt_tokens)],
  ["tokens made", (r) => count(r.output_tokens)],
  ["found in its own cache", (r) => some(r.cached_tokens, "token")],
  ["KV written", (r) => some(r.kv_blocks_written, "block", r.kv_bytes_written)],
  ["KV loaded", (r) => some(r.kv_blocks_loaded, "block", r.kv_bytes_loaded)],
  ["KV computed again", (r) => some(r.kv_blocks_recomputed, "block")],
  ["time for KV", (r) => (r.kv_seconds ? duration(r.kv_seconds) : NOTHING)],
];

function some(number, word, bytes = 0) {
  return number ? plural(number, word) + (bytes ? `, ${size(bytes)}` : "") : NOTHING;
}

function facts(pairs) {
  return el("dl", { className: "facts" }, ...pairs.map(([name, value]) => el("div", {}, el("dt", {}, name), el("dd", {}, value))));
}

// Why a request was left to one worker; nothing is said of both stages.
const WAYS = {
  short_prompt: "One worker did all of it: the prompt is short.",
  no_prefill_worker: "One worker did all of it: no other one took prompts.",
  prefill_busy: "One worker did all of it: prefill was busy, decode was not.",
  wished: "One worker did all of it, as its caller wished.",
};

export function reportOf(found) {
  return found.times.flatMap((times, index) => {
    const stages = found.sequences[index];
    const names = ["prefill", "decode"].filter((name) => stages[name]);
    const bar = makeBar();
    fillBar(bar, times.way, Math.max(whole(times.way), 0.001));
    const decoded = times.second_s === null ? 0 : times.seconds - times.first_s;
    const head = el("tr", {}, el("td"), ...names.map((name) => el("th", { scope: "col", className: "num" }, name)));
    const rows = ROWS.map(([label, of]) => el("tr", {}, el("th", { scope: "row" }, label), ...names.map((name) => el("td", { className: "num" }, of(stages[name])))));
    return [
      facts([
        ["state", NAMES[times.state] ?? times.state],
        ["first token", duration(times.first_s)],
        ["gap", times.second_s === null ? NOTHING : duration(times.second_s - times.first_s)],
        ["total", duration(times.seconds)],
        ["tokens/s", decoded > 0 ? ((times.output_tokens - 1) / decoded).toFixed(1) : NOTHING],
      ]),
      ...(WAYS[times.route] ? [el("p", { className: "quiet" }, WAYS[times.route])] : []),
      bar,
      el("table", {}, el("thead", {}, head), el("tbody", {}, ...rows)),
    ];
  });
}

export function reportOfJob(job) {
  const bar = makeBar();
  fillBar(bar, job.way, Math.max(whole(job.way), 0.001));
  const rows = job.stages.map(([stage, worker, at]) => el("tr", {}, el("th", { scope: "row" }, stage), el("td", {}, worker), el("td", { className: "num" }, clock(at))));
  return [
    facts([["state", job.state], ["attempts", count(job.attempts)], ["created", clock(job.created_at)], ["ended", job.finished_at === null ? NOTHING : clock(job.finished_at)]]),
    bar,
    el("table", {}, el("tbody", {}, ...rows)),
  ];
}
