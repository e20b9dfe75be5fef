"use strict";
// The data is anybody's text: it becomes text nodes only, never markup.
const D = JSON.parse(document.getElementById("data").textContent);
const $ = (id) => document.getElementById(id);
const num = (n) => n.toLocaleString("en");
const share = (a, b) => (b ? (100 * a / b).toFixed(1) : "0.0") + " %";
const tints = ["#4f7cd6", "#2f9e6e", "#c9822b", "#9a5fd0", "#c8506a", "#3d9bb3", "#8a8f2e", "#7a6a5a"];
const brief = (where) => where.replace(/[^\s,=]*\/(?=[^\s/]+(?::| row )\d)/g, "");
const visible = (s) => s.replace(/\n/g, "⏎").replace(/\t/g, "⇥").replace(/ /g, "␣");

function el(tag, attributes, ...children) {
  const node = document.createElement(tag);
  for (const [key, value] of Object.entries(attributes || {})) {
    if (key in node && key !== "style") node[key] = value; else node.setAttribute(key, value);
  }
  node.append(...children.flat());
  return node;
}
function svg(tag, attributes, ...children) {
  const node = document.createElementNS("http://www.w3.org/2000/svg", tag);
  for (const [key, value] of Object.entries(attributes)) node.setAttribute(key, value);
  node.append(...children);
  return node;
}
function table(head, rows) {
  const cell = (kind) => (value) => el(kind, {}, typeof value === "number" ? num(value) : value);
  return el("div", {className: "wide"}, el("table", {}, el("thead", {}, el("tr", {}, head.map(cell("th")))),
    el("tbody", {}, rows.map((row) => el("tr", {}, row.map(cell("td")))))));
}

// --- what hovers ---
const tip = $("tip");
function hover(node, say) {
  node.addEventListener("mouseover", (event) => {
    const text = say(event.target);
    tip.hidden = !text;
    if (text) tip.textContent = text;
  });
  node.addEventListener("mousemove", (event) => {
    const {offsetWidth: w, offsetHeight: h} = tip;
    tip.style.left = Math.max(4, Math.min(event.clientX + 14, innerWidth - w - 8)) + "px";
    tip.style.top = (event.clientY + 18 + h > innerHeight ? event.clientY - h - 10 : event.clientY + 18) + "px";
  });
  node.addEventListener("mouseleave", () => { tip.hidden = true; });
}

// --- sections ---
const sections = {overview: "Overview", examples: "Examples", rows: "Packed rows", tokens: "Tokens", copies: "Copies", template: "Template"};
const buttons = {};
for (const [id, name] of Object.entries(sections)) {
  const count = {examples: D.examples.length, rows: D.rowsInAll, copies: D.twins.length}[id];
  buttons[id] = el("button", {onclick: () => show(id)}, name, count === undefined ? "" : el("span", {className: "dim"}, ` ${num(count)}`));
  document.querySelector("nav").append(buttons[id]);
}
function show(id) {
  for (const other of Object.keys(sections)) {
    $(other).hidden = other !== id;
    buttons[other].setAttribute("aria-current", other === id);
  }
  tip.hidden = true;
  scrollTo(0, 0);
}

// --- overview ---
function overview() {
  const card = (value, name) => el("div", {className: "card"}, el("b", {}, value), el("span", {className: "dim"}, name));
  const train = D.lengths[0];
  const findings = D.findings.map((f) => el("div", {className: "finding" + (f.error ? " error" : "")}, el("p", {}, brief(f.head)),
    f.where.length ? el("p", {className: "dim"}, f.where.slice(0, 5).map(brief).join(", ") + (f.where.length > 5 ? ", ..." : "")) : "",
    el("p", {}, f.fix)));
  $("overview").append(
    el("div", {className: "cards"}, card(num(train[1]), "examples to learn"), card(num(train[2]), "tokens"),
      card(share(train[3], train[2]), "of them learned"), card(num(D.rowsInAll), `rows of ${num(D.rowTokens)}`)),
    el("h2", {}, "Checks ", el("span", {className: "dim"}, D.summary)), ...findings,
    el("details", {}, el("summary", {}, `${D.passed.length} checks that found nothing`),
      el("ul", {}, D.passed.map((c) => el("li", {}, el("code", {}, c.id), " ", c.sentence)))),
    el("h2", {}, "Lengths in tokens"), histogram(), el("h2", {}, ""), table(D.columns, D.lengths),
    el("h2", {}, "What was read"), el("ul", {}, D.report.map((line) => el("li", {}, line))));
}
function histogram() {
  const {edges, counts, beyond, longest} = D.histogram;
  const W = 900, H = 220, left = 50, bottom = 26, top = 14, last = edges[edges.length - 1];
  const x = (v) => left + (W - left - 10) * v / last, most = Math.max(...counts, 1), y = (c) => H - bottom - (H - bottom - top) * c / most;
  const bars = counts.map((c, i) => {
    const bar = svg("rect", {class: "bin", x: x(edges[i]) + 0.5, width: Math.max(1, x(edges[i + 1]) - x(edges[i]) - 1), y: c ? Math.min(y(c), H - bottom - 1.5) : y(0), height: c ? Math.max(1.5, H - bottom - y(c)) : 0});
    const extra = i === counts.length - 1 && beyond ? ` (${num(beyond)} of them longer than ${num(last)}; the longest has ${num(longest)})` : "";
    bar.dataset.tip = `${num(edges[i])} to ${num(edges[i + 1])} tokens: ${num(c)} examples${extra}`;
    return bar;
  });
  const ticks = [0, 0.25, 0.5, 0.75, 1].map((t) => svg("text", {x: x(t * last), y: H - 8, "text-anchor": t === 1 ? "end" : "middle"}, num(Math.round(t * last))));
  const scale = [most, Math.round(most / 2)].map((c) => svg("text", {x: left - 6, y: y(c) + 4, "text-anchor": "end"}, num(c)));
  const row = D.rowTokens <= last ? [svg("line", {x1: x(D.rowTokens), x2: x(D.rowTokens), y1: top, y2: H - bottom}),
    svg("text", {x: x(D.rowTokens) - 4, y: top + 10, "text-anchor": "end"}, "row")] : [];
  const picture = svg("svg", {viewBox: `0 0 ${W} ${H}`, role: "img", "aria-label": "histogram of lengths"}, ...bars, ...ticks, ...scale, ...row);
  hover(picture, (target) => target.dataset.tip);
  return picture;
}

