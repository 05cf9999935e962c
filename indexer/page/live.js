// The page's parts, filled anew each second from status.json.

const PERIOD = 1000, PATIENCE = 5000;

// the line that says how it is

const KINDS = { leader: "good", standby: "calm", starting: "warn", halted: "bad", stopping: "warn" };
let following = false;

function sentence(facts) {
  if (facts.role === "starting") return "Not at work yet.";
  if (facts.role === "standby") return standby(facts.leader);
  if (facts.role === "halted") return "Stopped at a block, and writes nothing more until it is restarted.";
  if (facts.role === "stopping") return "Ends in a moment.";
  if (facts.head === null) return "Waits for a node to say where the head is.";
  if (facts.stalled) return "Nothing gets committed although the head is ahead.";
  return following ? "Follows the head." : "Catches up with the head.";
}

function standby(leader) {
  if (leader && leader.led && leader.name) return `Stands by: ${leader.name} leads.`;
  return "Stands by, and takes over when the leader ends.";
}

function details(facts) {
  const found = facts.role === "standby" ? [] : [facts.reason];
  if (facts.stalled_seconds > 10) {
    const on = facts.waiting_on === "fetch" ? "blocks from the nodes" : "the database to take the blocks";
    found.push(`nothing committed for ${duration(facts.stalled_seconds)}; waits for ${on}`);
  }
  return sentences(found);
}

function say(role, kind, what, detail) {
  at("role").className = `badge ${kind}`;
  put("role", role);
  put("what", what);
  put("detail", detail);
  at("detail").hidden = !detail;
}

function summary(facts) {
  // two limits, lest the sentence flicker at the head
  following = facts.head !== null && facts.lag_blocks <= (following ? 20 : 5);
  let what = sentence(facts);
  const open = facts.failure_count;
  if (open) what += open === 1 ? " One failure is open." : ` ${number(open)} failures are open.`;
  say(facts.role, facts.stalled ? "warn" : KINDS[facts.role] || "", what, details(facts));
  put("chain", facts.chain);
  document.title = `${facts.chain}: ${facts.role}`;
  put("version", `indexer ${facts.version}. `);
  const trouble = facts.database && `The database can’t be read: ${facts.database}. What is below of it is what was read last.`;
  put("trouble", trouble || "");
  at("trouble").hidden = !trouble;
}

// numbers and progress

function numbers(facts) {
  const working = facts.role === "leader", known = facts.head !== null, behind = known && facts.lag_blocks > 0;
  put("blocks-rate", working ? rate(facts.blocks_per_second) : "0");
  put("events-rate", working ? rate(facts.events_per_second) : "0");
  put("blocks", `${number(facts.blocks)} since its start`);
  put("events", `${number(facts.events)} since its start`);
  put("lag-blocks", known ? number(facts.lag_blocks) : "unknown");
  put("lag-seconds", !known ? "" : behind ? `${duration(facts.lag_seconds)} behind` : "nothing to catch up");
  const eta = working && behind && facts.eta_seconds !== null;
  put("eta", known && (following || !behind) ? "at the head" : eta ? duration(facts.eta_seconds) : DASH);
  const end = eta && !following ? new Date(Date.now() + facts.eta_seconds * 1000) : null;
  put("eta-note", behind && !following && !eta ? "nothing gets committed" : !end || isNaN(end) ? "" : facts.eta_seconds < 86400 ? `at ${clock(end).slice(0, 5)}` : `on ${end.toISOString().slice(0, 10)}`);

  put("head", blockNumber(facts.head));
  put("final", blockNumber(facts.final));
  put("final-note", known && facts.final !== null ? `${number(facts.head - facts.final)} before the head` : "");
  put("cursor", facts.cursor < facts.start_block ? "none yet" : number(facts.cursor));
  put("cursor-note", facts.block_time === null ? "" : `of ${moment(facts.block_time)}`);
  put("failure-count", facts.failure_count ? number(facts.failure_count) : facts.database ? "unknown" : "none");
  put("journal", facts.journal.rows === null ? "unknown" : counted(facts.journal.rows, "row", "rows"));
  put("journal-note", bytes(facts.journal.bytes));
  leader(facts);

  const all = facts.head - facts.start_block + 1, done = facts.cursor - facts.start_block + 1;
  const share = known && all > 0 ? percent(done, all) : null;
  put("percent", share || (known ? "waits for the first block" : "head unknown"));
  put("from", `start ${number(facts.start_block)}`);
  put("to", known ? `head ${number(facts.head)}` : "");
  at("bar").value = share ? parseFloat(share) : 0;
}

