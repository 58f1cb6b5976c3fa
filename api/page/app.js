// The page's life: ask, show, ask again; dialogs.

import { Refused, changeRole, drain, hasKey, overview, report, useKey } from "./source.js";
import { el, text } from "./dom.js";
import { clock } from "./format.js";
import * as view from "./view.js";

const PAUSE_MS = 2000;
const FEW = 15; // lines of requests and of jobs
const MANY = 99; // with one more, as many jobs as the API tells
const byId = (id) => document.getElementById(id);
const status = byId("status");
let paused = false;
let timer = 0;
let said = "";
let rows = FEW;

function say(kind, words) {
  status.className = kind;
  text(status, words);
}

async function look() {
  clearTimeout(timer);
  try {
    const seen = await overview(rows + 1); // one more tells whether there are more
    const isMore = [seen.requests, seen.jobs.recent].some((list) => list.length > rows);
    seen.requests.length = Math.min(seen.requests.length, rows);
    seen.jobs.recent.length = Math.min(seen.jobs.recent.length, rows);
    byId("more").hidden = !isMore && rows === FEW;
    byId("main").hidden = false;
    view.showHead(seen);
    view.showProblems(said ? [said, ...seen.problems] : seen.problems);
    view.showFlow(seen);
    view.showCards(seen);
    view.showWorkers(seen, askDrain, askRole);
    view.showRequests(seen, openReport);
    view.showJobs(seen, openJob);
    text(byId("key"), seen.viewer.key ? `Key: ${seen.viewer.key}` : "Key …");
    byId("key").hidden = !seen.viewer.key && seen.viewer.sees_all && !hasKey();
    say("live", clock(seen.at));
  } catch (error) {
    if (error instanceof Refused && error.status === 401) {
      byId("key").hidden = false;
      say("lost", "a key is needed");
      askKey(hasKey() ? "This key is not known here." : "This API asks for a key.");
      return;
    }
    say("lost", error instanceof Refused ? error.message : "the API does not answer");
  }
  again();
}

function again() {
  clearTimeout(timer);
  if (!paused && !document.hidden) timer = setTimeout(look, PAUSE_MS);
}

document.addEventListener("visibilitychange", () => (document.hidden ? clearTimeout(timer) : !paused && look()));
byId("pause").addEventListener("click", () => {
  paused = !paused;
  byId("pause").setAttribute("aria-pressed", String(paused));
  text(byId("pause"), paused ? "Go on" : "Pause");
  if (paused) {
    clearTimeout(timer);
    say("", "paused");
  } else look();
});

byId("more").addEventListener("click", () => {
  const more = byId("more").getAttribute("aria-expanded") !== "true";
  rows = more ? MANY : FEW;
  byId("more").setAttribute("aria-expanded", String(more));
  text(byId("more"), more ? "Show fewer" : "Show more");
  look();
});

// -- dialogs ---------------------------------------------------------------------------------------

async function openReport(id) {
  text(byId("report-title"), id);
  byId("report-body").replaceChildren(el("p", { className: "quiet" }, "asking …"));
  byId("report").showModal();
  try {
    byId("report-body").replaceChildren(...view.reportOf(await report(id)));
  } catch (error) {
    const words = error.status === 404 ? "No stage has reported of it yet." : error.message;
    byId("report-body").replaceChildren(el("p", { className: "quiet" }, words));
  }
}

function openJob(job) {
  text(byId("report-title"), job.id);
  byId("report-body").replaceChildren(...view.reportOfJob(job));
  byId("report").showModal();
}

let toDrain = "";

function askDrain(worker, isLast) {
  toDrain = worker;
  text(byId("drain-title"), `Drain ${worker}?`);
  const name = worker.split("@")[0];
  const alone = isLast ? " No other worker of its stages is ready: new requests may be refused until then." : "";
  text(byId("drain-text"), `It takes nothing more. What it has begun goes to another worker of its stage, or is finished. It stays away until \`pdtasks restart ${name}\` brings it back.${alone}`);
  byId("ask-drain").returnValue = "no";
  byId("ask-drain").showModal();
}

byId("ask-drain").addEventListener("close", async () => {
  if (byId("ask-drain").returnValue !== "drain") return;
  said = "";
  try {
    await drain(toDrain);
  } catch (error) {
    said = `${toDrain} is not drained: ${error.message}`;
  }
  look();
});

let toChange = "";

function askRole(worker, role) {
  toChange = worker;
  text(byId("role-title"), `What is ${worker} to serve?`);
  text(byId("role-text"), `It serves ${role === "both" ? "both stages" : role} now. What it has begun in a stage that it leaves goes to another worker, or is finished; its engine stays.`);
  for (const button of byId("ask-role").querySelectorAll("button.act")) button.disabled = button.value === role;
  byId("ask-role").returnValue = "no";
  byId("ask-role").showModal();
}

byId("ask-role").addEventListener("close", async () => {
  const role = byId("ask-role").returnValue;
  if (role === "no") return;
  said = "";
  try {
    await changeRole(toChange, role);
  } catch (error) {
    said = `${toChange} does not become ${role}: ${error.message}`;
  }
  look();
});

function askKey(words) {
  text(byId("key-text"), `${words} It is kept in this tab until that is closed. An admin's key sees all requests and may drain workers and change their roles.`);
  byId("ask-key").returnValue = "no";
  if (!byId("ask-key").open) byId("ask-key").showModal();
}

byId("key").addEventListener("click", () => askKey(hasKey() ? "Another key, or none." : "An API key."));
byId("key-form").addEventListener("keydown", (event) => {
  if (event.key !== "Enter" || event.target.id !== "key-value") return;
  event.preventDefault(); // (it would be the first button's, which cancels)
  byId("ask-key").close("use");
});
byId("ask-key").addEventListener("close", () => {
  if (byId("ask-key").returnValue === "use") useKey(byId("key-value").value.trim());
  byId("key-value").value = "";
  if (byId("ask-key").returnValue === "use" || byId("main").hidden === false) look();
});
for (const dialog of document.querySelectorAll("dialog")) {
  dialog.addEventListener("click", (event) => event.target === dialog && dialog.close("no"));
}

look();
