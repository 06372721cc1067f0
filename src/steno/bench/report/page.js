"use strict";
// One state, the filters; everything on the page is drawn anew from the rows that pass them.
const { rows, charts } = JSON.parse(document.getElementById("data").textContent);
const FILTERS = [["recipe", "Recipe"], ["task", "Task"], ["context", "Context, tokens"], ["protocol", "Question"]];
const off = Object.fromEntries(FILTERS.map(([name]) => [name, new Set()]));
const order = { column: null, down: false };
const element = (tag, attributes = {}, ...children) => {
  const node = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) node.setAttribute(name, value);
  node.append(...children);
  return node;
};
const unique = (values) => [...new Set(values)];
const fixed = (digits) => (value) => value.toLocaleString("en-US", { minimumFractionDigits: digits, maximumFractionDigits: digits });
const signed = (value) => (value < 0 ? "−" : "+") + Math.abs(value).toFixed(2);
const range = (low, high, show) => element("small", {}, ` ${show(low)} to ${show(high)}`);
const spread = (name, show) => (row) =>
  row[name] === null ? ["–"] : [show(row[name]), range(...row[`${name}_quartiles`], show)];

const COLUMNS = [
  ["Recipe", (r) => r.recipe, (r) => [swatch(r), ` ${r.number}\u2002`, element("code", {}, r.recipe), ...notes(r)]],
  ["Task", (r) => r.task],
  ["Context", (r) => r.context, (r) => [r.context.toLocaleString("en-US")]],
  ["Question", (r) => r.protocol],
  ["Score, 95 %", (r) => r.score, (r) => [fixed(3)(r.score), range(r.score_low, r.score_high, fixed(2))]],
  ["Full", (r) => r.score_full, (r) => [fixed(3)(r.score_full)]],
  ["Difference, 95 %", (r) => r.difference, (r) => [signed(r.difference), range(r.difference_low, r.difference_high, signed)]],
  ["KL, nats", (r) => r.kl, (r) => [r.kl === null ? "–" : fixed(4)(r.kl)]],
  ["Top-1 agreement", (r) => r.top1_agreement, (r) => [r.top1_agreement === null ? "–" : fixed(1)(100 * r.top1_agreement) + " %"]],
  ["Perplexity", (r) => r.perplexity, (r) => [r.perplexity === null ? "–" : fixed(2)(r.perplexity)]],
  ["Held, MB", (r) => r.held_mb, (r) => [fixed(2)(r.held_mb)]],
  ["Of full", (r) => r.share, (r) => [fixed(1)(100 * r.share) + " %"]],
  ["Peak, MB", (r) => r.peak_mb, (r) => [fixed(2)(r.peak_mb)]],
  ["After the answer, MB", (r) => r.end_mb, (r) => [fixed(2)(r.end_mb)]],
  ["Bits a value", (r) => r.bits_per_value, (r) => [fixed(2)(r.bits_per_value)]],
  ["Prefill, s", (r) => r.prefill_s, spread("prefill_s", fixed(2))],
  ["Compress, s", (r) => r.compress_s, spread("compress_s", fixed(2))],
  ["First token, s", (r) => r.ttft_s, spread("ttft_s", fixed(2))],
  ["Decode, ms a token", (r) => r.decode_ms_per_token, spread("decode_ms_per_token", fixed(1))],
  ["Instances", (r) => r.samples],
];

function swatch(row) {
  const dot = element("span", { class: "swatch", "aria-hidden": "true" });
  dot.style.background = row.color;
  return dot;
}

function notes(row) {
  const found = [];
  if (!row.frees_memory && row.recipe !== "full") found.push(element("small", {}, " frees nothing"));
  if (row.refused) found.push(element("small", {}, ` ${row.refused} refused`));
  return found;
}

function visible() {
  const words = document.getElementById("search").value.toLowerCase();
  return rows.filter((row) => FILTERS.every(([name]) => !off[name].has(row[name])) && row.recipe.toLowerCase().includes(words));
}

function drawFilters() {
  const form = document.getElementById("filters");
  form.addEventListener("submit", (event) => event.preventDefault());
  for (const [name, title] of FILTERS) {
    const values = unique(rows.map((row) => row[name]));
    if (values.length < 2 && name !== "recipe") continue;
    const set = element("fieldset", { "data-filter": name }, element("legend", {}, title));
    for (const value of values) {
      const box = element("input", { type: "checkbox", value });
      box.checked = true;
      box.addEventListener("change", () => {
        off[name][box.checked ? "delete" : "add"](value);
        draw();
      });
      const row = rows.find((other) => other.recipe === value);
      const text = typeof value === "number" ? value.toLocaleString("en-US") : value;
      set.append(element("label", {}, box, ...(name === "recipe" ? [swatch(row), `${row.number}\u2002`, element("code", {}, text)] : [text])));
    }
    form.append(set);
  }
}

function look() {
  const style = getComputedStyle(document.documentElement);
  const probe = element("span");
  document.body.append(probe);
  const color = (name) => {
    probe.style.color = `var(${name})`;
    return getComputedStyle(probe).color;
  };
  const [text, line] = [color("--text"), color("--line")];
  probe.remove();
  return {
    background: null,
    font: style.fontFamily,
    view: { stroke: line },
    axis: { labelColor: text, titleColor: text, gridColor: line, domainColor: line, tickColor: line, titleFontWeight: "normal" },
    text: { fill: text },
  };
}

