"use strict";
// Shows the updates that the server sends, and searches. Everything that comes is text: it is set as textContent, never
// as HTML. firmware_tools/ui/rows.py says what each field is.

const byId = (id) => document.getElementById(id);
const CHART = { minutes: 60, width: 120, height: 30 };
const boards = new Map(), servers = new Map();  // id to the parts of its row
let now = 0;  // Unix seconds of the server's machine

// ---- values as text ----

const percent = (share) => `${Math.round(100 * share)} %`;
const count = (value) => value.toLocaleString("en");
const millis = (ms) => ms < 1000 ? `${ms < 10 ? ms.toFixed(1) : Math.round(ms)} ms` : `${(ms / 1000).toFixed(1)} s`;
const bytes = (size) => size < 1000 ? `${size} B` : `${(size / 1000).toFixed(1)} kB`;
const joined = (...parts) => parts.filter(Boolean).join(" · ");
const clock = (at) => {
  const time = new Date(1000 * at), isToday = now - at < 43200;
  return isToday ? time.toLocaleTimeString() : time.toLocaleString();
};

// ---- elements ----

function element(tag, text = "") {
  const made = document.createElement(tag);
  made.textContent = text;
  return made;
}

function fromTemplate(id) {
  const root = byId(id).content.firstElementChild.cloneNode(true);
  const parts = { root };
  for (const slot of root.querySelectorAll("[data-slot]")) parts[slot.dataset.slot] = slot;
  return parts;
}

function setText(node, text) {
  text ||= "";
  if (node.textContent !== text) node.textContent = text;
}

function setState(node, text, isGood) {
  setText(node, text);
  node.classList.toggle("good", isGood);
  node.classList.toggle("bad", !isGood);
}

// Runs of words; those that differ from the other text are marked.
function setRuns(node, before, runs, tag) {
  node.replaceChildren(before, ...runs.flatMap(([words, differs]) => [differs ? element(tag, words) : words, " "]));
}

function setList(node, pairs) {
  node.replaceChildren(...pairs.flatMap(([name, value]) => [element("dt", name), element("dd", value)]));
}

// The parts of a row, which is made if it is new; rows are in the order of their names.
function rowOf(rows, parent, name, template) {
  if (rows.has(name)) return rows.get(name);
  const parts = fromTemplate(template);
  const next = [...rows.keys()].filter((other) => other > name).sort()[0];
  parent.insertBefore(parts.root, next === undefined ? null : rows.get(next).root);
  rows.set(name, parts);
  return parts;
}

// ---- rows ----

function showServer(row) {
  const parts = rowOf(servers, byId("servers"), row.server, "server-row");
  setText(parts.name, row.server);
  setText(parts.tier, joined(row.tier, row.target, row.version));
  setState(parts.state, row.state === "online" && !row.is_taking ? "takes no requests" : row.state, row.is_taking);
  const figures = [
    ["queue", `${count(row.waiting)} of ${count(row.capacity)}`],
    ["answered", count(row.answered)],
    ["accepted", row.proposed ? percent(row.accepted / row.proposed) : "–"],
    ["batches", count(row.batches)],
    ["batch", row.batch_ms ? millis(row.batch_ms) : "–"],
    ["pass", row.pass_ms ? millis(row.pass_ms) : "–"],
    ["in this batch", row.busy_s ? `${row.busy_s} s` : "–"],
  ];
  if (row.cost !== null) {
    const budget = row.budget_per_day === null ? "" : ` of ${row.budget_per_day}`;
    figures.push(["cost", `${row.cost.toFixed(4)} ${row.currency}`]);
    figures.push(["cost today", `${(row.cost_today ?? 0).toFixed(4)}${budget} ${row.currency}`]);
  }
  parts.figures.replaceChildren(...figures.map(([name, value]) => {
    const figure = element("div");
    figure.append(element("dt", name), element("dd", value));
    return figure;
  }));
  setText(parts.why, row.why);
}

