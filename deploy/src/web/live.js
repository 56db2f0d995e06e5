// Asks for the page again while it is looked at, and exchanges the sections that have changed. Without it the page is as whole, only not live.
"use strict";
const PERIOD = 2000;
const main = document.getElementById("main");
const age = document.getElementById("age");
const shown = new Map([...main.querySelectorAll(":scope > section")].map((section) => [section.id, section.outerHTML]));
let seen = Date.now();
let lost = false;
let asking = false;

function tell() {
  if (!main.hasAttribute("data-live")) {
    age.textContent = "";
  } else if (lost) {
    age.textContent = "no answer; as of " + new Date(seen).toLocaleTimeString();
  } else {
    const seconds = Math.round((Date.now() - seen) / 1000);
    age.textContent = seconds < 3 ? "live" : "live, " + seconds + " s ago";
  }
}

function exchange(page) {
  const sections = [...page.querySelectorAll("#main > section")];
  const names = sections.map((section) => section.id);
  const present = [...main.querySelectorAll(":scope > section")].map((section) => section.id);
  if (names.join() !== present.join()) {
    main.replaceChildren(...sections.map((section) => document.importNode(section, true)));
    shown.clear();
  }
  for (const section of sections) {
    const text = section.outerHTML;
    if (shown.get(section.id) === text) continue;
    shown.set(section.id, text);
    const old = document.getElementById(section.id);
    if (old.contains(document.activeElement) && document.activeElement.matches("input")) continue;
    const fresh = document.importNode(section, true);
    for (const open of old.querySelectorAll("details[open]")) {
      const same = open.id && fresh.querySelector("#" + CSS.escape(open.id));
      if (same) same.open = true;
    }
    const scrolled = [...old.querySelectorAll(".scroll")].map((box) => box.scrollLeft);
    old.replaceWith(fresh);
    fresh.querySelectorAll(".scroll").forEach((box, n) => { box.scrollLeft = scrolled[n] || 0; });
  }
  main.toggleAttribute("data-live", page.getElementById("main").hasAttribute("data-live"));
}

async function refresh() {
  if (document.hidden || asking || !main.hasAttribute("data-live") || !getSelection().isCollapsed) return;
  asking = true;
  try {
    const answer = await fetch(location.href, { cache: "no-store", signal: AbortSignal.timeout(20000) });
    lost = !answer.ok;
    if (answer.ok) {
      exchange(new DOMParser().parseFromString(await answer.text(), "text/html"));
      seen = Date.now();
    }
  } catch {
    lost = true;
  }
  asking = false;
  tell();
}

setInterval(refresh, PERIOD);
setInterval(tell, 1000);
document.addEventListener("visibilitychange", refresh);
tell();
