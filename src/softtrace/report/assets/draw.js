"use strict";
/* What all drawings share: elements, numbers, axes, marks, a guide for pointer and keyboard. */

const DATA = JSON.parse(document.getElementById("data").textContent);
const RUNS = DATA.runs;
const SINGLE = RUNS.length === 1;
const NOTHING = "–";
const SVG = "http://www.w3.org/2000/svg";

function fill(element, attributes, children) {
  for (const [name, value] of Object.entries(attributes)) {
    if (value === null || value === undefined || value === false) continue;
    if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
    else if (name === "style") for (const part of Object.entries(value)) element.style.setProperty(...part);
    else element.setAttribute(name, value === true ? "" : value);
  }
  element.append(...children.flat().filter((child) => child !== null && child !== undefined));
  return element;
}

function html(tag, attributes = {}, ...children) {
  return fill(document.createElement(tag), attributes, children);
}

function svg(tag, attributes = {}, ...children) {
  return fill(document.createElementNS(SVG, tag), attributes, children);
}

/* As the tables of `softtrace evaluate` write them. */
function percent(share) {
  if (share === null || share === undefined) return NOTHING;
  const value = 100 * share;
  return `${value.toFixed(value >= 10 || value === 0 ? 1 : value >= 0.1 ? 2 : 4)} %`;
}

function fixed(value, digits = 3) {
  return value === null || value === undefined ? NOTHING : value.toFixed(digits);
}

function tick(share) {
  return `${Number((100 * share).toPrecision(6))} %`;
}

function shorten(label, length) {
  if (label.length <= length) return label;
  const tail = Math.floor((length - 1) / 2);
  return `${label.slice(0, length - 1 - tail)}…${label.slice(label.length - tail)}`;
}

function colour(run) {
  return `var(--run-${run})`;
}

const STAR = Array.from({ length: 10 }, (_, point) => {
  const radius = point % 2 ? 0.5 : 1.25;
  const angle = (Math.PI * point) / 5 - Math.PI / 2;
  return `${point ? "L" : "M"}${radius * Math.cos(angle)} ${radius * Math.sin(angle)}`;
}).join("");

/* Around the origin, about 1 in radius; the order of drawing.MARKERS: o s ^ D v P X * */
const MARKS = [
  "M-1 0A1 1 0 1 0 1 0A1 1 0 1 0-1 0Z",
  "M-.9-.9H.9V.9H-.9Z",
  "M0-1.1L1.1.9H-1.1Z",
  "M0-1.25L1.25 0L0 1.25L-1.25 0Z",
  "M0 1.1L1.1-.9H-1.1Z",
  "M-.4-1.2H.4V-.4H1.2V.4H.4V1.2H-.4V.4H-1.2V-.4H-.4Z",
  "M-.6-1.2L0-.6L.6-1.2L1.2-.6L.6 0L1.2.6L.6 1.2L0 .6L-.6 1.2L-1.2.6L-.6 0L-1.2-.6Z",
  `${STAR}Z`,
];

function mark(run, x, y, radius = 4.5, kind = "filled") {
  return svg("path", {
    d: MARKS[run],
    transform: `translate(${x} ${y}) scale(${radius})`,
    style: kind === "filled" ? { fill: colour(run) } : { stroke: colour(run) },
    class: `marker ${kind}`,
  });
}

/* Give every element that stands for a run its mark, which tells runs apart without colour. */
function markAll() {
  for (const place of document.querySelectorAll("[data-mark]")) {
    place.append(
      svg("svg", { viewBox: "-1.5 -1.5 3 3", "aria-hidden": "true" }, mark(Number(place.dataset.mark), 0, 0, 1)),
    );
  }
}

/* A line through points; null breaks it. */
function line(points, attributes) {
  let path = "";
  let open = false;
  for (const [x, y] of points) {
    if (y === null || Number.isNaN(y)) {
      open = false;
      continue;
    }
    path += `${open ? "L" : "M"}${x.toFixed(1)} ${y.toFixed(1)}`;
    open = true;
  }
  return svg("path", { d: path, fill: "none", ...attributes });
}

function text(words, x, y, attributes = {}) {
  return svg("text", { x, y, ...attributes }, words);
}

/* Colours: how many of the rising bounds a value is over, spread over the shades there are. */
const SHADES = 7;

function shadeOf(value, bounds) {
  const over = bounds.filter((bound) => value > bound).length;
  return Math.round((over * (SHADES - 1)) / Math.max(1, bounds.length));
}

/* What each shade stands for, null for one that is not in use; `unit` ends the last name. */
function shadeNames(bounds, unit) {
  const names = Array(SHADES).fill(null);
  for (let over = 0; over <= bounds.length; over++) {
    const shade = Math.round((over * (SHADES - 1)) / Math.max(1, bounds.length));
    const last = over === bounds.length;
    names[shade] = !bounds.length ? unit : last ? `over ${tick(bounds[over - 1])} ${unit}` : over ? `${tick(bounds[over - 1])} to ${tick(bounds[over])}` : `to ${tick(bounds[0])}`;
  }
  return names;
}

/* How the bounds came about, in words. */
function scaleNote(what) {
  const [low, high] = DATA.scale_ends.map((end) => `${Math.round(100 * end)} %`);
  return `Colours: even steps on a log scale between the ${low} and ${high} quantiles of ${what}${SINGLE ? "" : ", the same for all runs"}.`;
}

const LOG_TICKS = [1e-4, 1e-3, 1e-2, 1e-1, 1];

/* Ticks from the last at or below `low` to the first at or above `high`: powers of ten, or 1, 2 and 5
   of each where the values span too few of them. */
