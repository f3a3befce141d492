// Reviewing clips by keyboard. Decisions are kept in the browser's storage under the key of this list of clips.
const review = readData("review");
const clips = review.clips, order = new Map(review.labels.map((label, at) => [label, at]));
const storeName = "melfold-review-" + review.key;
const state = { at: 0, who: "", decisions: {} };
let stored = true;
try { Object.assign(state, JSON.parse(localStorage.getItem(storeName) || "{}")); } catch { stored = false; }
state.at = Math.min(state.at, clips.length - 1);
const player = document.querySelector(".player");

const sorted = labels => [...labels].sort((a, b) => order.get(a) - order.get(b));
const same = (a, b) => a.length === b.length && a.every(label => b.includes(label));
const current = () => clips[state.at];
const decisionOf = clip => state.decisions[clip.fname] || { kind: "", labels: clip.labels, note: "" };
// One line, so that a row of the table is a row of the file.
const clean = text => text.replace(/\s+/g, " ").trim();

function save() {
  try { localStorage.setItem(storeName, JSON.stringify(state)); } catch { stored = false; }
}

function decide(changes) {
  const clip = current(), decision = { ...decisionOf(clip), ...changes };
  if (!decision.kind && !decision.note) delete state.decisions[clip.fname];
  else state.decisions[clip.fname] = decision;
  save();
  show();
}

function setLabels(labels) {
  const clip = current();
  decide({ labels: sorted(labels), kind: same(labels, clip.labels) ? "" : "change" });
}

function toggleLabel(label) {
  const labels = decisionOf(current()).labels;
  setLabels(labels.includes(label) ? labels.filter(each => each !== label) : [...labels, label]);
  say(label + (labels.includes(label) ? " dropped" : " added"));
}

const actions = {
  keep() { decide({ kind: "keep", labels: current().labels }); say("kept"); actions.next(); },
  accept() {
    const clip = current();
    if (same(clip.suggested, clip.labels)) { say("The model suggests no change"); return; }
    decide({ kind: "change", labels: sorted(clip.suggested) });
    say("suggestion taken");
  },
  exclude() { decide({ kind: "exclude", labels: current().labels }); say("excluded"); actions.next(); },
  undo() { delete state.decisions[current().fname]; save(); show(); say("decision undone"); },
  next() { go(state.at + 1); },
  previous() { go(state.at - 1); },
  play() { toggle(player); },
  add() { byId("add").focus(); },
  note() { byId("note").focus(); },
  download,
  copy() {
    const done = () => say("copied");
    const select = () => getSelection().selectAllChildren(byId("command"));
    if (navigator.clipboard) navigator.clipboard.writeText(byId("command").textContent).then(done, select); else select();
  },
};

function go(at) {
  if (at < 0 || at >= clips.length) { say(at < 0 ? "This is the first clip" : "This was the last clip"); return; }
  stop();
  state.at = at;
  save();
  show();
  player.querySelector(".playhead").hidden = true;
  byId("queue").children[at].scrollIntoView({ block: "nearest" });
}

function say(text) { byId("said").textContent = text; }

// --- what is shown ---
const words = { "": "open", keep: "kept", change: "changed", exclude: "excluded" };
const listed = labels => labels.length ? labels.join(", ") : "no label";

function element(tag, text, attributes = {}) {
  const made = document.createElement(tag);
  made.textContent = text;
  for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
  return made;
}

