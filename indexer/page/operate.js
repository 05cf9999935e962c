// What operators do. The token is typed in, stays in this tab, and goes out in a header that no other page can send.

const KEY = "indexer.admin_token";
let token = "", enabled = false, busy = false;
try {
  token = sessionStorage.getItem(KEY) || "";
} catch {
  // a browser that keeps nothing: then it is kept as long as the page is
}

function remember(text) {
  token = text;
  try {
    if (text) sessionStorage.setItem(KEY, text);
    else sessionStorage.removeItem(KEY);
  } catch {
    // as above
  }
}

const unlocked = () => enabled && token !== "";

let telling = 0;
function tell(text, bad) {
  put("told-text", text);
  at("told").className = bad ? "bad" : "";
  at("told").hidden = false;
  clearTimeout(telling);
  if (!bad) telling = setTimeout(() => at("told").hidden = true, 8000);
}

async function post(path, body) {
  const headers = { Authorization: `Bearer ${token}`, "Content-Type": "application/json" };
  try {
    const reply = await fetch(path, { method: "POST", headers, body: JSON.stringify(body || {}), cache: "no-store" });
    let facts = {};
    try {
      facts = await reply.json();
    } catch {
      facts.error = `it answers with HTTP ${reply.status}`;
    }
    if (!reply.ok) {
      if (reply.status === 401) remember("");
      tell(upper(`${facts.error || "refused"}`), true);
      return null;
    }
    return facts;
  } catch {
    tell("The daemon can’t be reached.", true);
    return null;
  }
}

async function act(path, body) {
  if (busy) return;
  setBusy(true);
  const facts = await post(path, body);
  setBusy(false);
  if (facts) tell(upper(facts.done), false);
  redraw();
}

function setBusy(value) {
  busy = value;
  for (const one of document.querySelectorAll("button.act")) one.setAttribute("aria-disabled", `${value}`);
}

// a button, or nothing while there is no token
function button(text, about, path, body) {
  if (!unlocked()) return null;
  const made = make("button", { type: "button", class: "act", "aria-disabled": `${busy}`, "aria-label": `${text} ${about}` }, text);
  made.addEventListener("click", () => act(path, body));
  return made;
}

function operate(facts) {
  enabled = facts.admin.enabled;
  at("operate-off").hidden = enabled;
  at("unlock").hidden = !enabled || unlocked();
  at("unlocked").hidden = !unlocked();
  work(facts.admin.work);
}

const WORK = { running: "runs", done: "done", failed: "failed", stopped: "stopped" };

function work(one) {
  at("work").hidden = !one;
  if (!one || !changed("work", one)) return;
  put("work-title", `${upper(one.what)}: ${WORK[one.state]}`);
  at("work-bar").value = one.planned ? (100 * Math.min(one.blocks, one.planned)) / one.planned : 0;
  at("work-bar").hidden = one.state !== "running";
  put("work-note", `${number(one.blocks)} of ${counted(one.planned, "block", "blocks")}, ` +
    `${counted(one.events, "event", "events")}, ${counted(one.rows, "row", "rows")} in ${duration(one.seconds)}`);
  const left = [...one.failures.map((text) => `Left out: ${text}`), one.error && upper(one.error)];
  if (one.verify.length && one.state !== "running") {
    const commands = one.verify.map((name) => `indexer verify ${name}`).join(", ");
    left.push(`Rows that depend on the order of blocks may differ from a run without holes: ${commands}`);
  }
  at("work-left").replaceChildren(...left.filter(Boolean).map((text) => make("li", null, text)));
}

at("unlock").addEventListener("submit", async (event) => {
  event.preventDefault();
  remember(at("token").value.trim());
  at("token").value = "";
  const facts = token ? await post("./admin/check") : null;
  if (facts) tell("The token is right: the buttons are there.", false);
  else remember("");
  redraw();
  (facts ? at("lock") : at("token")).focus();
});

at("lock").addEventListener("click", () => {
  remember("");
  at("told").hidden = true;
  redraw();
  at("token").focus();
});

at("told-close").addEventListener("click", () => {
  at("told").hidden = true;
});
