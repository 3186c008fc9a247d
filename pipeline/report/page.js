// report.html: charts in place of pictures, a slider over λ, a table of classes.
// Without JavaScript the pictures stay; where a browser cannot unpack plotly, they stay too.
"use strict";

const read = (id) => JSON.parse(document.getElementById(id).textContent);
const tone = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();
const escaped = (text) => text.replace(/[&<>]/g, (c) => ({ "&": "&amp;", "<": "&lt;", ">": "&gt;" })[c]);
const known = (value) => value !== null && value !== undefined;
const fixed = (value) => ((Math.abs(value) * 4) % 4 === 1 ? value - Math.sign(value) / 20 : value).toFixed(1); // ties to even
const percent = (value) => (known(value) ? fixed(value) : "–");
const spread = ([mean, std]) => percent(mean) + (known(std) ? ` ± ${fixed(std)}` : "");
const signed = (value) => {
  if (!known(value)) return "–";
  const text = fixed(value);
  return Number(text) === 0 ? "0.0" : (Number(text) > 0 ? "+" : "") + text.replace("-", "−");
};
const whole = (value) => value.toLocaleString("en");
const dark = matchMedia("(prefers-color-scheme: dark)");
const wide = matchMedia("(min-width: 640px)");

// ---- charts ----

let unpacked = null;
/** Plotly, once, when the first chart comes near. */
function plotly() {
  unpacked ??= (async () => {
    const packed = Uint8Array.from(atob(document.getElementById("plotly").textContent), (c) => c.charCodeAt(0));
    const stream = new Blob([packed]).stream().pipeThrough(new DecompressionStream("gzip"));
    const code = document.createElement("script");
    code.textContent = await new Response(stream).text();
    document.head.append(code);
  })();
  return unpacked;
}

/** A figure in the reader's colours: its blacks, greys and whites are those of light or dark mode. */
function inColours(part) {
  const own = { "#000000": "--ink", "#5f6368": "--soft", "#e3e6ea": "--line", white: "--card" };
  if (typeof part === "string") return part in own ? tone(own[part]) : part;
  if (Array.isArray(part)) return typeof part[0] === "number" ? part : part.map(inColours);
  if (part === null || typeof part !== "object") return part;
  return Object.fromEntries(Object.entries(part).map(([key, value]) => [key, inColours(value)]));
}

/** A trace whose point i is the i-th largest class tells, where one points at it, what is known of the class. */
function ofClasses(trace, rows) {
  if (trace.meta !== "classes") return trace;
  const text = rows.map(([name, images, group, before, after, change, tested]) => {
    const accuracy = `test ${percent(before)} → ${percent(after)} % (${signed(change)}), ${whole(tested)} images`;
    return `<b>${escaped(shortened(name))}</b><br>${whole(images)} training images, ${group}<br>${accuracy}`;
  });
  const hovertemplate = "%{text}<br>%{fullData.name}: %{y:.4~g}<extra></extra>";
  return { ...trace, text, textposition: "none", hovertemplate };
}

const MANY = 2000;
const drawsPoints = () => Boolean(document.createElement("canvas").getContext("webgl"));

/** A trace that a browser can still draw in a moment where it has thousands of points. */
function light(trace) {
  if (!(trace.x?.length > MANY)) return trace;
  if (trace.type === "bar") {
    const [x, text] = [trace.x, trace.text ?? []].map((values) => values.flatMap((v) => [v, v, null]));
    const y = trace.y.flatMap((v) => [known(v) ? 0 : null, v, null]);
    return { ...trace, type: "scatter", mode: "lines", x, y, text, line: { color: trace.marker.color, width: 1 }, marker: {} };
  }
  if (trace.type !== "scatter") return trace;
  if (trace.mode?.includes("lines")) return { ...trace, mode: "lines", line: { ...trace.line, width: 1 } };
  return drawsPoints() ? { ...trace, type: "scattergl" } : trace;
}

const shortened = (name) => (name.length > 60 ? `${name.slice(0, 59)}…` : name);

/** Text in lines of at most 44 letters. */
const wrapped = (text) => text.replace(/(.{1,44})(\s+|$)/g, "$1<br>").replace(/<br>$/, "");