function show() {
  const clip = current(), decision = decisionOf(clip);
  byId("fname").textContent = clip.fname;
  const meta = ["clip " + (state.at + 1) + " of " + clips.length, "fold " + clip.fold, ...clip.flags];
  if (clip.doubt !== null) meta.push("doubt " + clip.doubt.toFixed(1));
  if (decision.kind) meta.push(words[decision.kind]);
  byId("meta").textContent = meta.join(" · ");
  if (player.item !== media[clip.media]) fillPlayer(player, media[clip.media], clip.fname);
  const agrees = same(clip.suggested, clip.labels);
  byId("suggestion").textContent = agrees
    ? "The model agrees with the labels, but ranks other labels above them."
    : "The model suggests: " + listed(clip.suggested) + ". The table says: " + listed(clip.labels) + ".";
  showChips(clip, decision);
  byId("empty").hidden = decision.labels.length > 0;
  if (document.activeElement !== byId("note")) byId("note").value = decision.note;
  document.querySelectorAll(".action[data-do]").forEach(button => {
    const kind = { keep: "keep", exclude: "exclude" }[button.dataset.do];
    if (kind) button.setAttribute("aria-pressed", decision.kind === kind);
  });
  document.querySelector("[data-do=accept]").disabled = agrees;
  showQueue();
  showResult();
}

function showChips(clip, decision) {
  const choices = clip.choices.map(([label]) => label);
  const probs = new Map(clip.choices);
  const labels = [...choices, ...decision.labels.filter(label => !choices.includes(label))];
  const focused = document.activeElement.dataset ? document.activeElement.dataset.label : undefined;
  byId("chips").replaceChildren(...labels.map((label, at) => {
    const chip = element("button", "", { type: "button", class: "chip", "aria-pressed": decision.labels.includes(label), "data-label": label });
    if (at < 9) chip.append(element("kbd", at + 1));
    chip.append(element("span", label));
    if (probs.has(label)) chip.append(element("span", Math.round(100 * probs.get(label)) + " %", { class: "muted" }));
    const item = document.createElement("li");
    item.append(chip);
    return item;
  }));
  if (focused !== undefined) [...document.querySelectorAll(".chip")].find(chip => chip.dataset.label === focused)?.focus();
}

function showQueue() {
  const queue = byId("queue");
  if (!queue.children.length) {
    queue.append(...clips.map((clip, at) => {
      const item = document.createElement("li"), button = element("button", "", { type: "button", "data-at": at });
      button.append(element("span", at + 1, { class: "muted" }), element("span", clip.fname, { class: "mono" }), element("span", ""));
      item.append(button);
      return item;
    }));
  }
  clips.forEach((clip, at) => {
    const button = queue.children[at].firstElementChild, kind = decisionOf(clip).kind;
    button.setAttribute("aria-current", at === state.at);
    button.lastElementChild.textContent = kind ? words[kind] : "";
    button.lastElementChild.className = "state-" + kind;
  });
}

function showResult() {
  const count = kind => clips.filter(clip => decisionOf(clip).kind === kind).length;
  const done = clips.length - count("");
  byId("count").textContent = done + " of " + clips.length + " decided" + (stored ? "" : ". This browser does not keep them: download before you close the page.");
  byId("bar").style.width = 100 * done / clips.length + "%";
  byId("summary").textContent = count("keep") + " kept, " + count("change") + " changed, " + count("exclude") + " excluded.";
  byId("command").textContent = command();
}

// --- the result ---
const listener = () => clean(state.who) || "listener";

function why(clip, decision) {
  const added = decision.labels.filter(label => !clip.labels.includes(label));
  const dropped = clip.labels.filter(label => !decision.labels.includes(label));
  const model = same(clip.suggested, clip.labels) ? "no change" : listed(clip.suggested);
  const parts = [added.length && "adds " + added.join(", "), dropped.length && "drops " + dropped.join(", ")].filter(Boolean);
  return clean(review.prediction + " suggests " + model + "; " + listener() + " " + parts.join(", ") + (decision.note ? "; " + decision.note : ""));
}

function rows() {
  const changed = new Map(), decided = new Set();
  for (const clip of clips) {
    const decision = decisionOf(clip);
    if (decision.kind) decided.add(clip.fname);
    if (decision.kind === "change" && decision.labels.length) changed.set(clip.fname, [decision.labels, why(clip, decision), review.track]);
  }
  // Corrections that the run was trained with stay, unless this review decided otherwise; "keep" keeps them.
  for (const [fname, ...own] of review.corrections) {
    const clip = clips.find(each => each.fname === fname), kind = clip ? decisionOf(clip).kind : "";
    if (!changed.has(fname) && kind !== "exclude") changed.set(fname, own);
  }
  return [...changed].sort(([a], [b]) => a < b ? -1 : 1).map(([fname, [labels, ...rest]]) => [fname, labels.join(","), ...rest]);
}