// --- examples ---
const parts = (example) => example.p.map((p) => Array.isArray(p) ? {ids: p[0], text: p[1]} : p < 0 ? {ids: [-p - 1], text: D.texts[-p - 1], special: true} : {ids: [p], text: D.texts[p]});
for (const example of D.examples) {
  example.text = parts(example).map((p) => p.text).join("");
  example.low = example.text.toLowerCase();
  example.start = example.r.length > 1 && example.r[0] > 2 ? parts(example).slice(0, example.r[0]).reduce((n, p) => n + p.text.length, 0) : 0;
}
const list = $("list"), detail = $("detail"), query = document.querySelector("input"), [source, order] = document.querySelectorAll("select");
source.append(el("option", {value: ""}, "all sources"), ...D.sources.map((name, i) => el("option", {value: i}, name)));
let chosen = 0;

function matches(example, words) {
  if (words.startsWith("#") && /^#\d+$/.test(words)) {
    const id = Number(words.slice(1));
    return parts(example).some((p) => p.ids.includes(id));
  }
  return example.low.includes(words) || example.w.toLowerCase().includes(words);
}
function fill() {
  const words = query.value.toLowerCase();
  const keys = {long: (e) => -e.n, short: (e) => e.n, most: (e) => -e.t / e.n, least: (e) => e.t / e.n};
  let found = D.examples.map((e, i) => [e, i]).filter(([e]) => (source.value === "" || e.s === Number(source.value)) && (!words || matches(e, words)));
  if (order.value) found.sort(([a], [b]) => keys[order.value](a) - keys[order.value](b));
  list.replaceChildren(...found.map(([e, i]) => {
    const item = el("li", {onclick: () => open_(i)}, el("b", {title: e.w}, brief(e.w)),
      el("small", {}, `${num(e.n)} tokens, ${share(e.t, e.n)} learned`), el("small", {}, e.text.slice(e.start, e.start + 90)));
    item.dataset.at = i;
    return item;
  }));
  $("found").textContent = `${num(found.length)} of ${num(D.examples.length)} shown here (${num(D.examplesInAll)} in all)`;
  if (found.length && !found.some(([, i]) => i === chosen)) chosen = found[0][1];
  draw(found.length ? chosen : -1);
}
function open_(at) {
  if (!list.querySelector(`[data-at="${at}"]`)) { query.value = ""; source.value = ""; fill(); }
  draw(at);
}
function draw(at) {
  for (const item of list.children) item.setAttribute("aria-selected", Number(item.dataset.at) === at);
  if (at < 0) { detail.replaceChildren(el("p", {className: "dim"}, "No example matches.")); return; }
  chosen = at;
  const example = D.examples[at], words = query.value.toLowerCase(), text = el("div", {className: "text"});
  let learned = false, left = example.r[0], run = 0, position = 0, character = 0;
  const weights = (example.k || []).flatMap(([count, weight]) => Array(count).fill(weight));
  const seen = new Set();
  const shade = (node, weight) => { node.classList.add("w"); node.style.setProperty("--weight", Math.min(weight, 2)); return node; };
  const hits = [];
  if (words && !words.startsWith("#")) for (let i = example.low.indexOf(words); i >= 0; i = example.low.indexOf(words, i + words.length)) hits.push([i, i + words.length]);
  for (const [number, part] of parts(example).entries()) {
    while (left === 0) { run += 1; left = example.r[run]; learned = run % 2 === 1; }
    left -= 1;
    const stop = character + part.text.length;
    const hit = hits.some(([a, b]) => a < stop && b > character) || (words.startsWith("#") && part.ids.includes(Number(words.slice(1))));
    // A line break is shown, and breaks the line.
    const token = el("span", {className: [learned && "l", part.special && "s", hit && "mark"].filter(Boolean).join(" ")}, part.text.replace(/\n/g, "⏎\n"));
    const weight = learned && weights.length ? weights[number] : 1;
    if (learned && weights.length) seen.add(weight) && shade(token, weight);
    token.piece = {...part, position, learned, weight, example};
    text.append(token);
    position += part.ids.length;
    character = stop;
  }
  if (example.cut) text.append(el("p", {className: "dim"}, `... ${num(example.cut)} more tokens`));
  const keys = weights.length ? [...seen].sort((a, b) => a - b).flatMap((w) => [shade(el("span", {className: "key l"}, `learned, weight ${w}`), w), " "]) : [el("span", {className: "key l"}, "learned"), " "];
  const legend = el("p", {className: "dim text"}, ...keys, el("span", {className: "key s"}, "special"), " ⏎ line break");
  detail.replaceChildren(el("h2", {}, example.w, " ", el("span", {className: "dim"}, `${num(example.n)} tokens, ${num(example.t)} learned (${share(example.t, example.n)}), source ${D.sources[example.s]}`)), legend, text);
  detail.scrollTop = 0;
}
hover(detail, (target) => {
  const p = target.piece;
  if (!p) return "";
  const count = p.ids.length, first = p.position;
  return `${visible(p.text)}\n${count > 1 ? "ids" : "id"} ${p.ids.join(", ")}${p.special ? " (special)" : ""}\n` +
    `${p.learned ? `learned, weight ${p.weight} in the loss` : "not learned: read only"}\nposition ${num(first)}${count > 1 ? " to " + num(first + count - 1) : ""} of ${num(p.example.n)}\ndocument ${p.example.w}`;
});
query.addEventListener("input", fill);
source.addEventListener("change", fill);
order.addEventListener("change", fill);