/** What all charts share, below what a layout says itself. */
function layoutOf(own) {
  const [ink, soft, line, card] = ["--ink", "--soft", "--line", "--card"].map(tone);
  const axis = { gridcolor: line, zerolinecolor: line, linecolor: soft, tickcolor: soft, automargin: true };
  const layout = {
    font: { family: getComputedStyle(document.body).fontFamily, size: wide.matches ? 13 : 12, color: ink },
    paper_bgcolor: "rgba(0,0,0,0)",
    plot_bgcolor: "rgba(0,0,0,0)",
    margin: { l: 52, r: 12, t: own.annotations ? 40 : 12, b: 44 },
    legend: { orientation: "h", x: 0, y: -0.02, yref: "container", yanchor: "bottom" },
    hoverlabel: { bgcolor: card, bordercolor: soft, font: { color: ink }, align: "left", namelength: -1 },
    modebar: { bgcolor: "rgba(0,0,0,0)", color: soft, activecolor: ink },
    hovermode: "closest",
    dragmode: wide.matches ? "zoom" : false,
    height: 440,
    ...own,
  };
  for (const key of Object.keys(own).filter((k) => /^[xy]axis\d*$/.test(k))) {
    layout[key] = { ...axis, ...own[key] };
    if (own[key].title && !wide.matches) layout[key].title = { ...own[key].title, text: wrapped(own[key].title.text) };
  }
  if (own.grid?.columns > 1 && !wide.matches) {
    layout.grid = { ...own.grid, rows: own.grid.rows * own.grid.columns, columns: 1 };
    layout.height = 290 * layout.grid.rows + 60;
  }
  return layout;
}

const figures = new Map(); // of places whose figure is not in the page, or is changed before it is drawn

/** Draws the chart of a place, again where it has one. */
async function draw(place) {
  const { figure = read(place.dataset.chart), changed = (same) => same } = figures.get(place) ?? {};
  await plotly();
  const { data, layout } = inColours(changed(structuredClone(figure)));
  const of = document.getElementById(`classes-${place.closest("[data-run]")?.dataset.run}`);
  const rows = of && data.some((trace) => trace.meta === "classes") ? read(of.id).rows : [];
  place.closest("figure")?.classList.add("live");
  place.classList.add("drawn");
  try {
    await Plotly.react(place, data.map((trace) => light(ofClasses(trace, rows))), layoutOf(layout), {
      responsive: true,
      displaylogo: false,
      displayModeBar: wide.matches ? "hover" : false,
      modeBarButtons: [["toImage", "zoom2d", "pan2d", "resetScale2d"]], // not those that send a chart to a server
      plotlyServerURL: "",
    });
  } catch (error) {
    place.classList.remove("drawn"); // the picture comes back
    place.closest("figure")?.classList.remove("live");
    throw error;
  }
}

function drawNear(places) {
  const near = new IntersectionObserver(
    (entries) => {
      for (const { target } of entries.filter((entry) => entry.isIntersecting)) {
        near.unobserve(target);
        draw(target.querySelector(".chart") ?? target);
      }
    },
    { rootMargin: "500px" },
  );
  for (const place of places) near.observe(place.closest("figure") ?? place);
  const again = () => document.querySelectorAll(".chart.drawn").forEach((place) => draw(place));
  dark.addEventListener("change", again);
  wide.addEventListener("change", again);
}

// ---- the slider over λ ----

function explore(box) {
  const of = read(box.dataset.explorer);
  const [slider, output, back, told] = ["input[type=range]", "output", "button", ".note"].map((s) => box.querySelector(s));
  const bars = box.querySelector(".chart");
  const lines = box.parentElement.querySelector("figure .chart");
  const split = () => box.querySelector("input[type=radio]:checked").value;
  const at = () => Number(slider.value);
  const number = (group, i) => of.values[split()][group].lams[i];

  const withBars = (figure) => {
    const groups = of.groups.map(([key]) => key);
    const one = of.chosen.length === 1 ? [[`chosen, λ = ${of.lams[of.chosen[0]]}`, (g) => number(g, of.chosen[0])]] : [];
    const kinds = [
      ...of.references.map((name, i) => [name, (g) => of.values[split()][g].references[i]]),
      ...one,
      [`slider, λ = ${of.lams[at()]}`, (g) => number(g, at())],
    ];
    const looks = [...figure.data.slice(0, of.references.length), ...(one.length ? [figure.data[2]] : []), figure.data[3]];
    figure.data = kinds.map(([name, value], i) => {
      const y = groups.map((g) => value(g)[0]);
      const std = groups.map((g) => value(g)[1]);
      const x = of.groups.map(([, title]) => title);
      const text = groups.map((g) => `${name}: ${spread(value(g))} %`);
      const error_y = { type: "data", array: std, thickness: 1, width: 3, color: "#5f6368" };
      return { ...looks[i], name, x, y, error_y, text, textposition: "none", hovertemplate: "%{x}, %{text}<extra></extra>" };
    });
    return figure;
  };
  const withCursor = (figure) => {
    for (const trace of figure.data) trace.visible = trace.meta.split === split();
    const x = of.places[at()];
    const line = { color: "#E69F00", width: 3 };
    figure.layout.shapes = [{ type: "line", x0: x, x1: x, y0: 0, y1: 1, yref: "paper", line, layer: "below" }];
    return figure;
  };

  figures.set(bars, { figure: of.bars, changed: withBars });
  figures.set(lines, { changed: withCursor });

  const move = () => {
    const lam = of.lams[at()];
    const isChosen = of.chosen.includes(at());
    output.textContent = `λ = ${lam}${isChosen ? " (chosen)" : ""}`;
    slider.setAttribute("aria-valuetext", output.textContent);
    for (const [key] of of.groups) {
      const tile = box.querySelector(`[data-group=${key}]`);
      const [here, before] = [number(key, at()), of.values[split()][key].references[0] ?? []];
      tile.querySelector("b").innerHTML = `${percent(here[0])}<small> %${known(here[1]) ? ` ± ${fixed(here[1])}` : ""}</small>`;
      const change = known(here[0]) && known(before[0]) ? here[0] - before[0] : null;
      const less = tile.querySelector("em");
      less.textContent = known(change) ? `${signed(change)} against ${of.start}` : "";
      less.className = !known(change) || Math.abs(change) < 0.05 ? "" : change > 0 ? "up" : "down";
    }
    const looking =
      split() === "test"
        ? "Looking at test at other λ selects nothing: it only shows what another λ would have given."
        : `These are the numbers of ${of.splits[split()]}, which the choice may see.`;
    told.textContent = `${of.choice} ${looking}`;
    for (const place of [bars, lines]) if (place.classList.contains("drawn")) draw(place);
  };
  slider.addEventListener("input", move);
  box.querySelectorAll("input[type=radio]").forEach((radio) => radio.addEventListener("change", move));
  back?.addEventListener("click", () => {
    slider.value = slider.defaultValue;
    move();
  });
  box.hidden = false;
  move();
}