function leader(facts) {
  const one = facts.leader, ours = facts.role === "leader";
  put("leader", ours ? facts.name : one && one.led && one.name ? one.name : "nobody now");
  const others = one ? one.standbys : 0;
  const waiting = others ? `${number(others)} ${others === 1 ? "stands" : "stand"} by` : "nobody stands by";
  put("leader-note", !one ? "" : ours ? `this process; ${waiting}` : `${one.led ? `heard ${duration(one.seen_seconds)} ago; ` : ""}${waiting}`);
}

// coverage

const visible = (gaps, cursor) => gaps.filter(([first]) => first <= cursor);

function hook([name, every], start, cursor, enabled) {
  const gaps = visible(every, cursor), blocks = cursor - start + 1;
  const missing = gaps.reduce((sum, [first, last]) => sum + Math.min(last, cursor) - first + 1, 0);
  let text = "no hole";
  if (blocks <= 0) text = "nothing applied yet";
  else if (gaps.length) {
    const more = gaps.length > 3 ? ` and ${number(gaps.length - 3)} more` : "";
    text = `${counted(missing, "block", "blocks")} missing: ${gaps.slice(0, 3).map(range).join(", ")}${more}`;
  }
  if (!enabled) text += "; not enabled now";
  return make("li", null,
    make("div", { class: "split tight" }, make("span", null, name),
      make("span", { class: "end" }, blocks > 0 ? percent(blocks - missing, blocks) : DASH,
        gaps.length && enabled ? button("Fill", `the holes of ${name}`, "./admin/gaps/fill", { hook: name }) : null)),
    strip(gaps, start, cursor, `${name}: ${text}`),
    make("p", { class: "quiet", "aria-hidden": "true" }, text));
}

function coverage(facts) {
  if (!changed("coverage", [facts.gaps, facts.start_block, facts.cursor, unlocked()])) return;
  const enabled = facts.hooks, place = ([name]) => (enabled.includes(name) ? enabled.indexOf(name) : enabled.length);
  const hooks = Object.entries(facts.gaps).sort((a, b) => place(a) - place(b));
  at("hooks").replaceChildren(...hooks.map((one) => hook(one, facts.start_block, facts.cursor, enabled.includes(one[0]))));
  if (!hooks.length) at("hooks").append(make("li", { class: "quiet" }, "Not known yet."));
  const holed = hooks.filter(([name, gaps]) => enabled.includes(name) && visible(gaps, facts.cursor).length);
  const all = holed.length > 1 ? button("Fill all", "holes of all hooks", "./admin/gaps/fill", { hook: null }) : null;
  at("fill-all").replaceChildren(...(all ? [all] : []));
  put("coverage-from", hooks.length ? `start ${number(facts.start_block)}` : "");
  put("coverage-to", hooks.length && facts.cursor >= facts.start_block ? `cursor ${number(facts.cursor)}` : "");
}

// failures

const tracebacks = new Map();

function traceback(id) {
  if (tracebacks.has(id)) return tracebacks.get(id);
  const text = make("pre", { class: "traceback", tabindex: 0, role: "region", "aria-label": `Traceback of failure ${id}` });
  const box = make("details", null, make("summary", null, `Traceback of failure ${id}`), text);
  box.addEventListener("toggle", async () => {
    if (!box.open || text.textContent) return;
    text.textContent = "…";
    try {
      text.textContent = await (await fetch(`./failures/${id}`, { cache: "no-store" })).text();
    } catch {
      text.textContent = "";
      box.open = false;
      tell("The traceback can’t be had now.", true);
    }
  });
  tracebacks.set(id, box);
  return box;
}

