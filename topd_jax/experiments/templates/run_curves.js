const NS = "http://www.w3.org/2000/svg";
const draw = (tag, values, text) => {
  const node = document.createElementNS(NS, tag);
  for (const [name, value] of Object.entries(values)) {
    node.setAttribute(name, value);
  }
  if (text !== undefined) node.textContent = text;
  return node;
};
const number = v => {
  if (v === null || v === undefined) return "–";
  if (Number.isInteger(v)) return v.toLocaleString("en");
  const size = Math.abs(v);
  return size >= 1e5 || size < 1e-3 ? v.toExponential(2) :
    size >= 100 ? v.toFixed(0) : size >= 10 ? v.toFixed(1) : v.toFixed(3);
};
const empty = (id, text) => $(id).append(make("p", "empty", text));

// Curves
const [W, H, LEFT, RIGHT, TOP, BOTTOM] = [340, 180, 44, 8, 8, 20];
const tip = $("tip");
const colourOf = s => `var(--s${s.colour})`;

function smoothed(values, count) {
  return values.map((v, i) => {
    if (v === null) return null;
    const near = values.slice(Math.max(0, i - count + 1), i + 1)
      .filter(w => w !== null);
    return near.reduce((a, b) => a + b, 0) / near.length;
  });
}

function ticks(low, high, count) {
  const rough = (high - low) / count;
  const unit = 10 ** Math.floor(Math.log10(rough));
  const size = [1, 2, 5, 10].find(m => m * unit >= rough) * unit;
  const out = [];
  for (let i = Math.ceil(low / size - 1e-9); i * size <= high + size * 1e-9;
    i++) out.push(i * size + 0);  // no -0
  return out;
}

function marks(at, log) {
  if (!log) return ticks(at.low, at.high, 5);
  const out = [];
  for (let e = Math.floor(at.low); e <= at.high; e++) {
    out.push(...[1, 2, 5].map(m => m * 10 ** e));
  }
  const inside = out.filter(v => Math.log10(v) >= at.low &&
    Math.log10(v) <= at.high);
  const whole = inside.filter(v => Number.isInteger(
    +Math.log10(v).toFixed(9)));
  return inside.length < 2 ? ticks(at.low, at.high, 3).map(t => 10 ** t) :
    inside.length > 7 ? whole : inside;
}

const short = v => v === 0 ? "0" : Math.abs(v) >= 1e5 || Math.abs(v) < 1e-3 ?
  v.toExponential(0) : (+v.toPrecision(3)).toLocaleString("en",
  {maximumFractionDigits: 6});

function scaleOf(curve, log) {
  const seen = curve.series.filter(s => !s.hidden);
  const ends = seen.flatMap(s => [s.values, s.low || [],
    s.high || []].flat()).filter(v => v !== null && (!log || v > 0));
  const value = v => log ? Math.log10(v) : v;
  let low = Math.min(...ends.map(value)), high = Math.max(...ends.map(value));
  if (!ends.length) [low, high] = [0, 1];
  if (!log && curve.bounds) {
    // A share that hardly moves is no drama.
    const [least, most] = curve.bounds, span = (most - least) / 10;
    if (high - low < span) [low, high] = [low, high].map((v, i) =>
      (ends.length ? (low + high) / 2 : least) + (i - .5) * span);
    const shift = Math.max(least - low, 0) + Math.min(most - high, 0);
    low += shift; high += shift;
  } else if (high - low < 1e-12) { low -= .5; high += .5; }
  const room = (high - low) * .04;
  low -= room; high += room;
  const steps = curve.series.flatMap(s => s.steps);
  const last = Math.max(...steps, 1);
  return {low, high, last,
    x: step => LEFT + step / last * (W - LEFT - RIGHT),
    y: v => H - BOTTOM - (value(v) - low) / (high - low) *
      (H - TOP - BOTTOM),
    shows: v => v !== null && (!log || v > 0)};
}

function lineOf(series, values, at) {
  let path = "", pen = "M";
  values.forEach((v, i) => {
    if (!at.shows(v)) { pen = "M"; return; }
    path += `${pen}${at.x(series.steps[i]).toFixed(1)},${
      at.y(v).toFixed(1)}`;
    pen = "L";
  });
  return path;
}

function drawSeries(svg, series, at, count) {
  const group = draw("g", {style: `--c: ${colourOf(series)}`});
  const plain = series.kind === "training";
  if (plain && count > 1) {
    group.append(draw("path", {d: lineOf(series, series.values, at),
      class: "raw"}));
  }
  const values = plain ? smoothed(series.values, count) : series.values;
  group.append(draw("path", {d: lineOf(series, values, at),
    class: series.kind}));
  series.values.forEach((v, i) => {
    if (!at.shows(v) || (plain && series.values.length > 1)) return;
    const x = at.x(series.steps[i]);
    const [low, high] = [series.low, series.high].map(s => s && s[i]);
    if (low != null && high != null && at.shows(low)) {
      group.append(draw("line", {class: "whisker", x1: x, x2: x,
        y1: at.y(low), y2: at.y(high)}));
    }
    group.append(draw("circle", {cx: x, cy: at.y(v),
      r: series.kind === "test" ? 3.5 : 2.5, class: series.kind}));
  });
  svg.append(group);
}