function showBoard(row) {
  const parts = rowOf(boards, byId("boards"), row.board, "board-row");
  setText(parts.name, row.board);
  setState(parts.state, row.state || "status not known", row.state !== "offline");
  setText(parts.about, joined(row.paradigm, row.bundle && `bundle ${row.bundle.slice(0, 8)}`, row.version));
  setText(parts.problems, Object.entries(row.problems).map(([part, problem]) => `${part}: ${problem}`).join("; "));
  parts.views ??= new Map();
  for (const [name, view] of parts.views) {
    if (row.cameras.some((camera) => camera.name === name)) continue;
    view.root.remove();
    parts.views.delete(name);
  }
  for (const camera of row.cameras) {
    showCamera(rowOf(parts.views, parts.cameras, camera.name, "camera-row"), row.board, camera);
  }
}

function showCamera(parts, board, camera) {
  const state = camera.state && camera.state !== "live" ? camera.state : "";
  setText(parts.where, joined(camera.name, state, camera.at && clock(camera.at), camera.type === "lost" && "lost",
    camera.is_unsure && "unsure", camera.is_cut && "cut", camera.at && !camera.is_final && "not final"));
  setRuns(parts.text, "", camera.text, "ins");
  if (camera.draft.length) setRuns(parts.draft, "draft: ", camera.draft, "del"); else setText(parts.draft, "");
  setText(parts.waiting, camera.waiting && `now, not verified yet: ${camera.waiting}`);
  setText(parts.label, camera.label);
  parts.label.onclick = () => searchLabel(camera.label);
  const likely = camera.scores.filter(([, share]) => share >= 0.005);  // others would show as 0 %
  setText(parts.scores, likely.map(([name, share]) => `${name === camera.label ? "" : `${name} `}${percent(share)}`).join(", "));
  setText(parts.answers, camera.answers.map(([question, answer, share]) => `${question}: ${answer} ${percent(share)}`).join(", "));
  setText(parts.trigger, camera.trigger && `${clock(camera.trigger_at)} ${camera.trigger}`);
  showPicture(parts.picture, board, camera);
  setText(parts.taken, camera.picture && `picture: ${clock(camera.picture_at)}`);
  showNumbers(parts, camera);
  parts.minutes = camera.hour;
  showHour(parts);
}

function showPicture(image, board, camera) {
  image.hidden = !camera.picture;
  if (!camera.picture || image.dataset.number === String(camera.picture)) return;
  document.body.classList.add("pictures");
  image.dataset.number = camera.picture;
  image.alt = `last picture of ${board}, ${camera.name}`;
  image.src = `/api/picture/${board}/${encodeURIComponent(camera.name)}?number=${camera.picture}`;
}

function showNumbers(parts, camera) {
  if (!camera.at) return;
  const sent = camera.bytes_up ? bytes(camera.bytes_up) : "nothing";
  const jpeg = camera.jpeg_bytes
    ? bytes(camera.jpeg_bytes) + (camera.bytes_up ? ` (${(camera.jpeg_bytes / camera.bytes_up).toFixed(1)} ×)` : "") : "–";
  const sure = camera.confidence === null ? "–" : percent(camera.confidence);
  setList(parts.figures, [["answered by", camera.by || "–"],
    [camera.type === "lost" ? "lost after" : "answered after", millis(camera.after_ms)], ["sent", sent],
    ["as a JPEG", jpeg], ["confidence", sure]]);
  parts.bar.replaceChildren(...camera.latency.map(([, ms]) => {
    const part = element("i");
    part.style.flexGrow = ms;
    return part;
  }));
  setText(parts.paradigm, `${camera.paradigm || "not sent"}: why, and each hop`);
  setText(parts.reason, camera.reason);
  setList(parts.latency, camera.latency.map(([station, ms]) => [station, millis(ms)]));
  const expected = Object.entries(camera.expected_ms).map(([paradigm, ms]) => `${paradigm} ${millis(ms)}`).join(", ");
  setText(parts.expected, expected && `expected: ${expected}`);
}