function failures(facts) {
  const found = facts.failures;
  at("failures").hidden = !found.length;
  put("failures-more", facts.failure_count > found.length ? `The oldest ${number(found.length)} of ${number(facts.failure_count)}` : "");
  if (!changed("failures", [found, unlocked()])) return;
  for (const id of tracebacks.keys()) if (!found.some((one) => one.id === id)) tracebacks.delete(id);
  at("failures-list").replaceChildren(...found.map((one) => make("li", null,
    make("div", { class: "split" },
      make("span", null, one.policy === "halt" ? badge("halted", "bad") : badge("skipped", "warn"),
        `${one.hook}, ${one.first === one.last ? "block" : "blocks"} ${range([one.first, one.last])} `,
        make("span", { class: "quiet" }, instant(one.failed_at))),
      one.policy === "skip" ? button("Retry", `failure ${one.id}`, `./admin/failures/${one.id}/retry`) : null),
    make("p", { class: "error" }, one.error),
    traceback(one.id))));
}

// nodes, reorganisations, jobs, budgets, panels

function endpoints(facts) {
  if (!changed("endpoints", facts.endpoints)) return;
  if (!facts.endpoints.length) return at("endpoints").replaceChildren(quiet("This source asks no nodes."));
  const rows = facts.endpoints.flatMap((one) => [
    make("tr", null,
      make("th", { scope: "row", class: "long" }, one.name),
      make("td", null, one.healthy ? badge("healthy", "good") : badge("resting", "warn")),
      make("td", { class: "figure" }, one.latency_ms ? `${rate(one.latency_ms)} ms` : DASH)),
    ...(one.error ? [make("tr", { class: "more" }, make("td", { class: "quiet", colspan: 3 },
      one.healthy ? one.error : `${one.error}; asked again in ${duration(one.resting_seconds)}`))] : []),
  ]);
  at("endpoints").replaceChildren(table(null, [["Node"], ["Health"], ["Latency", true]], rows));
}

function reorgs(facts) {
  if (!changed("reorgs", facts.reorgs)) return;
  if (!facts.reorgs.length) return at("reorgs").replaceChildren(quiet("None since this process began."));
  const rows = facts.reorgs.map((one) => cells(number(one.block), counted(one.depth, "block", "blocks"), moment(one.at)));
  at("reorgs").replaceChildren(table(null, [["From block"], ["Depth", true], ["When", true]], rows));
}

const STATES = ["waiting", "running", "held", "unfinal"];

function jobs(facts) {
  if (!changed("jobs", [facts.jobs, unlocked()])) return;
  const found = facts.jobs || { counts: [], held: [] };
  const kinds = [...new Set(found.counts.map((one) => one.kind))];
  const rows = kinds.map((kind) => {
    const of = (state) => found.counts.find((one) => one.kind === kind && one.state === state);
    const waiting = of("waiting");
    return cells(kind, ...STATES.map((state) => (of(state) ? number(of(state).jobs) : DASH)), waiting ? duration(waiting.seconds) : DASH);
  });
  const heads = [["Kind"], ["Wait", true], ["Run", true], ["Held", true], ["Not final", true], ["Oldest", true]];
  at("jobs").replaceChildren(rows.length ? table(null, heads, rows) : quiet(facts.jobs ? "No jobs." : "Can’t be read now."));
  at("held").replaceChildren(...found.held.map((one) => make("li", null,
    make("div", { class: "split" },
      make("span", null, badge("held", "warn"), `${one.kind} ${one.id} `, make("span", { class: "quiet" }, instant(one.since))),
      button("Requeue", `job ${one.id}`, `./admin/jobs/${one.id}/requeue`)),
    one.error ? make("p", { class: "error" }, one.error) : null)));
}