function drawChart(svg, curve) {
  const log = $("log").checked, at = scaleOf(curve, log);
  svg.replaceChildren();
  marks(at, log).forEach(v => {
    const y = at.y(v);
    svg.append(draw("line", {class: "grid-line", x1: LEFT, x2: W - RIGHT,
      y1: y, y2: y}), draw("text", {x: LEFT - 5, y: y + 3,
      "text-anchor": "end"}, short(v)));
  });
  ticks(0, at.last, 5).filter(t => t && Number.isInteger(t)).forEach(t => svg.append(
    draw("text", {x: at.x(t), y: H - 6, "text-anchor": t > at.last * .95 ?
      "end" : "middle"}, t.toLocaleString("en"))));
  svg.append(draw("text", {x: LEFT - 5, y: H - 6, "text-anchor": "end"},
    "step"));
  curve.series.filter(s => !s.hidden).forEach(s => drawSeries(svg, s, at,
    +$("smooth").value));
  svg.append(draw("line", {class: "cross", x1: 0, x2: 0, y1: TOP,
    y2: H - BOTTOM, visibility: "hidden"}));
}

function valuesAt(curve, step) {
  const lines = [`step ${step}`];
  curve.series.filter(s => !s.hidden).forEach(s => {
    const i = s.steps.indexOf(step);
    if (i < 0 || s.values[i] === null) return;
    const range = s.low && s.low[i] !== null ?
      ` (${number(s.low[i])} to ${number(s.high[i])})` : "";
    lines.push(`${s.name}: ${number(s.values[i])}${range}`);
  });
  return lines.join("\n");
}

function chart(curve) {
  const node = make("figure"), title = make("h3", "", curve.title + " ");
  if (curve.unit) title.append(make("small", "", curve.unit));
  const svg = draw("svg", {viewBox: `0 0 ${W} ${H}`, role: "img",
    tabindex: 0, "aria-label": `${curve.title}: ` + curve.series.map(s =>
      `${s.name} ${number(s.values[0])} at step ${s.steps[0]}, ${
        number(s.values.at(-1))} at step ${s.steps.at(-1)}`).join("; ") +
      ". Arrow keys read the values."});
  const legend = make("figcaption");
  curve.series.forEach(s => {
    const mark = {training: "▬", validation: "╌●╌", test: "○"}[s.kind];
    const entry = make("button", "", `${mark} ${s.name}`);
    entry.type = "button";
    entry.title = "Hide or show";
    entry.setAttribute("aria-pressed", true);
    entry.style.setProperty("--c", colourOf(s));
    entry.addEventListener("click", () => {
      s.hidden = !s.hidden;
      entry.setAttribute("aria-pressed", !s.hidden);
      drawChart(svg, curve);
    });
    legend.append(entry);
  });
  const steps = [...new Set(curve.series.flatMap(s => s.steps))]
    .sort((a, b) => a - b);
  let now = -1;
  function look(place, spoken) {
    now = Math.max(0, Math.min(place, steps.length - 1));
    const text = valuesAt(curve, steps[now]), at = scaleOf(curve, false);
    const cross = svg.querySelector(".cross"), x = at.x(steps[now]);
    cross.setAttribute("x1", x); cross.setAttribute("x2", x);
    cross.setAttribute("visibility", "visible");
    tip.textContent = text;
    if (spoken) $("say").textContent = text;
    tip.hidden = false;
    const box = svg.getBoundingClientRect();
    const left = box.left + x / W * box.width + 10;
    tip.style.left = Math.max(4, left + tip.offsetWidth > innerWidth - 4 ?
      left - tip.offsetWidth - 20 : left) + "px";
    tip.style.top = box.top + 8 + "px";
  }
  function leave() {
    tip.hidden = true;
    svg.querySelector(".cross").setAttribute("visibility", "hidden");
  }
  svg.addEventListener("pointermove", event => {
    const box = svg.getBoundingClientRect(), at = scaleOf(curve, false);
    const x = (event.clientX - box.left) / box.width * W;
    let best = 0;
    steps.forEach((s, i) => {
      if (Math.abs(at.x(s) - x) < Math.abs(at.x(steps[best]) - x)) best = i;
    });
    look(best);
  });
  svg.addEventListener("pointerleave", leave);
  svg.addEventListener("blur", leave);
  svg.addEventListener("keydown", event => {
    const move = {ArrowLeft: now - 1, ArrowRight: now + 1, Home: 0,
      End: steps.length - 1}[event.key];
    if (event.key === "Escape") leave();
    if (move === undefined) return;
    event.preventDefault();
    look(move, true);
  });
  node.append(title, svg, legend);
  return [node, () => drawChart(svg, curve)];
}

const redraws = data.curves.map(curve => {
  const [node, redraw] = chart(curve);
  $(curve.more ? "more" : "charts").append(node);
  return redraw;
});
$("others").hidden = !$("more").children.length;
if (!data.curves.length) empty("charts", "Nothing is logged yet.");
if (data.thinned > 1) {
  $("thinned").hidden = false;
  $("thinned").textContent =
    `A point of training is the mean of up to ${data.thinned} logged steps.`;
}
const redrawAll = () => redraws.forEach(redraw => redraw());
$("smooth").addEventListener("change", redrawAll);
$("log").addEventListener("change", redrawAll);
redrawAll();
addEventListener("scroll", () => { tip.hidden = true; }, {passive: true});

