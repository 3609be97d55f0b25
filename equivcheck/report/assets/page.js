(() => {
"use strict";
const $ = (s, root) => (root || document).querySelector(s);
const $$ = (s, root) => [...(root || document).querySelectorAll(s)];
const data = JSON.parse($("#data").textContent);
const cases = new Map(((data.result || {}).cases || []).map((c) => [c.id, c]));
const root = document.documentElement;
const api = window.equivcheck = {charts: {}, data};
const make = (name, props, ...children) => {
  const e = Object.assign(document.createElement(name), props);
  e.append(...children);
  return e;
};
const breakable = (name) => name.split(/(?<=[._])(?=\w)/).flatMap((part, i) => i ? [make("wbr", {}), part] : [part]);
const say = (text) => { const e = $("#said"); if (e) e.textContent = text; };
const sci = (v) => v == null ? "-" : v === 0 ? "0" : v.toExponential(1).replace(/e([+-])(\d)$/, "e$10$2");
const four = (v) => v == null ? "-" : v.toPrecision(4);
const times = (v) => v == null ? "-" : v < 100 ? `${+v.toPrecision(2)}x` : v < 1e5 ? `${Math.round(v)}x` : `${v.toExponential(0)}x`;

// Copy ---------------------------------------------------------------------------------------------
async function copy(text, button) {
  try { await navigator.clipboard.writeText(text); }
  catch (e) {
    const area = make("textarea", {value: text});
    document.body.append(area); area.select(); document.execCommand("copy"); area.remove();
  }
  if (button) {
    const before = button.dataset.title || (button.dataset.title = button.textContent);
    button.textContent = "Copied";
    setTimeout(() => { button.textContent = before; }, 1200);
  }
  say("Copied");
  api.copied = text;
}
document.addEventListener("click", (event) => {
  const b = event.target.closest("button");
  if (!b) return;
  if (b.dataset.copy !== undefined) copy(b.dataset.copy, b);
  if (b.dataset.copyMarkdown !== undefined) copy(data.markdown && data.markdown[route().id] || data.summary, b);
  if (b.dataset.copyJson !== undefined) copy(JSON.stringify(cases.get(route().id) || data.result, null, 2), b);
  if (b.dataset.help !== undefined) help();
  if (b.dataset.themeToggle !== undefined) theme(dark() ? "light" : "dark");
  if (b.dataset.more !== undefined) grow(b.dataset.more, 200);
});

// Theme --------------------------------------------------------------------------------------------
const media = matchMedia("(prefers-color-scheme: dark)");
const dark = () => (root.dataset.theme || (media.matches ? "dark" : "light")) === "dark";
function theme(name) {
  if (name) {
    root.dataset.theme = name;
    try { localStorage.setItem("equivcheck-theme", name); } catch (e) { /* a page from disk may not be allowed to */ }
  }
  const b = $("[data-theme-toggle]");
  if (b) b.setAttribute("aria-pressed", String(dark()));
  Object.values(api.charts).forEach((u) => u.redraw());
  $$("[data-cells]").forEach((e) => e.painted && e.painted());
}
media.addEventListener("change", () => theme());
const probe = make("span", {hidden: true});
document.body.append(probe);
const color = (name) => { probe.style.color = `var(--${name})`; return getComputedStyle(probe).color; };

// Address: #case/parameter&q=filter&p=filter of parameters ------------------------------------------
function route() {
  const [place, ...rest] = location.hash.slice(1).split("&");
  const found = {place: "", id: "", q: "", p: ""};
  for (const part of [place, ...rest]) {
    const m = /^([qp])=(.*)$/s.exec(part);
    try {
      if (m) found[m[1]] = decodeURIComponent(m[2]);
      else if (part) found.place = decodeURIComponent(part);
    } catch (e) { /* a broken escape is no place */ }
  }
  found.id = found.place.split(/[/:]/)[0];
  return found;
}
const enc = (s) => encodeURIComponent(s).replace(/%2F/g, "/").replace(/%3A/g, ":");
function address(change) {
  const r = {...route(), ...change};
  const parts = [r.place && enc(r.place), r.q && `q=${enc(r.q)}`, r.p && `p=${enc(r.p)}`].filter(Boolean);
  return "#" + parts.join("&");
}
document.addEventListener("click", (event) => {
  const a = event.target.closest('a[href^="#"]');
  if (!a || event.metaKey || event.ctrlKey) return;
  event.preventDefault();
  let place = a.getAttribute("href").slice(1);
  try { place = decodeURIComponent(place); } catch (e) { /* as it stands */ }
  const next = address({place: place === "main" ? "" : place});
  if (next !== location.hash) history.pushState(null, "", next);
  arrive();
});
let here = null;
function arrive() {
  const r = route();
  if (here) here.classList.remove("here");
  here = null;
  const box = $("#filter");
  if (box && box.value !== r.q) box.value = r.q;
  $$("[data-filter-parameters]").forEach((b) => { if (b.value !== r.p) b.value = r.p; });
  filterCases(r.q);
  filterParameters(r.p);
  if (!r.place) return peek(null);
  const slash = r.place.indexOf("/");
  if (slash > 0) while (!document.getElementById(r.place) && grow(r.place.slice(0, slash), 500));
  let e = document.getElementById(r.place);
  if (!e) e = $$("[id]").find((each) => cases.has(each.id) && r.id.length > 3 && each.id.startsWith(r.id));
  peek(e && e.matches("a.cell") ? e.id : null);
  if (!e) return say(`No ${r.place} on this page`);
  for (let d = e.closest("details"); d; d = d.parentElement.closest("details")) d.open = true;
  if (e.hidden) e.hidden = false;
  e.classList.add("here");
  here = e;
  $$("details.fold", e).forEach((d) => { d.open = true; });
  e.scrollIntoView({block: e.matches("tr,a.cell") ? "center" : "start", behavior: "instant"});
  e.focus({preventScroll: true});
}
addEventListener("hashchange", arrive);
addEventListener("popstate", arrive);

// Filters ------------------------------------------------------------------------------------------
function matcher(text) {
  const tests = text.toLowerCase().split(/\s+/).filter(Boolean).map((token) => {
    const not = token.startsWith("!");
    if (not) token = token.slice(1);
    return (facts) => not !== (token === "" || facts.includes(token));
  });
  return (facts) => tests.every((test) => test(facts));
}
const facts = new Map();
function factsOf(id, place) {
  if (!facts.has(id)) {
    const c = cases.get(id) || {};
    const codes = (c.causes || []).flatMap((x) => [`cause:${x.code}`, x.code, x.name]);
    facts.set(id, [id, c.target || place, c.workload, `k=${c.accumulation_steps}`, `k:${c.accumulation_steps}`, `verdict:${c.verdict}`, c.verdict,
      `split:${c.split || "even"}`, `strategy:${c.strategy || "none"}`, `precision:${c.precision || "native"}`, `world_size:${c.world_size || 1}`, c.headline, ...codes].join(" ").toLowerCase());
  }
  return facts.get(id);
}
function filterCases(text) {
  const box = $("#filter");
  if (!box) return;
  const match = matcher(text);
  let shown = 0, all = 0;
  for (const row of $$(".matrix tbody tr")) {
    let any = !text;
    for (const cell of $$("a.cell", row)) {
      const yes = !text || match(factsOf(cell.hash.slice(1), row.dataset.row));
      cell.classList.toggle("dim", !yes);
      any = any || yes;
      all += 1;
      shown += yes;
    }
    row.hidden = !any;
  }
  for (const s of $$("[data-section]")) s.hidden = Boolean(text) && !match(factsOf(s.dataset.section));
  $("#filter-count").textContent = text ? `${shown} of ${all} cases` : "";
}
function filterParameters(text) {
  const match = matcher(text);
  for (const table of $$("[data-parameters]")) {
    if (text) while (grow(table.dataset.parameters, 1000));
    for (const row of table.tBodies[0].rows) row.hidden = Boolean(text) && !match(row.cells[0].textContent.toLowerCase());
  }
}
const typed = (key, apply) => (event) => {
  history.replaceState(null, "", address({[key]: event.target.value}) || "#");
  apply(event.target.value);
};
if ($("#filter")) $("#filter").addEventListener("input", typed("q", filterCases));
$$("[data-filter-parameters]").forEach((b) => b.addEventListener("input", typed("p", filterParameters)));

// A case without a section of its own ---------------------------------------------------------------
function peek(id) {
  const box = $("#peek"), c = cases.get(id);
  if (!box) return;
  box.hidden = !c;
  if (!c) return;
  const d = Object.entries(c.divergence || {}).filter((e) => e[1]);
  box.replaceChildren(
    make("b", {textContent: c.headline ? `${c.verdict}: ${c.headline}` : c.verdict}),
    make("p", {className: "quiet small", textContent: [c.target, c.workload, `K=${c.accumulation_steps}`, `case ${c.id}`, ...d.map(([n, v]) => `${n} ${sci(v.relative)}, noise ${sci(v.control)}`)].filter(Boolean).join(" · ")}),
    make("code", {textContent: c.replay === undefined ? `equivcheck replay ${c.id}` : c.replay || ""}));
}

// Tables -------------------------------------------------------------------------------------------
const grown = {};
function grow(id, count) {
  const table = $$("[data-parameters]").find((t) => t.dataset.parameters === id), c = cases.get(id);
  if (!table || !c) return false;
  const body = table.tBodies[0], rows = c.per_parameter || [];
  const known = grown[id] || (grown[id] = new Set([...body.rows].map((r) => r.id)));
  const rest = rows.filter((r) => !known.has(`${id}/${r.name}`)).slice(0, count);
  const limit = c.limit || 100, noise = $$("th", table.tHead).some((t) => t.dataset.key === "multiple");
  for (const r of rest) {
    known.add(`${id}/${r.name}`);
    const cell = (label, value, shown) => {
      const td = make("td", {className: "n", textContent: shown});
      td.dataset.label = label; td.dataset.value = value == null ? "" : value;
      return td;
    };
    const row = make("tr", {id: `${id}/${r.name}`, className: !r.zero && r.multiple > limit ? "beyond" : "", tabIndex: -1},
      make("th", {scope: "row"}, make("code", {}, ...breakable(r.name))),
      cell("relative", r.zero ? -1 : r.relative == null ? Infinity : r.relative, r.zero ? "~0" : sci(r.relative)));
    if (noise) row.append(cell("× noise", r.zero ? -1 : r.multiple, r.zero ? "-" : times(r.multiple)));
    row.append(cell("scale", r.scale, four(r.scale)), cell("cosine", r.cosine, four(r.cosine)), cell("norm", r.norm, sci(r.norm)));
    body.append(row);
  }
  const more = $$("[data-more]").find((b) => b.dataset.more === id);
  if (more) {
    more.nextElementSibling.textContent = `${body.rows.length} of ${rows.length} parameters`;
    more.hidden = body.rows.length >= rows.length;
  }
  return rest.length > 0;
}
for (const table of $$("[data-sortable]")) {
  for (const th of $$("thead th", table)) {
    const b = make("button", {type: "button", textContent: th.textContent});
    th.replaceChildren(b);
    b.addEventListener("click", () => {
      while (grow(table.dataset.parameters, 1000));
      const down = th.getAttribute("aria-sort") !== "descending";
      $$("thead th", table).forEach((t) => t.removeAttribute("aria-sort"));
      th.setAttribute("aria-sort", down ? "descending" : "ascending");
      const i = th.cellIndex, body = table.tBodies[0];
      const value = (row) => {
        const v = row.cells[i].dataset.value;
        return v === undefined ? row.cells[i].textContent : v === "" ? -Infinity : Number(v);
      };
      const rows = [...body.rows].sort((x, y) => {
        const a = value(x), c = value(y);
        return a < c ? -1 : a > c ? 1 : 0;
      });
      if (down) rows.reverse();
      body.append(...rows);
    });
  }
}

// Charts -------------------------------------------------------------------------------------------
// Exact zeros have a place of their own at the foot of the axis; the data stay what they are.
const LINES = [["gradients", "gradients"], ["parameters", "parameters"], ["losses", "losses"], ["learning_rates", "learning rates"], ["buffers", "buffers"], ["optimizer_state", "optimizer state"]];
const COLORS = ["acc", "s1", "s2", "s3", "s5", "s4"];
const sync = window.uPlot && uPlot.sync("steps");
function chart(holder) {
  const id = holder.dataset.chart.split(":")[0], s = (cases.get(id) || {}).steps;
  if (!s || !window.uPlot || s.optimizer_step.length < 2) return;
  const lines = LINES.filter(([key]) => s[key] && s[key].relative);
  const g = s.gradients || {};
  const columns = [s.optimizer_step, ...lines.map(([key]) => s[key].relative)];
  const series = [{label: "optimizer_step"}, ...lines.map(([, title], i) => ({
    label: title, width: i ? 2 : 5, stroke: () => color(COLORS[i]), value: (u, v) => sci(v),
    points: {show: s.optimizer_step.length <= 40, size: i ? 7 : 10, fill: () => color(COLORS[i])}}))];
  if (g.control) {
    columns.push(g.control);
    series.push({label: "noise", stroke: () => color("s4"), fill: () => color("noise"), width: 1, value: (u, v) => sci(v), points: {show: false}});
  }
  if (g.allowed) {
    columns.push(g.allowed);
    series.push({label: "limit", stroke: () => color("quiet"), dash: [5, 4], width: 1, value: (u, v) => sci(v), points: {show: false}});
  }
  const known = columns.slice(1).flat().filter((v) => v > 0).map(Math.log10);
  const low = Math.min(-17, Math.floor(Math.min(...known))), high = Math.max(0, Math.ceil(Math.max(...known)));
  const foot = 10 ** low, base = 10 ** (low - .4), fwd = (v) => v > foot ? Math.log10(v) : v === base ? low - .4 : low, every = Math.max(1, Math.ceil((high - low) / 6));
  const splits = [foot];
  for (let e = high; e > low; e -= every) splits.push(10 ** e);
  splits.sort((a, b) => a - b);
  const box = make("div", {className: "uchart"});
  holder.after(box);
  const axis = {stroke: () => color("quiet"), font: "12px system-ui", grid: {stroke: () => color("rule"), width: 1}, ticks: {show: false}};
  const u = new uPlot({
    width: Math.max(200, box.clientWidth), height: innerWidth < 600 ? 230 : 280,
    cursor: {sync: {key: sync.key}, drag: {x: true, y: false}}, legend: {live: true},
    scales: {x: {time: false}, y: {distr: 100, fwd, bwd: (v) => 10 ** v, range: [base, 10 ** high]}},
    axes: [{...axis, size: 28, space: 60, incrs: [1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 10000]}, {...axis, size: 50, splits: () => splits, filter: (u, v) => v, values: (u, vs) => vs.map((v) => v <= foot ? "0" : v === 1 ? "1" : `1e${Math.round(Math.log10(v))}`)}],
    hooks: {setLegend: [(u) => u.root.querySelector(".u-legend").classList.toggle("idle", u.cursor.idx == null)]},
    series}, columns, box);
  series.forEach((s, i) => { if (s.label === "noise" || s.label === "limit") $$(".u-marker", u.root)[i].classList.add(s.label); });
  api.charts[holder.dataset.chart] = u;
  holder.style.display = "none";
  new ResizeObserver(() => { const w = box.clientWidth; if (w && w !== u.width) u.setSize({width: w, height: u.height}); }).observe(box);
}
const watch = new IntersectionObserver((entries) => {
  for (const e of entries) if (e.isIntersecting) { watch.unobserve(e.target); (e.target.dataset.chart ? chart : cells)(e.target); }
}, {rootMargin: "300px"});
$$("[data-chart],[data-cells]").forEach((e) => { if (e.dataset.cells) e.hidden = false; watch.observe(e); });

// All parameters at all steps: one byte per cell ---------------------------------------------------
async function cells(box) {
  const c = cases.get(box.dataset.cells), m = c && c.cells;
  const columns = m ? m.optimizer_step.length : 0;
  if (!m || m.names.length * columns < 400 || !window.DecompressionStream) { box.hidden = true; return; }
  const packed = Uint8Array.from(atob(m.zlib_base64), (x) => x.charCodeAt(0));
  const bytes = new Uint8Array(await new Response(new Blob([packed]).stream().pipeThrough(new DecompressionStream("deflate"))).arrayBuffer());
  const canvas = make("canvas", {width: columns, height: m.names.length}), told = make("p", {className: "quiet small"});
  canvas.style.height = `${Math.max(120, Math.min(420, m.names.length))}px`;
  canvas.setAttribute("role", "img");
  canvas.setAttribute("aria-label", `All ${m.names.length} parameters over ${columns} optimizer steps, shaded by the distance from the noise`);
  const limit = Math.log10(c.limit || 100);
  const idle = `All ${m.names.length}${m.of > m.names.length ? ` of ${m.of}` : ""} parameters (down), ${columns} optimizer steps (across)`;
  told.textContent = idle;
  const shade = (b) => b < 2 ? 0 : b === 255 ? 5 : Math.max(0, Math.min(5, Math.ceil(((b - 2) / 12 - 3 - limit) / 3)));
  box.painted = () => {
    const shades = ["soft", "h1", "h2", "h3", "h4", "h5"].map((n) => color(n));
    const g = canvas.getContext("2d");
    for (let y = 0; y < m.names.length; y++) for (let x = 0; x < columns; x++) {
      g.fillStyle = shades[shade(bytes[y * columns + x])];
      g.fillRect(x, y, 1, 1);
    }
  };
  box.painted();
  canvas.addEventListener("mousemove", (event) => {
    const r = canvas.getBoundingClientRect();
    const x = Math.min(columns - 1, Math.floor((event.clientX - r.left) / r.width * columns)), y = Math.min(m.names.length - 1, Math.floor((event.clientY - r.top) / r.height * m.names.length));
    const b = bytes[y * columns + x];
    told.textContent = `${m.names[y]}, optimizer_step ${m.optimizer_step[x]}: ${b === 0 ? "absent" : b === 1 ? "equal" : b === 255 ? "not finite" : times(10 ** ((b - 2) / 12 - 3)) + " the noise"}`;
  });
  canvas.addEventListener("mouseleave", () => { told.textContent = idle; });
  box.append(canvas, told);
  api.cells = {...api.cells, [box.dataset.cells]: bytes};
}

// Keys ---------------------------------------------------------------------------------------------
function help() { const d = $("#help"); if (d && !d.open) d.showModal(); }
document.addEventListener("keydown", (event) => {
  const field = event.target.closest("input,textarea,select");
  if (event.key === "Escape" && field) field.blur();
  if (field || event.ctrlKey || event.metaKey || event.altKey) return;
  if (event.key === "/") {
    const box = $("#filter") || $("[data-filter-parameters]");
    if (box) { event.preventDefault(); box.focus(); box.select(); }
  } else if (event.key === "?") help();
  else if (event.key === "j" || event.key === "k") {
    const failing = $$("section.case.failed").filter((e) => !e.hidden);
    const stops = failing.length > 1 ? failing : $$(".panel[id]").filter((e) => e.offsetParent);
    const at = stops.findIndex((e) => e === here || e.contains(here));
    const next = stops[event.key === "j" ? Math.min(at + 1, stops.length - 1) : Math.max(at - 1, 0)];
    if (next) { history.pushState(null, "", address({place: next.id})); arrive(); }
  }
});
addEventListener("beforeprint", () => $$("details").forEach((d) => { d.open = true; }));
theme();
arrive();
api.ready = true;
})();