// --- packed rows ---
function rows() {
  const box = el("div", {});
  D.rows.forEach((row, r) => {
    const strip = el("div", {className: "strip"});
    row.docs.forEach((doc, d) => {
      const i = el("i", {style: `width:${100 * doc.n / D.rowTokens}%;--tint:${tints[d % tints.length]};--share:${100 * doc.t / doc.n}%`});
      i.doc = {...doc, r, d, of: row.docs.length};
      if (doc.x >= 0) i.onclick = () => { show("examples"); open_(doc.x); };
      strip.append(i);
    });
    strip.left = row.left;
    box.append(el("div", {className: "row"}, el("span", {}, String(r + 1)), strip));
  });
  hover(box, (target) => target.doc ? `${target.doc.w}\n${num(target.doc.n)} tokens, ${share(target.doc.t, target.doc.n)} learned\nrow ${target.doc.r + 1}, document ${target.doc.d + 1} of ${target.doc.of}${target.doc.x >= 0 ? "\nclick to read it" : ""}`
    : target.left ? `${num(target.left)} tokens left over: no loss, nobody's` : "");
  $("rows").append(el("h2", {}, "Packed rows ", el("span", {className: "dim"}, `the first ${D.rows.length} of ${num(D.rowsInAll)} rows of ${num(D.rowTokens)} tokens in the first epoch`)),
    el("p", {className: "dim"}, "One colour a document, and none sees another; the full part of a document is what is learned of it; stripes are left over."), box);
}

// --- tokens ---
function tokens() {
  const T = D.tokens;
  const line = ([id, text, name, count, learned]) => [el("code", {}, visible(text)), el("code", {}, name), String(id), count, share(count, T.all), share(learned, count)];
  const head = ["token", "as stored", "id", "count", "of all tokens", "learned"];
  $("tokens").append(el("h2", {}, "Tokens ", el("span", {className: "dim"}, `${num(T.all)} in all, ${share(T.learned, T.all)} learned, ${num(T.distinct)} of ${num(T.vocabulary)} ids used`)),
    el("h2", {}, "Special and added tokens"), T.special.length ? table(head, T.special.map(line)) : el("p", {className: "dim"}, "None."),
    el("h2", {}, `The ${T.top.length} most frequent others`), table(head, T.top.map(line)));
}

// --- copies ---
function copies() {
  const groups = D.twins.map((g) => el("div", {className: "twin"},
    el("p", {}, `${num(g.count)} ${g.exact ? "exact copies" : "near copies"}`),
    g.members.map((m) => el("p", {}, m.x >= 0 ? el("button", {onclick: () => { show("examples"); open_(m.x); }}, m.w) : el("b", {}, m.w), el("br", {}), el("span", {className: "dim"}, m.text)))));
  $("copies").append(el("h2", {}, "Copies ", el("span", {className: "dim"}, "groups of examples that are equal, or nearly so")),
    ...(groups.length ? groups : [el("p", {className: "dim"}, "None were found.")]));
}

overview();
fill();
rows();
tokens();
copies();
$("template").append(el("h2", {}, `Chat template: ${D.template.name} `, el("span", {className: "dim"}, D.template.reason)), el("pre", {className: "code"}, D.template.text));
const [, tab, number] = location.hash.match(/^#=(\w+)(?:\/(\d+))?$/) || [];
show(tab in sections ? tab : "overview");
if (tab === "examples" && D.examples[number]) open_(Number(number));
