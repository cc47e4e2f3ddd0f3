// Progress as it comes, dropped files, and copying: all else works without scripts.
"use strict";

function follow(box) {
  const source = new EventSource(box.dataset.stream);
  source.onmessage = (event) => {
    const job = JSON.parse(event.data);
    box.querySelector("[data-state]").textContent = job.state;
    box.querySelector("[data-stages]").replaceChildren(...job.stages.map(stage));
    box.querySelector("[data-lines]").replaceChildren(...job.lines.map((line) => item(line)));
    for (const [side, text] of Object.entries(job.heard)) {
      const place = document.querySelector(`[data-side="${side}"]`);
      if (place) place.textContent = text || "…";
    }
    if (job.over) {
      source.close();
      location.reload();
    }
  };
  source.onerror = () => {
    box.querySelector("[data-state]").textContent = "the page's server does not answer";
  };
}

function item(text) {
  const made = document.createElement("li");
  made.textContent = text;
  return made;
}

function stage([name, done, total]) {
  const made = document.createElement("li");
  const label = document.createElement("label");
  const bar = document.createElement("progress");
  const small = document.createElement("small");
  bar.max = total || 1;
  if (total) bar.value = done;
  label.append(`${name} `, bar);
  small.textContent = total ? `${done} of ${total}` : `${done}`;
  made.append(label, " ", small);
  return made;
}

async function watch(place) {
  // No stream: a browser keeps six connections to a server, for all its tabs.
  try {
    const job = await (await fetch(place.dataset.now)).json();
    if (job.over) place.querySelector("span").textContent = ` ${job.state}`;
    else setTimeout(watch, 2000, place);
  } catch {
    place.textContent = "the server has ended";
  }
}

const boxes = document.querySelectorAll("[data-stream]");
boxes.forEach(follow);
if (!boxes.length) document.querySelectorAll("[data-now]").forEach(watch);

for (const zone of document.querySelectorAll("[data-drop]")) {
  const input = zone.querySelector("input[type=file]");
  zone.addEventListener("dragover", (event) => {
    event.preventDefault();
    zone.classList.add("over");
  });
  zone.addEventListener("dragleave", () => zone.classList.remove("over"));
  zone.addEventListener("drop", (event) => {
    event.preventDefault();
    zone.classList.remove("over");
    input.files = event.dataTransfer.files;
  });
}

for (const button of document.querySelectorAll("[data-copy]")) {
  button.hidden = false;
  button.addEventListener("click", async () => {
    await navigator.clipboard.writeText(button.dataset.copy);
    button.textContent = "Copied";
  });
}
