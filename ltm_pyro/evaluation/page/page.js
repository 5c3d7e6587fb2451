"use strict";
// Without this script, all texts stand one below the other, and a token's numbers are in its title.
const texts = [...document.querySelectorAll(".text")];
const pager = document.querySelector(".pager");
let shown = 0;

function show(number) {
  shown = Math.min(Math.max(number, 0), texts.length - 1);
  texts.forEach((text, place) => { text.hidden = place !== shown; });
  pager.querySelector(".count").textContent = `Piece ${shown + 1} of ${texts.length}`;
  pager.querySelector(".previous").disabled = shown === 0;
  pager.querySelector(".next").disabled = shown === texts.length - 1;
  pager.querySelector(".numbers").textContent = "";
}

function page(by) {
  show(shown + by);
  // The address names the text, and the window does not jump to it.
  history.replaceState(null, "", `#text-${shown + 1}`);
}

function showAddressed() {
  const match = /^#text-(\d+)$/.exec(location.hash);
  show(match ? Number(match[1]) - 1 : shown);
}

function point(event) {
  const token = event.target.closest(".tokens > span");
  if (!token) return;
  const place = [...token.parentElement.children].indexOf(token);
  document.querySelectorAll(".here").forEach((other) => other.classList.remove("here"));
  const panels = [...token.closest(".text").querySelectorAll(".tokens")];
  panels.forEach((panel) => panel.children[place].classList.add("here"));
  const run = token.closest(".of-run");
  const kinds = ["cost", "gain"];  // the panels of a run, in this order
  const numbers = [...run.querySelectorAll(".tokens")].map((panel, n) => `${kinds[n]} ${panel.children[place].title}`);
  pager.querySelector(".numbers").textContent = `${run.dataset.run}: ${numbers.join("; ")}`;
}

if (pager) {
  pager.hidden = false;
  pager.querySelector(".previous").addEventListener("click", () => page(-1));
  pager.querySelector(".next").addEventListener("click", () => page(1));
  document.addEventListener("keydown", (event) => {
    if (event.altKey || event.ctrlKey || event.metaKey || event.shiftKey) return;
    if (event.key === "ArrowLeft") page(-1);
    if (event.key === "ArrowRight") page(1);
  });
  document.addEventListener("mouseover", point);
  document.addEventListener("click", point);
  window.addEventListener("hashchange", showAddressed);
  showAddressed();
}
