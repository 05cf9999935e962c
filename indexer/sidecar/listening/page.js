"use strict";
// Keeps the page as it would be after a reload: asks for the state, and if that has changed for the page itself, whose
// parts take the places of the old ones. The server has escaped all texts in it, and its policy lets no script run.
(() => {
  const PERIOD = 10_000, HIDDEN = 60_000;
  const relative = new Intl.RelativeTimeFormat("en", { numeric: "auto" });
  let before = null, timer = 0, busy = false;

  function ago(date) {
    const minutes = Math.round((date - Date.now()) / 60_000);
    if (Math.abs(minutes) < 60) return relative.format(minutes, "minute");
    const hours = Math.round(minutes / 60);
    return Math.abs(hours) < 48 ? relative.format(hours, "hour") : relative.format(Math.round(hours / 24), "day");
  }

  // the times stay those of UTC, by whose days the plays are grouped: what they are here is told on pointing at them
  function localise() {
    for (const time of document.querySelectorAll("time[datetime]")) {
      const date = new Date(time.dateTime);
      time.title ||= date.toLocaleString(undefined, { dateStyle: "medium", timeStyle: "short" });
      if (time.dataset.ago !== undefined) time.textContent = ago(date);
    }
  }

  // what is open stays open, and nothing is taken away from under somebody's fingers
  function swap(next) {
    let whole = true;
    if (!document.getElementById("timeline") !== !next.getElementById("timeline")) {
      document.querySelector("main").replaceWith(document.adoptNode(next.querySelector("main")));
      return whole;
    }
    for (const old of document.querySelectorAll("[data-live]")) {
      const fresh = next.getElementById(old.id);
      if (!fresh || old.isEqualNode(fresh)) continue;
      if (old.contains(document.activeElement)) { whole = false; continue; }
      const opened = [...old.querySelectorAll("details")].map((one) => one.open);
      fresh.querySelectorAll("details").forEach((one, n) => { one.open = Boolean(opened[n]); });
      old.replaceWith(document.adoptNode(fresh));
    }
    return whole;
  }

  function addPlays(next) {
    const list = document.querySelector("[data-newest]"), fresh = next.querySelector("[data-newest]");
    if (!list || !fresh) return;
    const known = new Set([...list.querySelectorAll("[data-play]")].map((play) => play.dataset.play));
    for (const day of [...fresh.querySelectorAll("[data-day]")].reverse()) {
      const plays = [...day.querySelectorAll("[data-play]")].filter((play) => !known.has(play.dataset.play));
      if (!plays.length) continue;
      for (const play of plays) play.classList.add("fresh");
      const old = list.querySelector(`[data-day="${day.dataset.day}"] ol`);
      if (old) old.prepend(...plays);
      else list.prepend(day);
    }
  }

  function away(is) {
    document.getElementById("offline").hidden = !is;
  }

  async function look() {
    const reply = await fetch("/me/state", { headers: { Accept: "application/json" } });
    if (reply.status === 401) return location.reload();
    if (!reply.ok) throw new Error(reply.status);
    const state = await reply.text();
    // what came between the page and the first look is seen as well: that one always differs
    if (state !== before) {
      const page = await fetch(location.href);
      if (page.redirected) return location.reload();
      if (!page.ok) throw new Error(page.status);
      const next = new DOMParser().parseFromString(await page.text(), "text/html");
      addPlays(next);
      if (swap(next)) before = state;
    }
  }

  async function tick() {
    if (busy) return;
    busy = true;
    clearTimeout(timer);
    try {
      await look();
      away(false);
    } catch {
      away(true);
    }
    localise();
    busy = false;
    timer = setTimeout(tick, document.hidden ? HIDDEN : PERIOD);
  }

  document.addEventListener("visibilitychange", () => { if (!document.hidden) tick(); });
  localise();
  timer = setTimeout(tick, PERIOD);
})();
