"use strict";
// Numbers, times and elements. What comes from the daemon gets into the page as text only.

const DASH = "–";
const at = (id) => document.getElementById(id);
const SVG = at("lag-plot").namespaceURI;

const grouped = new Intl.NumberFormat("en-US", { maximumFractionDigits: 6 });
const compact = new Intl.NumberFormat("en-US", { notation: "compact", maximumFractionDigits: 1 });
const number = (value) => (value === null || value === undefined ? DASH : grouped.format(value));
const blockNumber = (value) => (value === null || value === undefined ? "unknown" : grouped.format(value));
const rate = (value) => number(value < 100 ? Math.round(value * 10) / 10 : Math.round(value));
const whole = (value) => number(Math.round(value));
const counted = (value, one, many) => `${number(value)} ${value === 1 ? one : many}`;
const range = ([first, last]) => (first === last ? number(first) : `${number(first)} to ${number(last)}`);
const clock = (date) => date.toISOString().slice(11, 19);
const upper = (text) => text && text[0].toUpperCase() + text.slice(1);
const sentences = (texts) => texts.filter(Boolean).map((one) => upper(one).replace(/[.\s]*$/, ".")).join(" ");

function duration(seconds) {
  if (seconds < 60) return `${Math.round(seconds)} s`;
  const minutes = Math.floor(seconds / 60), hours = Math.floor(minutes / 60), days = Math.floor(hours / 24);
  if (days) return `${number(days)} d ${hours % 24} h`;
  return hours ? `${hours} h ${minutes % 60} min` : `${minutes} min ${Math.floor(seconds % 60)} s`;
}

function instant(iso) {
  return iso.replace("T", " ").replace(/\.\d+/, "").replace(/(Z|\+00:00)$/, "");
}

const moment = (seconds) => instant(new Date(seconds * 1000).toISOString());

// rounded down: all but one of a million blocks is not 100 %
function percent(part, all) {
  return `${(Math.floor(Math.min(1, Math.max(0, part / all)) * 10000) / 100).toFixed(2)} %`;
}

function bytes(value) {
  if (value === null || value === undefined) return "";
  const units = ["bytes", "kB", "MB", "GB", "TB"];
  let n = 0;
  while (value >= 1000 && n < units.length - 1) [value, n] = [value / 1000, n + 1];
  return `${n ? rate(value) : number(value)} ${units[n]} on disk`;
}

// a bigint that a double can't hold is kept exact where the browser lets us see its digits
function exact(_, value, context) {
  const digits = typeof value === "number" && !Number.isSafeInteger(value) && context && context.source;
  return digits && /^-?\d+$/.test(digits) ? BigInt(digits) : value;
}

function put(id, text) {
  const element = at(id);
  if (element.textContent !== text) element.textContent = text;
}

function make(tag, attributes, ...children) {
  return filled(document.createElement(tag), attributes, children);
}

function draw(tag, attributes, ...children) {
  return filled(document.createElementNS(SVG, tag), attributes, children);
}

function filled(element, attributes, children) {
  for (const [name, value] of Object.entries(attributes || {})) element.setAttribute(name, value);
  element.append(...children.filter((child) => child !== null));
  return element;
}

const badge = (text, kind) => make("span", { class: `badge ${kind}` }, text);
const quiet = (text) => make("p", { class: "quiet" }, text);

// what did not change is left alone: a selection in it, or a screen reader's place, survives
const before = {};
function changed(key, facts) {
  const now = JSON.stringify(facts, (_, value) => (typeof value === "bigint" ? `${value}` : value));
  const differs = before[key] !== now;
  before[key] = now;
  return differs;
}

function table(caption, columns, rows) {
  const heads = columns.map(([name, figure]) => make("th", { scope: "col", ...(figure && { class: "figure" }) }, name));
  return make("div", { class: "scroll" },
    make("table", columns.length > 3 ? { class: "many" } : null,
      caption && make("caption", null, caption),
      make("thead", null, make("tr", null, ...heads)),
      make("tbody", null, ...rows)));
}

const cells = (first, ...rest) => make("tr", null,
  make("th", { scope: "row", class: "long" }, first), ...rest.map((one) => make("td", { class: "figure" }, one)));

const isNumber = (value) => typeof value === "number" || typeof value === "bigint";
const isTime = (value) => typeof value === "string" && /^\d{4}-\d\d-\d\dT\d\d:\d\d/.test(value);

// a value of a hook's own table
function shown(value, verbatim) {
  if (value === null) return [DASH];
  if (isNumber(value)) return [verbatim ? `${value}` : number(value)];
  if (typeof value === "boolean") return [value ? "yes" : "no"];
  if (typeof value !== "string") return [JSON.stringify(value, (_, inner) => (typeof inner === "bigint" ? `${inner}` : inner))];
  if (!isTime(value)) return [value];
  const [date, ...time] = instant(value).split(" "); // may break between the two, nowhere else
  return [make("span", { class: "unbroken" }, date), " ", make("span", { class: "unbroken" }, time.join(" "))];
}