// ---- the table of classes ----

const PAGE = 20;

function leaf(box) {
  const { rows } = read(box.dataset.classes);
  const [name, group, found, body, pager] = ["input", "select", ".found", "tbody", ".pager"].map((s) => box.querySelector(s));
  const heads = [...box.querySelectorAll("th")];
  const [before, next] = pager.querySelectorAll("button");
  const columns = [0, 1, 2, 6, 3, 4, 5]; // of a row, in the order of the table
  const compare = new Intl.Collator("en", { numeric: true }).compare;
  const order = { many: 0, medium: 1, few: 2 };
  let [sorted, down, first] = [1, true, 0];

  const matching = () => {
    const wanted = name.value.trim().toLowerCase();
    const column = columns[sorted];
    const mine = rows.filter((r) => r[0].toLowerCase().includes(wanted) && (!group.value || r[2] === group.value));
    const by = (a, b) => {
      if (!known(a[column]) || !known(b[column])) return known(b[column]) - known(a[column]); // unknown ones last
      const less = column === 0 ? compare(a[0], b[0]) : column === 2 ? order[a[2]] - order[b[2]] : a[column] - b[column];
      return down ? -less : less;
    };
    return mine.sort(by);
  };
  const cell = (text, kind) => Object.assign(document.createElement("td"), { textContent: text, className: kind ?? "" });
  const show = () => {
    const mine = matching();
    first = Math.min(first, Math.max(0, Math.ceil(mine.length / PAGE - 1) * PAGE));
    body.replaceChildren(
      ...mine.slice(first, first + PAGE).map(([label, images, kind, was, is, change, tested]) => {
        const row = document.createElement("tr");
        const head = Object.assign(document.createElement("th"), { scope: "row", textContent: label, title: label });
        const sign = !known(change) || Math.abs(change) < 0.05 ? "" : change > 0 ? "up" : "down";
        row.append(head, cell(whole(images)), cell(kind), cell(whole(tested)), cell(percent(was)), cell(percent(is)));
        row.append(cell(signed(change), sign));
        return row;
      }),
    );
    heads.forEach((head, i) => head.setAttribute("aria-sort", i !== sorted ? "none" : down ? "descending" : "ascending"));
    found.textContent = `${whole(mine.length)} of ${whole(rows.length)} classes`;
    pager.hidden = mine.length <= PAGE;
    pager.querySelector("span").textContent = `${whole(first + 1)} to ${whole(Math.min(first + PAGE, mine.length))}`;
    before.disabled = first === 0;
    next.disabled = first + PAGE >= mine.length;
  };
  const from = (start) => {
    first = Math.max(0, start);
    show();
  };
  heads.forEach((head, i) =>
    head.firstChild.addEventListener("click", () => {
      [sorted, down] = [i, i === sorted ? !down : ![0, 2].includes(i)];
      from(0);
    }),
  );
  name.addEventListener("input", () => from(0));
  group.addEventListener("change", () => from(0));
  before.addEventListener("click", () => from(first - PAGE));
  next.addEventListener("click", () => from(first + PAGE));
  box.hidden = false;
  box.nextElementSibling.hidden = true; // what is said without this script
  show();
}

document.querySelectorAll("[data-classes]").forEach(leaf);
if ("DecompressionStream" in window) {
  document.querySelectorAll("[data-explorer]").forEach(explore);
  drawNear(document.querySelectorAll(".chart"));
}
