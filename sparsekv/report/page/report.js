"use strict";
// Charts, and the button between light and dark. Every text comes from the page or from a figure's own JSON.
const NARROWEST_PANEL = 250; // px
const MOST_COLUMNS = 4;
const PANEL_GAP = { left: 62, right: 18, above: 28, below: 48 }; // px around a panel: its axes and its title
const plots = [...document.querySelectorAll(".plot")];

function look(layout) {
  const style = getComputedStyle(document.documentElement);
  const colour = (name) => style.getPropertyValue(name).trim();
  layout.font.color = colour("--text");
  layout.hoverlabel = { bgcolor: colour("--surface"), bordercolor: colour("--line"), font: { color: colour("--text") } };
}

// Puts as many panels beside each other as there is room for, and the rest below.
function arrange(layout, width) {
  const { panels, panel_height: panelHeight } = layout.meta;
  const { l, r, t, b } = layout.margin;
  const columns = Math.max(1, Math.min(panels, MOST_COLUMNS, Math.floor(width / NARROWEST_PANEL)));
  const up = Math.ceil(panels / columns) * panelHeight;
  const across = width - l - r;
  layout.height = up + t + b;
  for (let number = 0; number < panels; number++) {
    const axis = number ? number + 1 : "";
    const left = ((number % columns) * across) / columns;
    const top = up - Math.floor(number / columns) * panelHeight;
    const x = [(left + PANEL_GAP.left) / across, (left + across / columns - PANEL_GAP.right) / across];
    const y = [(top - panelHeight + PANEL_GAP.below) / up, (top - PANEL_GAP.above) / up];
    layout[`xaxis${axis}`].domain = x;
    layout[`yaxis${axis}`].domain = y;
    Object.assign(layout.annotations[number], { x: x[0], y: y[1] });
  }
}

function fit(plot, layout) {
  look(layout);
  if (layout.meta?.panels) arrange(layout, plot.clientWidth);
  return layout;
}

function redraw(plot) {
  return Plotly.react(plot, plot.data, fit(plot, { ...plot.layout }));
}

async function draw(plot) {
  const { data, layout } = JSON.parse(document.getElementById(plot.dataset.figure).textContent);
  if (matchMedia("(pointer: coarse)").matches) layout.dragmode = false; // a finger scrolls the page
  await Plotly.newPlot(plot, data, fit(plot, layout), { responsive: true, displayModeBar: false });
  plot.style.minHeight = "";
  let width = plot.clientWidth;
  new ResizeObserver(() => {
    if (plot.layout.meta?.panels && plot.clientWidth !== width) {
      width = plot.clientWidth;
      redraw(plot);
    }
  }).observe(plot);
}

function setTheme(name) {
  document.documentElement.dataset.theme = name;
  const button = document.getElementById("theme");
  button.setAttribute("aria-pressed", String(name === "dark"));
  for (const plot of plots) if (plot.layout) redraw(plot);
}

document.getElementById("theme").addEventListener("click", () => {
  const name = document.documentElement.dataset.theme === "dark" ? "light" : "dark";
  keepTheme(name);
  setTheme(name);
});
systemDark.addEventListener("change", () => readTheme() || setTheme(systemDark.matches ? "dark" : "light"));
setTheme(document.documentElement.dataset.theme);
Promise.all(plots.map(draw)).then(() => { document.documentElement.dataset.drawn = String(plots.length); });
