// The last hour as curves, and what each hook has applied as strips.

// Points are [seconds since 1970, lag, blocks/s, events/s] by the daemon's clock: its own, one every few seconds, and
// for the last minute also what was polled.
const POINTS = 720, RECENT = 60, COLUMNS = { "lag-plot": 1, "blocks-plot": 2, "events-plot": 3 };
let history = [], polled = [], step = 5, skew = 0;

const daemonNow = () => Date.now() / 1000 - skew;
const lastPoint = () => (history.length ? history[history.length - 1][0] : 0);

function learn(facts) {
  skew = Date.now() / 1000 - facts.now;
  step = facts.history.seconds;
  history = history.concat(facts.history.points.filter(([time]) => time > lastPoint())).slice(-POINTS);
  const lag = facts.head === null ? null : facts.lag_blocks;
  polled.push([facts.now, lag, facts.blocks_per_second, facts.events_per_second]);
  polled = polled.filter(([time]) => time > facts.now - RECENT);
}

const points = () => history.concat(polled).sort((a, b) => a[0] - b[0]);

// no line is drawn over an outage
function runs(all, column) {
  const found = [];
  let last = null;
  for (const one of all) {
    if (one[column] === null) last = null;
    else {
      if (last && one[0] - last[0] < 3 * step) found[found.length - 1].push(one);
      else found.push([one]);
      last = one;
    }
  }
  return found;
}

function roundUp(value) {
  const ten = 10 ** Math.floor(Math.log10(value));
  return ten * [1, 2, 4, 6, 8, 10].find((one) => value <= one * ten * 1.0000001);
}

const STEPS = [15, 30, 60, 120, 300, 600, 900, 1800, 3600];
function ago(seconds) {
  if (!seconds) return "now";
  return seconds < 60 ? `−${seconds} s` : `−${seconds / 60} min`;
}

// where the pointer is on a plot, as a share of its width
const pointed = {};

function plot(id, unit, format) {
  const svg = at(id), width = svg.clientWidth, height = svg.clientHeight, column = COLUMNS[id];
  if (!width || !height) return;
  const now = daemonNow(), all = points().filter(([time]) => time > now - POINTS * step);
  const seconds = Math.max(60, all.length ? now - all[0][0] : 0);
  const seen = all.map((one) => one[column]).filter((value) => value !== null);
  const most = seen.reduce((a, b) => Math.max(a, b), 0), top = roundUp(Math.max(10, most));
  const left = 44, right = width - 6, high = 12, low = height - 20;
  const x = (time) => right - ((now - time) / seconds) * (right - left);
  const y = (value) => low - (value / top) * (low - high);
  const found = [];
  for (const value of [0, top / 2, top]) {
    found.push(draw("line", { class: "grid", x1: left, x2: right, y1: y(value), y2: y(value) }));
    found.push(draw("text", { x: left - 6, y: y(value) + 4, "text-anchor": "end" }, compact.format(value)));
  }
  const tick = STEPS.find((one) => seconds / one <= Math.max(2, (right - left) / 90)) || 3600;
  for (let back = 0; back <= seconds; back += tick) {
    const place = x(now - back);
    if (back) found.push(draw("line", { class: "grid", x1: place, x2: place, y1: low, y2: low + 4 }));
    const anchor = back ? (place < left + 24 ? "start" : "middle") : "end";
    found.push(draw("text", { x: back ? place : right, y: height - 3, "text-anchor": anchor }, ago(back)));
  }
  for (const run of runs(all, column)) {
    const line = run.map((one) => `${x(one[0]).toFixed(1)} ${y(one[column]).toFixed(1)}`).join("L");
    const [first, last] = [x(run[0][0]).toFixed(1), x(run[run.length - 1][0]).toFixed(1)];
    found.push(draw("path", { class: "area", d: `M${line}L${last} ${low}L${first} ${low}Z` }));
    found.push(draw("path", { class: "curve", d: `M${line}${run.length === 1 ? "h.1" : ""}` }));
  }
  const latest = seen.length ? all[all.length - 1][column] : null;
  let note = seen.length ? `now ${latest === null ? "unknown" : format(latest)}, peak ${format(most)}` : "unknown";
  svg.setAttribute("aria-label", `${unit} over the last ${duration(seconds)}: ${note}`);
  if (id in pointed && all.length) {
    const wanted = now - ((right - pointed[id] * width) / (right - left)) * seconds;
    const near = all.reduce((a, b) => (Math.abs(b[0] - wanted) < Math.abs(a[0] - wanted) ? b : a));
    found.push(draw("line", { class: "mark", x1: x(near[0]), x2: x(near[0]), y1: high, y2: low }));
    note = `${clock(new Date(near[0] * 1000))}: ${near[column] === null ? "unknown" : format(near[column])}`;
  }
  svg.setAttribute("viewBox", `0 0 ${width} ${height}`);
  svg.replaceChildren(...found);
  put(`${id}-note`, note);
}

function plots() {
  plot("lag-plot", "Lag in blocks", whole);
  plot("blocks-plot", "Blocks a second", rate);
  plot("events-plot", "Events a second", rate);
}

for (const id of Object.keys(COLUMNS)) {
  at(id).addEventListener("pointermove", (event) => {
    const box = at(id).getBoundingClientRect();
    pointed[id] = (event.clientX - box.left) / box.width;
    plots();
  });
  at(id).addEventListener("pointerleave", () => {
    delete pointed[id];
    plots();
  });
}

// A hole that is wide enough to be seen is drawn as it is. Smaller ones fill columns of equal width as far as blocks are
// missing there, and at least half: one block among millions shows, and many such do not look like one big hole.
const STRIP = 240;
function strip(gaps, start, cursor, label) {
  const blocks = cursor - start + 1, missing = new Float64Array(STRIP);
  let holes = "";
  for (const [first, last] of gaps) {
    const from = ((first - start) / blocks) * STRIP, to = ((Math.min(last, cursor) + 1 - start) / blocks) * STRIP;
    if (to - from >= 1) holes += `M${from.toFixed(2)} 10V0H${to.toFixed(2)}V10Z`;
    else for (let n = Math.floor(from); n < to && n < STRIP; n += 1) missing[n] += Math.min(to, n + 1) - Math.max(from, n);
  }
  missing.forEach((share, n) => {
    if (share > 0) holes += `M${n} 10V${(5 - 5 * Math.min(1, share)).toFixed(1)}h1V10Z`;
  });
  return draw("svg", { class: "strip", viewBox: `0 0 ${STRIP} 10`, preserveAspectRatio: "none", role: "img", "aria-label": label },
    draw("rect", { width: STRIP, height: 10, class: blocks > 0 ? "done" : "whole" }),
    draw("path", { class: "hole", d: holes, "shape-rendering": "crispEdges" }));
}
