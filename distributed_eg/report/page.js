// Draws the figures in the colours of the page's theme, again whenever that changes, and finds tasks.
"use strict";
const figures = JSON.parse(document.getElementById("figures").textContent);
const coarse = matchMedia("(pointer: coarse)").matches;
const dark = matchMedia("(prefers-color-scheme: dark)");
const config = {
  responsive: true,
  displaylogo: false,
  displayModeBar: coarse ? true : "hover",
  modeBarButtons: [["toImage", "zoom2d", "pan2d", "zoomIn2d", "zoomOut2d", "resetScale2d"]], // none that uploads
};
let found = new Set();
let printing = false;

function color(name) {
  return getComputedStyle(document.documentElement).getPropertyValue(`--${name}`).trim();
}

// A rectangle over each task that was searched for, along each axis that tasks stand on.
function marks(figure) {
  const shapes = [];
  figure.tasks.forEach((task, place) => {
    if (!found.has(task) || shapes.length > 200) return;
    const band = { type: "rect", line: { width: 1, color: color("hit") } };
    if (figure.axes.includes("x")) shapes.push({ ...band, yref: "paper", x0: place - 0.5, x1: place + 0.5, y0: 0, y1: 1 });
    if (figure.axes.includes("y")) shapes.push({ ...band, xref: "paper", y0: place - 0.5, y1: place + 0.5, x0: 0, x1: 1 });
  });
  return shapes;
}

function themed(id, place) {
  const figure = figures[id];
  const narrow = place.clientWidth < 560;
  const axis = { gridcolor: color("line"), zerolinecolor: color("line"), linecolor: color("line"), automargin: true, fixedrange: false };
  const layout = {
    ...structuredClone(figure.layout),
    height: narrow && figure.axes === "xy" ? Math.min(figure.height, place.clientWidth + 120) : figure.height,
    paper_bgcolor: color("back"),
    plot_bgcolor: color("back"),
    font: { color: color("ink"), family: "system-ui, sans-serif", size: narrow ? 11 : 12 },
    colorway: ["first", "second", "third", "fourth"].map(color),
    margin: { l: 44, r: 12, t: narrow && figure.layout.legend ? 64 : 34, b: 44 }, // room for buttons above it,
    dragmode: coarse ? false : "zoom",
    hoverlabel: { bgcolor: color("sheet"), bordercolor: color("line"), font: { color: color("ink") } },
    modebar: { bgcolor: "rgba(0,0,0,0)", color: color("faint"), activecolor: color("first"), orientation: "h" },
  };
  place.style.minHeight = `${layout.height}px`;
  if (printing) layout.width = 660;
  for (const name of ["xaxis", "yaxis"]) layout[name] = { ...axis, ...layout[name] };
  if (layout.coloraxis) layout.coloraxis.colorscale = [[0, color("low")], [1, color("high")]];
  layout.shapes = (layout.shapes || []).map((shape) => ({ ...shape, line: { ...shape.line, color: color("faint") } })).concat(marks(figure));
  return layout;
}

function draw() {
  for (const place of document.querySelectorAll(".plot")) Plotly.react(place, figures[place.id].data, themed(place.id, place), config);
}

function search(text) {
  const words = text.toLowerCase().split(/\s+/).filter(Boolean);
  const matches = (row) => words.every((word) => (/^\d+$/.test(word) ? row.dataset.task === word : row.dataset.search.includes(word)));
  found = new Set();
  for (const row of document.querySelectorAll("[data-search]")) {
    const hit = words.length > 0 && matches(row);
    if (row.tagName === "TR") row.hidden = words.length > 0 && !hit;
    else row.classList.toggle("hit", hit);
    if (hit) found.add(Number(row.dataset.task));
  }
  const first = document.querySelector(".tree .hit");
  if (first) {
    const tree = first.closest(".tree");
    tree.scrollTop += first.getBoundingClientRect().top - tree.getBoundingClientRect().top - tree.clientHeight / 2;
  }
  document.getElementById("found").textContent = words.length ? `${found.size} found` : "";
  for (const place of document.querySelectorAll(".plot")) {
    if (figures[place.id].tasks.length) Plotly.relayout(place, { shapes: themed(place.id, place).shapes });
  }
}

let waiting;
document.getElementById("search").addEventListener("input", (event) => {
  clearTimeout(waiting);
  waiting = setTimeout(search, 150, event.target.value);
});
dark.addEventListener("change", draw);
addEventListener("beforeprint", () => {
  printing = true;
  document.documentElement.classList.add("paper");
  for (const part of document.querySelectorAll("details:not([open])")) { part.open = true; part.dataset.shut = ""; }
  draw();
});
addEventListener("afterprint", () => {
  printing = false;
  document.documentElement.classList.remove("paper");
  for (const part of document.querySelectorAll("details[data-shut]")) { part.open = false; delete part.dataset.shut; }
  draw();
});
draw();
