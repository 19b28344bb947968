// The page that lives: asks the server for the list and for the chosen runs, and shows what is new.
const token = new URLSearchParams(location.search).get("token") || "";
const EVERY_MS = 4000;  // every answer delays the steps of a run on the same cores (benchmarks/watching.py)
const byId = id => document.getElementById(id);
let chosen = [], stamp = "", summaries = [], smoothing = null;
const chats = {};  // run -> { base: [...], tuned: [...] }

async function ask(path, body) {
  const options = { headers: { Authorization: "Bearer " + token } };
  if (body) Object.assign(options, { method: "POST", body: JSON.stringify(body) }), options.headers["Content-Type"] = "application/json";
  const answer = await fetch(path, options), content = await answer.json();
  if (!answer.ok) throw new Error(content.error || answer.statusText);
  return content;
}

function make(tag, className, text) {
  const element = document.createElement(tag);
  if (className) element.className = className;
  if (text !== undefined) element.textContent = text;
  return element;
}

function duration(seconds) {
  return seconds < 120 ? Math.round(seconds) + " s" : seconds < 7200 ? (seconds / 60).toFixed(1) + " min" : (seconds / 3600).toFixed(1) + " h";
}

function showRuns() {
  const rows = summaries.map(run => {
    const row = make("label", "run" + (chosen.includes(run.name) ? " on" : "")), tick = make("input");
    tick.type = "checkbox"; tick.checked = chosen.includes(run.name); tick.name = run.name;
    tick.addEventListener("change", () => choose(run.name, tick.checked));
    const words = [run.state, run.total_steps ? run.step + "/" + run.total_steps : "step " + run.step];
    if (run.heldout !== null) words.push("held-out " + shown(run.heldout, ""));
    else if (run.loss !== null) words.push("loss " + shown(run.loss, ""));
    if (run.eta_seconds !== null) words.push(duration(run.eta_seconds) + " left");
    if (run.warnings) words.push(run.warnings + " warning" + (run.warnings > 1 ? "s" : ""));
    row.append(tick, make("b", "", run.name), make("small", "", words.join(" · ")));
    if (run.state === "running" && run.total_steps) {
      const bar = make("progress"); bar.max = run.total_steps; bar.value = run.step; row.append(bar);
    }
    return row;
  });
  byId("runs").replaceChildren(...(rows.length ? rows : [make("p", "note", "There is no run in this folder yet.")]));
}

function choose(name, on) {
  chosen = on ? [...chosen, name] : chosen.filter(other => other !== name);
  stamp = "";
  showRuns();
  refreshView();
}

async function refreshView() {
  if (!chosen.length) { byId("view").replaceChildren(make("p", "note", "Choose a run; tick several to compare them.")); return; }
  const asked = chosen.join("\n"), query = chosen.map(name => "run=" + encodeURIComponent(name)).join("&");
  const answer = await ask("/api/view?" + query + "&since=" + encodeURIComponent(stamp));
  if (asked !== chosen.join("\n") || !answer.html) return;
  stamp = answer.stamp;
  const view = byId("view"), open = [...view.querySelectorAll("details")].map(part => part.open);
  const slider = view.querySelector(".smoothing input");
  if (slider) smoothing = slider.dataset.touched ? slider.value : null;
  const kept = [...view.querySelectorAll(".keeps")];
  view.innerHTML = answer.html;  // made and escaped by the server; the page's policy runs no other script
  view.querySelectorAll("details").forEach((part, index) => { part.open = open[index] || false; });
  openPage(view);
  const again = view.querySelector(".smoothing input");
  if (again) {
    again.addEventListener("input", () => { again.dataset.touched = "1"; });
    if (smoothing !== null) { again.value = smoothing; again.dispatchEvent(new Event("input")); }
  }
  addTools(view, kept);
}

// The parts with fields in which someone may be typing are made once for a choice of runs and kept.
function addTools(view, kept) {
  for (const name of chosen) {
    const run = summaries.find(other => other.name === name) || {};
    for (const [kind, has, tool] of [["ledger", run.ledger_rows, ledgerSearch], ["chat", run.can_chat, chatBox]]) {
      if (!has) continue;
      view.append(kept.find(part => part.dataset.run === name && part.dataset.kind === kind) || tool(name, kind));
    }
  }
}

function toolSection(name, kind, title) {
  const part = make("section", "keeps " + kind);
  part.dataset.run = name; part.dataset.kind = kind;
  part.append(make("h2", "", title + (chosen.length > 1 ? ": " + name : "")));
  return part;
}

function ledgerSearch(name, kind) {
  const part = toolSection(name, kind, "Search the ledger"), form = make("form", "search"), field = make("input"), found = make("div");
  field.placeholder = "a file, a reason, a fate …";
  form.append(field, make("button", "", "search"));
  form.addEventListener("submit", async event => {
    event.preventDefault();
    const answer = await ask("/api/ledger?run=" + encodeURIComponent(name) + "&text=" + encodeURIComponent(field.value));
    const table = make("table");
    for (const entry of answer.rows) {
      const row = make("tr");
      for (const key of ["source", "fate", "reason", "other", "tokens"]) row.append(make("td", "", entry[key] === undefined ? "" : String(entry[key])));
      table.append(row);
    }
    const scroll = make("div", "scroll"); scroll.append(table);
    found.replaceChildren(make("p", "note", answer.count + " of " + answer.of + " rows"), scroll);
  });
  part.append(form, found);
  return part;
}

function chatBox(name, kind) {
  const part = toolSection(name, kind, "Chat, base beside tuned"), turns = make("div", "turns"), form = make("form");
  const field = make("textarea"), send = make("button", "", "send"), reset = make("button", "", "reset");
  field.rows = 2; reset.type = "button";
  const talk = chats[name] = chats[name] || { base: [], tuned: [] };
  form.append(field, send, reset);
  reset.addEventListener("click", () => { talk.base = []; talk.tuned = []; turns.replaceChildren(); });
  form.addEventListener("submit", async event => {
    event.preventDefault();
    const question = field.value.trim();
    if (!question || send.disabled) return;
    send.disabled = true; field.value = "";
    turns.append(make("p", "turn", question));
    const boxes = ["base", "tuned"].map(side => {
      const box = make("div", "answer" + (side === "tuned" ? " c0" : ""));
      box.append(make("h4", "", side), make("pre", "", "…"));
      turns.append(box);
      return box;
    });
    const asked = { base: [...talk.base, { role: "user", content: question }], tuned: [...talk.tuned, { role: "user", content: question }] };
    try {
      const answer = await ask("/api/chat", { run: name, messages: asked });
      ["base", "tuned"].forEach((side, index) => {
        boxes[index].querySelector("pre").textContent = answer[side];
        talk[side] = [...asked[side], { role: "assistant", content: answer[side] }];
      });
    } catch (error) { boxes.forEach(box => { box.querySelector("pre").textContent = String(error.message); }); }
    send.disabled = false;
  });
  part.append(turns, form);
  return part;
}

async function refresh() {
  try {
    summaries = await ask("/api/runs");
    if (!chosen.length && stamp === "" && summaries.length) { chosen = [summaries[0].name]; }
    showRuns();
    await refreshView();
  } catch (error) {
    byId("runs").replaceChildren(make("p", "offline", "No answer: " + error.message));
  }
  setTimeout(refresh, document.hidden ? 5 * EVERY_MS : EVERY_MS);
}

if (byId("runs")) refresh();