function budgets(facts) {
  if (!changed("budgets", facts.budgets)) return;
  if (!facts.budgets || !facts.budgets.length) {
    return at("budgets").replaceChildren(quiet(facts.budgets ? "No sidecar has worked on this database." : "Can’t be read now."));
  }
  const rows = facts.budgets.map((one) => {
    const left = one.budget === null ? null : Math.max(0, one.budget - one.used);
    const row = cells("", whole(one.used), one.budget === null ? "no limit" : number(one.budget), left === null ? DASH : number(left));
    row.firstChild.append(one.provider, make("span", { class: "quiet" }, ` ${one.what}`));
    return row;
  });
  at("budgets").replaceChildren(table(null, [["Provider"], ["Used", true], ["Budget", true], ["Left", true]], rows));
}

function panel(one) {
  if (one.error || !one.rows.length) {
    const text = one.error ? `Can’t be read now (${one.error}).` : "Nothing yet.";
    return make("div", { class: "card" }, make("h2", null, one.title), quiet(text));
  }
  // the first of several columns says what the row is about: a name or an id, shown as it is
  const many = one.columns.length > 1, about = (n) => many && n === 0;
  const figure = one.columns.map((_, n) => !about(n) && one.rows.every((row) => row[n] === null || isNumber(row[n])));
  const look = (value, n) => ({ class: figure[n] ? "figure" : typeof value !== "string" ? "unbroken" : isTime(value) ? "" : "long" });
  const cell = (value, n) => (about(n)
    ? make("th", { scope: "row", ...look(value, n) }, ...shown(value, true))
    : make("td", look(value, n), ...shown(value, false)));
  const rows = one.rows.map((row) => make("tr", null, ...row.map(cell)));
  const columns = one.columns.map((name, n) => [name.replaceAll("_", " "), figure[n]]);
  return make("div", { class: "card" }, table(make("h2", null, one.title), columns, rows));
}

function panels(facts) {
  if (changed("panels", facts.panels)) at("panels").replaceChildren(...facts.panels.map(panel));
}

// a table that is too wide after all scrolls in itself; then the keyboard must get there
function reachable() {
  for (const box of document.querySelectorAll(".scroll")) {
    if (box.scrollWidth <= box.clientWidth) {
      for (const name of ["tabindex", "role", "aria-label"]) box.removeAttribute(name);
    } else {
      const title = box.querySelector("caption") || box.closest("section").querySelector("h2");
      filled(box, { tabindex: 0, role: "region", "aria-label": `${title.textContent}, the whole table` }, []);
    }
  }
}

// asking

let since = null, timer = 0, asking = false, latest = null;

function redraw() {
  if (!latest) return;
  for (const part of [operate, summary, numbers, plots, coverage, failures, endpoints, reorgs, jobs, budgets, panels]) part(latest);
  reachable();
}

function show(facts) {
  since = null;
  latest = facts;
  at("facts").classList.remove("stale");
  learn(facts);
  redraw();
}

function silent(error) {
  since = since || new Date();
  at("facts").classList.add("stale");
  plots();
  say("no answer", "bad", `The daemon has not answered since ${clock(since)}.`,
    `${error}. Asked again every second; the numbers below are the last that came.`);
  document.title = "no answer: indexer";
}

async function ask() {
  if (asking || document.hidden) return;
  asking = true;
  clearTimeout(timer);
  const started = Date.now(), abort = new AbortController(), limit = setTimeout(() => abort.abort(), PATIENCE);
  let facts = null, trouble = "";
  try {
    const reply = await fetch(`./status.json?since=${lastPoint()}`, { cache: "no-store", signal: abort.signal });
    if (reply.ok) facts = JSON.parse(await reply.text(), exact);
    else trouble = `It answers with HTTP ${reply.status}`;
  } catch (error) {
    trouble = abort.signal.aborted ? `No answer within ${PATIENCE / 1000} s` : error instanceof SyntaxError ? "Its answer is not JSON" : "It can’t be reached";
  }
  clearTimeout(limit);
  asking = false;
  timer = setTimeout(ask, Math.max(100, PERIOD - (Date.now() - started)));
  if (facts) show(facts);
  else if (!document.hidden) silent(trouble);
}

for (const one of document.querySelectorAll("[data-live]")) one.hidden = false;
document.addEventListener("visibilitychange", ask);
addEventListener("resize", () => {
  plots();
  reachable();
});
ask();