function logTicks(low, high) {
  const found = [];
  const steps = high < 30 * low ? [1, 2, 5] : [1];
  for (let power = Math.floor(Math.log10(low) + 1e-9); power <= Math.ceil(Math.log10(high) - 1e-9) + 1; power++)
    for (const step of steps) found.push(Number(`${step}e${power}`));
  const first = found.findLastIndex((value) => value <= low * 1.0001);
  const last = found.findIndex((value, at) => at > first && value >= high * 0.9999);
  return found.slice(first, last + 1);
}

/* A log axis over sizes from `low` to `high`, as a function to pixels. */
function logScale(low, high, from, to) {
  const start = Math.log10(low);
  const span = Math.log10(high) - start || 1;
  return (value) => from + ((Math.log10(value) - start) / span) * (to - from);
}

function linearScale(low, high, from, to) {
  const span = high - low || 1;
  return (value) => (value === null ? null : from + ((value - low) / span) * (to - from));
}

/* An empty drawing as wide as its place, with the box that axes leave. */
function board(width, height, label, margin = {}) {
  const { left = 52, right = 24, top = 22, bottom = 42 } = margin;
  const root = svg("svg", {
    viewBox: `0 0 ${width} ${height}`,
    class: "chart",
    role: "img",
    "aria-label": label,
  });
  return { root, width, height, x0: left, x1: width - right, y0: height - bottom, y1: top };
}

function xAxis(box, at, ticks, format, title) {
  for (const value of ticks) {
    box.root.append(
      svg("path", { d: `M${at(value)} ${box.y0}v5`, class: "axis" }),
      text(format(value), at(value), box.y0 + 18, { "text-anchor": "middle" }),
    );
  }
  box.root.append(
    svg("path", { d: `M${box.x0} ${box.y0}H${box.x1}`, class: "axis" }),
    text(title, (box.x0 + box.x1) / 2, box.height - 6, { "text-anchor": "middle", class: "title" }),
  );
}

function yAxis(box, at, ticks, format, title) {
  for (const value of ticks) {
    box.root.append(
      svg("path", { d: `M${box.x0} ${at(value)}H${box.x1}`, class: "grid" }),
      text(format(value), box.x0 - 6, at(value) + 4, { "text-anchor": "end" }),
    );
  }
  if (title) box.root.append(text(title, 0, 12, { class: "title" }));
}

/* A legend entry: a small drawing and words. */
function key(drawing, words) {
  return html(
    "li",
    {},
    svg("svg", { viewBox: "0 0 34 14", width: 34, height: 14, "aria-hidden": "true" }, drawing),
    words,
  );
}

function legend(...entries) {
  return html("ul", { class: "legend" }, ...entries);
}

function runKeys() {
  return RUNS.map(({ label }, run) =>
    key([line([[1, 7], [33, 7]], { class: "easy", style: { stroke: colour(run) } }), mark(run, 17, 7)], shorten(label, 40)),
  );
}

/* A guide that pointer, touch and arrow keys move over the steps of a drawing.
   `find` turns a point into a step, `show` returns words and puts its sign onto the drawing. */
function guide(box, steps, find, show, readout) {
  const sign = svg("g", { class: "guide" });
  box.root.append(sign);
  let now = -1;
  const move = (step) => {
    now = Math.max(0, Math.min(steps - 1, step));
    sign.replaceChildren();
    readout.textContent = show(now, sign);
  };
  const clear = () => {
    now = -1;
    sign.replaceChildren();
    readout.textContent = readout.dataset.hint;
  };
  fill(box.root, {
    tabindex: 0,
    onpointermove: (event) => {
      const place = box.root.getBoundingClientRect();
      const scale = box.width / place.width;
      move(find((event.clientX - place.left) * scale, (event.clientY - place.top) * scale));
    },
    onpointerleave: () => document.activeElement !== box.root && clear(),
    onfocus: () => now < 0 && move(Math.floor(steps / 2)),
    onblur: clear,
    onkeydown: (event) => {
      const by = { ArrowRight: 1, ArrowLeft: -1, ArrowUp: -(box.across || 1), ArrowDown: box.across || 1 }[event.key];
      const to = { Home: 0, End: steps - 1 }[event.key] ?? (by === undefined ? undefined : now + by);
      if (to === undefined) return;
      event.preventDefault();
      move(to);
    },
  }, []);
}

function readoutLine(hint = "Point at the drawing, or focus it and use the arrow keys, to read values.") {
  return html("p", { class: "readout", "aria-live": "polite", "data-hint": hint }, hint);
}

/* The same numbers as a table, made when it is opened. */
function numbersTable(head, rows) {
  const fold = html("details", { class: "fold" }, html("summary", {}, "The same as a table"));
  fold.addEventListener("toggle", () => {
    if (fold.children.length > 1) return;
    const body = rows().map(([first, ...rest]) =>
      html("tr", {}, html("th", { scope: "row" }, first), rest.map((cell) => html("td", {}, cell))),
    );
    const top = html("tr", {}, head.map((name) => html("th", { scope: "col" }, name)));
    fold.append(
      html("div", { class: "scroll", tabindex: 0, role: "region", "aria-label": "The same as a table" },
        html("table", {}, html("thead", {}, top), html("tbody", {}, body))),
    );
  });
  return fold;
}

/* Draw now and whenever the place gets another width. */
function responsive(place, draw) {
  let width = 0;
  const redraw = () => {
    const found = Math.floor(place.clientWidth);
    if (!found || found === width) return;
    width = found;
    draw(width);
  };
  new ResizeObserver(redraw).observe(place);
  redraw();
}
