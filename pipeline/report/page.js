// report.html: charts in place of pictures. Without JavaScript, or where a browser is too old, the pictures stay.
"use strict";

const read = (id) => JSON.parse(document.getElementById(id).textContent);
const tone = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();
const escaped = (text) => text.replace(/[&<>]/g, (c) => ({ "&": "&amp;", "<": "&lt;", ">": "&gt;" })[c]);
const dark = matchMedia("(prefers-color-scheme: dark)");
const narrow = () => innerWidth < 640;

let ready = null;
/** Plotly, unpacked once, when the first chart is near. */
function plotly() {
  ready ??= (async () => {
    const packed = Uint8Array.from(atob(document.getElementById("plotly").textContent), (c) => c.charCodeAt(0));
    const code = document.createElement("script");
    code.textContent = await new Response(
      new Blob([packed]).stream().pipeThrough(new DecompressionStream("gzip")),
    ).text();
    document.head.append(code);
  })();
  return ready;
}

/** A figure in the page's colours: its blacks, greys and whites are those of the reader's light or dark mode. */
function inColours(figure) {
  const own = { "#000000": "--ink", "#5f6368": "--soft", "#e3e6ea": "--line", white: "--card" };
  const turned = (value) => {
    if (typeof value === "string") return value in own ? tone(own[value]) : value;
    if (Array.isArray(value)) return typeof value[0] === "number" ? value : value.map(turned);
    if (value === null || typeof value !== "object") return value;
    return Object.fromEntries(Object.entries(value).map(([key, of]) => [key, turned(of)]));
  };
  return { data: turned(figure.data), layout: turned(figure.layout) };
}

/** What hovering over a class tells: point i is the i-th largest class. */
function ofClasses(trace, classes) {
  if (trace.meta !== "classes") return trace;
  const number = (value) => (value === null ? "–" : value.toFixed(1));
  const told = classes.rows.map((row) => {
    const [name, images, group, before, after, change, tested] = row;
    const accuracy = `accuracy ${number(before)} → ${number(after)} % (${signed(change)}), ${tested} test images`;
    return `<b>${escaped(name)}</b><br>${images.toLocaleString("en")} training images, ${group}<br>${accuracy}`;
  });
  return { ...trace, text: told, textposition: "none", hovertemplate: "%{text}<br>here: %{y:.4~g}<extra>%{fullData.name}</extra>" };
}

const signed = (value) => (value === null ? "–" : `${value > 0.05 ? "+" : ""}${value.toFixed(1)}`.replace("-", "−"));

/** The layout every chart shares, below what it says itself. */
function layoutOf(own) {
  const { ink, soft, line, card } = Object.fromEntries(["ink", "soft", "line", "card"].map((n) => [n, tone(`--${n}`)]));
  const axis = { gridcolor: line, zerolinecolor: line, linecolor: soft, tickcolor: soft, automargin: true };
  const named = Object.keys(own).filter((key) => /^[xy]axis\d*$/.test(key));
  const layout = {
    font: { family: getComputedStyle(document.body).fontFamily, size: narrow() ? 12 : 13, color: ink },
    paper_bgcolor: "rgba(0,0,0,0)",
    plot_bgcolor: "rgba(0,0,0,0)",
    margin: { l: 56, r: 16, t: 16, b: 48 },
    legend: { orientation: "h", x: 0, y: -0.18, yanchor: "top" },
    hoverlabel: { bgcolor: card, bordercolor: soft, font: { color: ink }, align: "left", namelength: -1 },
    hovermode: "closest",
    height: 440,
    ...own,
  };
  for (const key of named) layout[key] = { ...axis, ...own[key] };
  const panels = own.grid;
  if (panels && panels.columns > 1 && narrow()) {
    layout.grid = { ...panels, rows: panels.rows * panels.columns, columns: 1 };
    layout.height = 300 * layout.grid.rows;
    layout.legend = { ...layout.legend, y: -0.18 / layout.grid.rows };
  }
  return layout;
}

const CONFIG = {
  responsive: true,
  displaylogo: false,
  modeBarButtonsToRemove: ["select2d", "lasso2d", "autoScale2d", "zoomIn2d", "zoomOut2d"],
};

async function draw(figure) {
  const place = figure.querySelector(".chart");
  const classes = figure.closest("[data-run]")?.dataset.run;
  const found = inColours(read(place.dataset.chart));
  const rows = document.getElementById(`classes-${classes}`) ? read(`classes-${classes}`) : { rows: [] };
  await plotly();
  const data = found.data.map((trace) => ofClasses(trace, rows));
  figure.classList.add("live");
  await Plotly.react(place, data, layoutOf(found.layout), { ...CONFIG, displayModeBar: narrow() ? false : "hover" });
}

const figures = [...document.querySelectorAll("figure:has(.chart)")];
if ("DecompressionStream" in window) {
  const near = new IntersectionObserver(
    (entries) => {
      for (const entry of entries.filter((e) => e.isIntersecting)) {
        near.unobserve(entry.target);
        draw(entry.target);
      }
    },
    { rootMargin: "600px" },
  );
  figures.forEach((figure) => near.observe(figure));
  const again = () => figures.filter((f) => f.classList.contains("live")).forEach(draw);
  dark.addEventListener("change", again);
  matchMedia("(min-width: 640px)").addEventListener("change", again);
}