// A bar per minute: its height is the mean time to the final answer.
function showHour(parts) {
  const slot = CHART.width / CHART.minutes, latest = Math.floor(now / 60);
  const shown = parts.minutes.filter(([minute]) => latest - minute < CHART.minutes);
  const longest = Math.max(1, ...shown.map(([, , , ms]) => ms));
  const x = (minute) => CHART.width - (latest - minute + 1) * slot;
  const bar = ([minute, answered, , ms]) => {
    const height = answered ? Math.max(1, CHART.height * ms / longest) : 0;
    return `M${x(minute)} ${CHART.height}v${-height}h${0.8 * slot}v${height}z`;
  };
  const lost = shown.filter(([, , missed]) => missed);
  parts.chart.querySelector(".bars").setAttribute("d", shown.map(bar).join(""));
  parts.chart.querySelector(".lost").setAttribute("d", lost.map(([minute]) => `M${x(minute)} 32v4h${0.8 * slot}v-4z`).join(""));
  const total = (field) => shown.reduce((sum, minute) => sum + minute[field], 0);
  setText(parts.hour, shown.length
    ? `last hour: ${count(total(1))} answered, ${count(total(2))} lost${total(1) ? `, up to ${millis(longest)}` : ""}` : "no answer in the last hour");
}

// ---- updates ----

function show(update) {
  const isNewMinute = Math.floor(update.now / 60) !== Math.floor(now / 60);
  now = update.now;
  if (update.is_first) {
    for (const rows of [boards, servers]) {
      for (const parts of rows.values()) parts.root.remove();
      rows.clear();
    }
  }
  for (const [rows, gone] of [[boards, update.gone], [servers, update.gone_servers]]) {
    for (const name of gone) {
      rows.get(name)?.root.remove();
      rows.delete(name);
    }
  }
  update.servers.forEach(showServer);
  update.boards.forEach(showBoard);
  if (isNewMinute) {
    for (const board of boards.values()) board.views.forEach(showHour);
  }
  byId("servers-part").hidden = !servers.size;
  byId("none").hidden = boards.size > 0;
  setText(byId("site"), update.link.site);
  document.title = `aiflow: ${update.link.site}`;
  const { link } = update;
  byId("meaning").disabled = link.meaning !== "";
  setText(byId("no-meaning"), link.meaning && `no search by meaning: ${link.meaning}`);
  setState(byId("link"), joined(link.broker, link.not_shown && `${count(link.not_shown)} messages of more boards not shown`,
    link.ignored && `${count(link.ignored)} messages ignored`, link.history && `texts are not kept: ${link.history}`),
    link.is_online);
}

function connect() {
  const source = new EventSource("/api/updates");
  source.onmessage = (message) => show(JSON.parse(message.data));
  source.onerror = async () => {
    setState(byId("link"), "no connection to the page’s server, or too many browsers: trying again", false);
    if (source.readyState !== EventSource.CLOSED) return;  // it tries again by itself
    setTimeout(connect, 3000);
    const answer = await fetch("/page.js", { cache: "no-store" }).catch(() => null);
    if (answer?.status === 401) location.assign("/login");
  };
}

// ---- search ----

let searched = new URLSearchParams();

async function search(isOlder) {
  const answer = await fetch(`/api/search?${searched}`).catch(() => null);
  const body = await answer?.json().catch(() => null);
  byId("results").hidden = false;
  if (!isOlder) byId("found").replaceChildren();
  if (!answer?.ok || !body) {
    setText(byId("results-title"), body?.error ?? "no answer: try again");
    byId("older").hidden = true;
    return;
  }
  for (const found of body.answers) {
    const item = element("li");
    item.append(element("small", joined(clock(found.at), `${found.board} ${found.camera}`, found.label, found.similarity !== null && percent(found.similarity))), element("span", found.text));
    byId("found").append(item);
  }
  const shown = byId("found").children.length;
  setText(byId("results-title"), shown ? `${shown} texts, the ${searched.get("by") === "meaning" && searched.get("q") ? "most similar" : "newest"} first` : "Nothing found");
  byId("older").hidden = !body.has_more;
  if (body.has_more) searched.set("before", body.answers.at(-1).id);
}

function start() {
  searched = new URLSearchParams({ q: byId("words").value, label: byId("label").value });
  if (byId("meaning").checked) searched.set("by", "meaning");
  return search(false);
}

async function searchLabel(label) {
  byId("words").value = "";
  byId("label").value = label;
  await start();
  byId("results-title").focus();
}

byId("search").addEventListener("submit", (event) => { event.preventDefault(); start(); });
byId("older").addEventListener("click", () => search(true));
byId("close").addEventListener("click", () => { byId("results").hidden = true; byId("words").focus(); });
connect();
