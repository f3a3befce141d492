"use strict";
// Sorting, filtering, opening labels, and playing clips. No library, no network.
const byId = id => document.getElementById(id);
const readData = id => byId(id) ? JSON.parse(byId(id).textContent) : null;
const media = readData("media") || [];

// --- players: one sound at a time ---
const sound = new Audio();
let playing = null;

function fillPlayer(root, item, name) {
  if (!root.childElementCount) root.append(byId("player").content.cloneNode(true));
  const picture = root.querySelector(".spectrogram"), play = root.querySelector(".play");
  picture.hidden = !item.picture;
  if (item.picture) {
    const image = picture.querySelector("img");
    image.src = item.picture;
    image.alt = "Log-mel spectrogram of " + name;
  }
  const strip = root.querySelector(".windows");
  strip.replaceChildren(...item.windows.map(([from, to]) => {
    const part = document.createElement("span");
    part.style.left = 100 * from + "%";
    part.style.width = Math.max(0.5, 100 * (to - from) - 0.4) + "%";
    return part;
  }));
  const size = item.bytes ? Math.max(1, Math.round(item.bytes / 1000)) + " kB" : "no sound";
  root.querySelector(".told").textContent = [item.seconds ? item.seconds.toFixed(1) + " s" : "", size, item.told].filter(Boolean).join(" · ");
  play.disabled = !item.sound;
  play.setAttribute("aria-label", "Play " + name);
  root.item = item;
}

function stop() {
  if (!playing) return;
  sound.pause();
  const play = playing.querySelector(".play");
  play.classList.remove("playing");
  play.textContent = "Play";
  playing = null;
}

function start(root, share) {
  const item = root.item;
  if (!item || !item.sound) return;
  if (playing !== root) {
    stop();
    if (sound.src !== item.sound) sound.src = item.sound;
    playing = root;
  }
  if (share !== undefined) sound.currentTime = share * item.seconds;
  sound.play().catch(() => stop());
  const play = root.querySelector(".play");
  play.classList.add("playing");
  play.textContent = "Pause";
  requestAnimationFrame(follow);
}

function toggle(root) {
  if (playing === root) stop(); else start(root, sound.src === (root.item || {}).sound && !sound.ended ? undefined : 0);
}

function follow() {
  if (!playing) return;
  const head = playing.querySelector(".playhead");
  head.hidden = false;
  head.style.left = 100 * Math.min(1, sound.currentTime / (playing.item.seconds || 1)) + "%";
  requestAnimationFrame(follow);
}
sound.addEventListener("ended", stop);

document.addEventListener("click", event => {
  const play = event.target.closest(".play"), picture = event.target.closest(".spectrogram");
  if (play) toggle(play.closest(".player"));
  else if (picture) {
    const box = picture.getBoundingClientRect();
    start(picture.closest(".player"), (event.clientX - box.left) / box.width);
  }
});

const fill = root => root.querySelectorAll(".clip[data-media]").forEach(clip => {
  const player = clip.querySelector(".player");
  if (!player.item) fillPlayer(player, media[+clip.dataset.media], clip.querySelector("h4").textContent);
});

// --- tables ---
document.addEventListener("click", event => {
  const open = event.target.closest(".open");
  if (!open) return;
  const body = open.closest("tbody"), detail = body.querySelector(".detail"), opened = detail.hidden;
  if (opened && !detail.firstElementChild.childElementCount) {
    detail.firstElementChild.append(body.querySelector("template").content.cloneNode(true));
    fill(detail);
  }
  if (!opened && playing && detail.contains(playing)) stop();
  detail.hidden = !opened;
  open.setAttribute("aria-expanded", opened);
});

const cell = (body, column) => {
  const td = body.querySelector("tr").children[column];
  return td.dataset.value !== undefined ? td.dataset.value : td.textContent.trim();
};
document.addEventListener("click", event => {
  const button = event.target.closest(".sort");
  if (!button) return;
  const th = button.closest("th"), table = th.closest("table"), column = [...th.parentElement.children].indexOf(th);
  const number = button.dataset.kind === "number";
  const first = number ? "descending" : "ascending", other = number ? "ascending" : "descending";
  const order = th.getAttribute("aria-sort") === first ? other : first;
  table.querySelectorAll("th").forEach(each => each.removeAttribute("aria-sort"));
  th.setAttribute("aria-sort", order);
  const sign = order === "ascending" ? 1 : -1;
  const value = body => number ? parseFloat(cell(body, column)) : cell(body, column);
  const bodies = [...table.tBodies].map(body => [value(body), body]);
  // What has no number goes last, whatever the order.
  bodies.sort(([a], [b]) => number ? (isNaN(a) - isNaN(b)) || sign * (a - b) || 0 : sign * a.localeCompare(b));
  table.append(...bodies.map(([, body]) => body));
});

document.addEventListener("input", event => {
  if (!event.target.matches(".filter")) return;
  const words = event.target.value.toLowerCase().split(/\s+/).filter(Boolean);
  const table = byId(event.target.dataset.table);
  let shown = 0;
  for (const body of table.tBodies) {
    const text = body.querySelector("tr").textContent.toLowerCase();
    body.hidden = !words.every(word => text.includes(word));
    shown += !body.hidden;
  }
  byId(event.target.dataset.table + "-count").textContent = words.length ? shown + " of " + table.tBodies.length : "";
});