let drawing = Promise.resolve();
let live = [];

// Means by recipe, and the steps of the front: each point that scores higher than all that cost less, then on to the right edge.
function priced(shown, cost) {
  const points = [...Map.groupBy(shown.filter((row) => row[cost] !== null), (row) => row.recipe).values()].map((own) => {
    const mean = (name) => own.reduce((sum, row) => sum + row[name], 0) / own.length;
    const { recipe, number, color } = own[0];
    return { recipe, number, color, cost: mean(cost), score: mean("score"), low: mean("score_low"), high: mean("score_high") };
  });
  const front = [];
  for (const point of [...points].sort((a, b) => a.cost - b.cost || b.score - a.score)) {
    if (!front.length || point.score > front.at(-1).score) front.push(point);
  }
  if (front.length) front.push({ cost: Math.max(...points.map((point) => point.cost)), score: front.at(-1).score });
  return { points, front };
}

function card(place, title, spec, datasets) {
  const box = element("div", { class: "chart" });
  place.append(element("div", { class: "card" }, element("h3", {}, title), box));
  const whole = { ...spec, config: look(), datasets };
  return vegaEmbed(box, whole, { actions: false, renderer: "svg" });
}

function groups(shown) {
  const found = new Map();
  for (const row of shown) {
    const question = row.protocol === "none" ? "" : `, question ${row.protocol}`;
    const key = `${row.task}, ${row.context.toLocaleString("en-US")} tokens${question}`;
    found.set(key, [...(found.get(key) ?? []), row]);
  }
  return found;
}

async function drawCharts(shown) {
  live.forEach((result) => result.finalize());
  live = [];
  const [overall, tasks, needles] = ["overall", "tasks", "needles"].map((id) => document.getElementById(id));
  for (const place of [overall, tasks, needles]) place.replaceChildren();
  const byGroup = groups(shown);
  // a mean over tasks is fair only among recipes that were measured on all of them; what only the full cache has does not count
  const shared = [...byGroup.values()].filter((group) => group.some((row) => row.recipe !== "full"));
  const counts = Map.groupBy(shared.flat(), (row) => row.recipe);
  const everywhere = shared.flat().filter((row) => counts.get(row.recipe).length === shared.length);
  const left = unique(shown.map((row) => row.recipe)).length - unique(everywhere.map((row) => row.recipe)).length;
  document.getElementById("overall-note").textContent =
    `Means over ${shared.length} ${shared.length === 1 ? "group" : "groups"} of task, length and protocol; the dashed line is the Pareto front.` +
    (left ? ` ${left} recipes that were not measured on all of them are left out.` : "");
  const cards = [
    [overall, "Score against bytes held", charts.bytes, priced(everywhere, "held_mb")],
    [overall, "Score against decode time", charts.time, priced(everywhere, "decode_ms_per_token")],
  ];
  for (const [title, data] of byGroup) {
    cards.push([tasks, `${title}: bytes`, charts.bytes_each, priced(data, "held_mb")]);
    cards.push([tasks, `${title}: time`, charts.time_each, priced(data, "decode_ms_per_token")]);
  }
  for (const [recipe, own] of Map.groupBy(shown.filter((row) => row.needles), (row) => row.recipe)) {
    cards.push([needles, recipe, charts.needles, { needles: own.flatMap((row) => row.needles) }]);
  }
  document.getElementById("needles-section").hidden = !shown.some((row) => row.needles);
  if (!shown.length) return;
  live = await Promise.all(cards.map((one) => card(...one)));
}

function drawTable(shown) {
  const head = element("tr");
  COLUMNS.forEach(([title], index) => {
    const button = element("button", { type: "button" }, title);
    button.addEventListener("click", () => {
      order.down = order.column === index ? !order.down : false;
      order.column = index;
      drawTable(visible());
      document.querySelectorAll("#rows-table th button")[index].focus();
    });
    const sort = order.column === index ? (order.down ? "descending" : "ascending") : "none";
    head.append(element("th", { scope: "col", "aria-sort": sort }, button));
  });
  const value = order.column === null ? null : COLUMNS[order.column][1];
  const sorted = value === null ? shown : [...shown].sort((a, b) => compare(value(a), value(b)) * (order.down ? -1 : 1));
  const body = sorted.map((row) => element("tr", {}, ...COLUMNS.map(([, plain, show]) => element("td", {}, ...(show ? show(row) : [String(plain(row))])))));
  document.querySelector("#rows-table thead").replaceChildren(head);
  document.querySelector("#rows-table tbody").replaceChildren(...body);
  document.getElementById("count").textContent = `${shown.length} of ${rows.length} rows`;
}

function compare(a, b) {
  if (a === null || b === null) return (a === null) - (b === null);
  return typeof a === "number" ? a - b : a.localeCompare(b);
}

function draw() {
  const shown = visible();
  drawTable(shown);
  document.body.dataset.drawn = "false";
  const turn = drawing.then(() => drawCharts(shown));
  drawing = turn.then(() => { if (drawing === mine) document.body.dataset.drawn = "true"; });
  const mine = drawing;
}

drawFilters();
draw();
document.getElementById("search").addEventListener("input", draw);
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", draw);
