"use strict";
// Hovering, smoothing and copying. The charts are drawn already; without this script the page only lacks these.
const SIZE = 1000, MOST_POINTS = 1500;

function positions(x) {
  return Array.isArray(x) ? x : Array.from({ length: x.n }, (_, i) => x.from + i * x.by);
}

function shown(value, unit) {
  if (value === null || value === undefined) return "–";
  if (unit === "percent") return (100 * value).toFixed(1) + "%";
  if (unit === "bytes") {
    for (const [name, size] of [["TB", 1e12], ["GB", 1e9], ["MB", 1e6], ["kB", 1e3]])
      if (value >= size) return (value / size).toFixed(2) + " " + name;
    return value + " B";
  }
  return Math.abs(value) >= 1000 ? Math.round(value).toLocaleString("en") : String(+value.toPrecision(4));
}

// Exponential moving average with bias correction; gaps (null) stay gaps.
function smoothed(values, weight) {
  let average = 0, share = 1;
  return values.map(value => {
    if (value === null) return null;
    average = weight * average + (1 - weight) * value;
    share *= weight;
    return average / (1 - share);
  });
}

function path(x, y, [x0, x1, y0, y1]) {
  let text = "", open = false;
  const every = Math.ceil(x.length / MOST_POINTS);
  for (let i = 0; i < x.length; i++) {
    if (y[i] === null) { open = false; continue; }
    if (i % every && i !== x.length - 1) continue;
    const point = (SIZE * (x[i] - x0) / (x1 - x0)).toFixed(2) + "," + (SIZE * (y1 - y[i]) / (y1 - y0)).toFixed(2);
    text += (open ? "L" : "M") + point;
    open = true;
  }
  return text;
}

function nearest(x, wanted) {
  let low = 0, high = x.length - 1;
  while (high - low > 1) { const middle = (low + high) >> 1; if (x[middle] < wanted) low = middle; else high = middle; }
  return Math.abs(x[low] - wanted) <= Math.abs(x[high] - wanted) ? low : high;
}

const charts = [];

class Chart {
  constructor(figure) {
    this.figure = figure;
    this.plot = figure.querySelector(".plot");
    const content = JSON.parse(figure.querySelector("script").textContent);
    this.frame = content.frame; this.unit = content.unit; this.xName = content.x;
    this.lines = content.lines.filter(line => line.kind !== "limit");
    for (const line of this.lines) line.x = positions(line.x);
    this.smooth = [...figure.querySelectorAll("path.smooth")];
    this.noisy = this.lines.filter(line => line.kind === "noisy");
    this.tip = document.createElement("div"); this.tip.className = "tip"; this.tip.hidden = true;
    this.cross = document.createElement("div"); this.cross.className = "cross"; this.cross.hidden = true;
    this.plot.append(this.cross, this.tip);
    this.plot.addEventListener("pointermove", event => this.hover(event));
    this.plot.addEventListener("pointerleave", () => charts.forEach(chart => chart.leave()));
  }

  hover(event) {
    const box = this.plot.getBoundingClientRect();
    const share = Math.min(1, Math.max(0, (event.clientX - box.left) / box.width));
    const x = this.frame[0] + share * (this.frame[1] - this.frame[0]);
    for (const chart of charts) if (chart.xName === this.xName) chart.point(x, chart === this);
  }

  point(x, withTip) {
    const share = (x - this.frame[0]) / (this.frame[1] - this.frame[0]);
    this.cross.hidden = share < 0 || share > 1;
    this.cross.style.left = 100 * share + "%";
    this.tip.hidden = !withTip;
    if (!withTip) return;
    this.tip.replaceChildren();
    const main = this.lines.reduce((a, b) => (b.x.length > a.x.length ? b : a), this.lines[0]);
    const head = document.createElement("div");
    head.textContent = this.xName + " " + shown(main.x[nearest(main.x, x)], "");
    this.tip.append(head);
    for (const line of this.lines) {
      const at = nearest(line.x, x), row = document.createElement("div");
      row.className = "key " + line.kind + " c" + (line.colour % 8);
      let words = line.name + " " + shown(line.y[at], this.unit);
      if (line.average) words += ", smoothed " + shown(line.average[at], this.unit);
      if (line.kind === "points") words += " (" + this.xName + " " + shown(line.x[at], "") + ")";
      row.textContent = words;
      this.tip.append(row);
    }
    this.tip.style.top = "0.4rem";
    this.tip.style.left = share < 0.55 ? "calc(" + 100 * share + "% + 0.8rem)" : "";
    this.tip.style.right = share < 0.55 ? "" : "calc(" + 100 * (1 - share) + "% + 0.8rem)";
  }

  leave() { this.tip.hidden = this.cross.hidden = true; }

  smoothWith(weight) {
    this.noisy.forEach((line, index) => {
      line.average = smoothed(line.y, weight);
      this.smooth[index].setAttribute("d", path(line.x, line.average, this.frame));
    });
  }
}

function openCharts(root) {
  charts.length = 0;
  for (const figure of root.querySelectorAll("figure.chart")) charts.push(new Chart(figure));
}

function addCopyButtons(root) {
  for (const block of root.querySelectorAll("pre.copy")) {
    const text = block.textContent, button = document.createElement("button");
    button.textContent = "copy";
    button.addEventListener("click", () => {
      const area = document.createElement("textarea");  // navigator.clipboard is missing in pages opened from disk
      area.value = text; document.body.append(area); area.select();
      document.execCommand("copy"); area.remove(); button.textContent = "copied";
    });
    block.append(button);
  }
}

function openPage(root) {
  openCharts(root);
  addCopyButtons(root);
  const slider = root.querySelector(".smoothing input");
  if (!slider) return;
  root.classList.add("live");
  const longest = Math.max(0, ...charts.flatMap(chart => chart.noisy.map(line => line.x.length)));
  slider.value = longest < 20 ? 0 : Math.min(0.97, 1 - 10 / longest);
  slider.addEventListener("input", () => charts.forEach(chart => chart.smoothWith(+slider.value)));
}

if (document.querySelector("main")) openPage(document.querySelector("main"));