function csv() {
  const quoted = text => /[",\r\n]/.test(text) ? '"' + text.replaceAll('"', '""') + '"' : text;
  return [["fname", "labels", "why", "track"], ...rows()].map(row => row.map(quoted).join(",") + "\n").join("");
}

// A shell takes everything between single quotes as it is; a quote itself is closed, escaped and opened again.
const shell = text => /^[\w./@:=-]+$/.test(text) ? text : "'" + text.replaceAll("'", "'\\''") + "'";

function command() {
  const excluded = clips.filter(clip => decisionOf(clip).kind === "exclude");
  const reason = clip => clean(listener() + " excludes it" + (decisionOf(clip).note ? ": " + decisionOf(clip).note : ""));
  const parts = ["melfold train " + shell(review.data) + " --recipe " + shell(review.run) + " --run " + shell(review.run + "-reviewed")];
  if (rows().length) parts.push("--set data.corrections=corrections.csv");
  // A key is taken as it is between its quotes; a value is TOML, whose strings are JSON's.
  for (const clip of excluded) parts.push("--set " + shell('data.exclude."' + clip.fname + '"=' + JSON.stringify(reason(clip))));
  return parts.join(" \\\n  ");
}

function download() {
  const link = element("a", "", { href: URL.createObjectURL(new Blob([csv()], { type: "text/csv" })), download: "corrections.csv" });
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 10000);
  say("corrections.csv downloaded, " + rows().length + " rows");
}

// --- keys and clicks ---
const keys = { k: "keep", s: "accept", x: "exclude", u: "undo", n: "next", p: "previous", d: "download", a: "add", o: "note", " ": "play" };

document.addEventListener("keydown", event => {
  const field = event.target.closest(".field");
  if (field) {
    if (event.key === "Escape") { field.blur(); event.preventDefault(); }
    return;
  }
  if (event.ctrlKey || event.metaKey || event.altKey || !byId("keys").checked) return;
  if (event.key === " " && event.target.closest("button, input")) return;  // it presses what has the focus
  if (/^[1-9]$/.test(event.key)) {
    const chip = document.querySelectorAll(".chip")[event.key - 1];
    if (chip) toggleLabel(chip.dataset.label);
  } else if (keys[event.key.toLowerCase()]) actions[keys[event.key.toLowerCase()]]();
  else return;
  event.preventDefault();
});

document.addEventListener("click", event => {
  const action = event.target.closest("[data-do]"), chip = event.target.closest(".chip"), item = event.target.closest(".queue button");
  if (action) actions[action.dataset.do]();
  else if (chip) toggleLabel(chip.dataset.label);
  else if (item) go(+item.dataset.at);
});

byId("add").addEventListener("keydown", event => {
  if (event.key !== "Enter") return;
  const text = event.target.value.trim().toLowerCase();
  const exact = review.labels.find(label => label.toLowerCase() === text);
  const starts = review.labels.filter(label => label.toLowerCase().startsWith(text));
  const label = exact || (text && starts.length === 1 ? starts[0] : undefined);
  if (label === undefined) { say("No label of this name"); event.target.setAttribute("aria-invalid", "true"); return; }
  event.target.removeAttribute("aria-invalid");
  event.target.value = "";
  event.target.blur();
  if (!decisionOf(current()).labels.includes(label)) toggleLabel(label);
});
byId("note").addEventListener("input", event => decide({ note: event.target.value }));
byId("note").addEventListener("keydown", event => { if (event.key === "Enter") event.target.blur(); });
byId("who").value = state.who;
byId("who").addEventListener("input", event => { state.who = event.target.value; save(); showResult(); });
byId("keys").addEventListener("change", event => say("single keys " + (event.target.checked ? "work" : "are off")));

go(state.at);
