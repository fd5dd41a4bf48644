// Tables
function table(label, heads, rows, name) {
  const box = make("div", "scroll " + (name || "")), node = make("table");
  box.tabIndex = 0;
  box.setAttribute("role", "region");
  box.setAttribute("aria-label", label);
  const head = make("tr"), caption = make("caption", "unseen", label);
  heads.forEach(h => {
    const th = make("th", "", h);
    th.scope = "col";
    head.append(th);
  });
  node.append(caption, make("thead"), make("tbody"));
  node.tHead.append(head);
  rows.forEach(row => {
    const tr = make("tr");
    row.forEach((cell, i) => {
      const td = make(i ? "td" : "th", "", cell);
      if (!i) td.scope = "row";
      tr.append(td);
    });
    node.tBodies[0].append(tr);
  });
  box.append(node);
  return box;
}
const range = r => r.low === null ? number(r.value) :
  `${number(r.value)} (${number(r.low)} to ${number(r.high)})`;
data.tables.forEach(t => {
  $(t.section).append(make("p", "note", t.label), table(t.label, t.heads,
    t.rows.map(row => row.map(cell => typeof cell === "string" ? cell :
      cell && typeof cell === "object" ? range(cell) : number(cell)))));
});
for (const id of ["evaluations", "speed"]) {
  if (!data.tables.some(t => t.section === id)) empty(id, "None yet.");
}

// Answers to the same problems
const several = data.runs.length > 1;
const verdict = a => a.right === null ? "" : a.right ? "right" : "wrong";
const ends = p => [p.answers[0].right, p.answers.at(-1).right];
const courses = {
  all: () => true,
  learned: p => ends(p)[0] === false && ends(p)[1] === true,
  lost: p => ends(p)[0] === true && ends(p)[1] === false,
  wrong: p => ends(p)[1] === false,
  never: p => p.answers.every(a => a.right === false),
};
// Evaluations side by side, until more are asked for.
const SIDE = 6;
function spread(answers) {
  const all = [...new Set(answers.map(a => a.step))].sort((a, b) => a - b);
  if (all.length <= SIDE) return answers;
  const kept = new Set(Array.from({length: SIDE}, (_, i) =>
    all[Math.round(i * (all.length - 1) / (SIDE - 1))]));
  return answers.filter(a => kept.has(a.step));
}
function answered(a) {
  const node = make("div", `answer ${verdict(a)}`);
  const head = make("div");
  head.append(make("small", "", `step ${a.step}` +
    (several ? `, ${data.runs[a.run]}` : "")));
  const sign = {right: "✓ right", wrong: "✗ wrong"}[verdict(a)];
  if (sign) head.append(make("b", "", sign));
  if (a.truncated) head.append(make("small", "cut", " cut off"));
  node.append(head, make("p", "writing completion", a.completion));
  return node;
}
function problemOf(p) {
  const node = make("article"), strip = make("div", "strip");
  node.append(make("p", "writing problem", p.problem));
  if (p.answer) node.append(make("small", "", `answer: ${p.answer}`));
  if (p.final) node.append(make("small", "", "test problem"));
  const few = spread(p.answers);
  strip.append(...few.map(answered));
  node.append(strip);
  if (few.length < p.answers.length) {
    const more = make("button", "more", `Show all ${p.answers.length}`);
    more.type = "button";
    more.setAttribute("aria-expanded", false);
    more.addEventListener("click", () => {
      const open = more.getAttribute("aria-expanded") === "false";
      more.setAttribute("aria-expanded", open);
      more.textContent = open ? "Show fewer" :
        `Show all ${p.answers.length}`;
      strip.replaceChildren(...(open ? p.answers : few).map(answered));
    });
    node.append(more);
  }
  return node;
}
function choose() {
  const rows = data.problems.filter(courses[$("course").value]);
  $("counted").textContent = `${rows.length} of ${data.problems.length}`;
  $("problems").replaceChildren(...rows.map(problemOf));
}
if (data.problems.length) {
  // One run is what has a course.
  $("choosing").hidden = several || data.problems.every(p =>
    p.answers.every(a => a.right === null));
  $("course").addEventListener("change", choose);
  choose();
} else {
  $("choosing").remove();
  $("counted").textContent = "None yet.";
}

// Completions of training
const steps = [...new Set(data.completions.map(c => c.step))].sort(
  (a, b) => a - b);
const lowered = data.completions.map(c =>
  (c.prompt + "\n" + c.completion).toLowerCase());
const MOST = 100;
function written(c) {
  const node = make("article");
  node.append(make("small", "", `step ${c.step}`));
  if (several) node.append(make("small", "", data.runs[c.run]));
  if (c.teacher) node.append(make("small", "", `teacher ${c.teacher}`));
  if (c.truncated) node.append(make("small", "cut", "cut off"));
  node.append(make("p", "writing prompt", c.prompt),
    make("p", "writing completion", c.completion));
  return node;
}
function read() {
  const wanted = $("find").value.toLowerCase(), step = steps[$("step").value];
  const rows = data.completions.filter((c, i) => wanted ?
    lowered[i].includes(wanted) : c.step === step);
  $("at").textContent = `step ${step}`;
  $("step").setAttribute("aria-valuetext", `step ${step}`);
  $("step").disabled = !!wanted;
  $("found").textContent = wanted ? `${rows.length} of ${
    data.completions.length}, of all steps` + (rows.length > MOST ?
    `; the first ${MOST}` : "") : "";
  $("written").replaceChildren(...rows.slice(0, MOST).map(written));
}
if (steps.length) {
  $("step").max = steps.length - 1;
  $("step").value = steps.length - 1;
  $("step").addEventListener("input", read);
  $("find").addEventListener("input", read);
  read();
} else {
  $("reading").remove();
  $("found").textContent = "None yet.";
}

// Settings
function settings() {
  const wanted = $("which").value.toLowerCase();
  const parts = [true, false].map(differs => data.settings.filter(s =>
    s.differs === differs &&
    `${s.name}=${s.values.join()}`.toLowerCase().includes(wanted)));
  const heads = ["setting", ...(several ? data.runs : ["value"])];
  $("changed").replaceChildren(table("Settings that differ",
    [...heads, "default"], parts[0].map(s => [s.name, ...s.values,
      s.default]), "left"));
  $("kept").replaceChildren(table("Defaults", heads,
    parts[1].map(s => [s.name, ...s.values]), "left"));
  if (wanted) $("rest").open = parts[1].length > 0;
}
$("which").addEventListener("input", settings);
settings();
