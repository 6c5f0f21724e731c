// Hover and keyboard cursors over the charts and the heat map, and a printable page. No library.
"use strict";
(() => {
  const page = JSON.parse(document.getElementById("page-data").textContent);
  const tip = document.getElementById("tip");
  const SVG = "http://www.w3.org/2000/svg";

  function add(parent, name, attributes) {
    const node = document.createElementNS(SVG, name);
    for (const key in attributes) node.setAttribute(key, attributes[key]);
    parent.append(node);
  }

  // Text only ever enters as textContent: what a run recorded cannot become markup.
  function show(lines, left, top) {
    tip.replaceChildren(...lines.map((line) => {
      const row = document.createElement("div");
      if (line.colour) {
        const key = document.createElement("i");
        key.className = "key b" + line.colour;
        row.append(key);
      }
      row.append(line.text);
      return row;
    }));
    tip.hidden = false;
    const room = document.documentElement.clientWidth - tip.offsetWidth - 12;
    tip.style.left = Math.max(8, left + 16 > room ? left - tip.offsetWidth - 16 : left + 16) + scrollX + "px";
    tip.style.top = Math.max(8, top - tip.offsetHeight - 8) + scrollY + "px";
  }

  function nearest(sorted, value) {
    let low = 0, high = sorted.length - 1;
    while (high - low > 1) {
      const middle = (low + high) >> 1;
      if (sorted[middle] < value) low = middle; else high = middle;
    }
    return Math.abs(sorted[high] - value) < Math.abs(sorted[low] - value) ? high : low;
  }

  for (const figure of document.querySelectorAll("[data-chart]")) {
    const chart = page.charts[figure.dataset.chart];
    const svg = figure.querySelector("svg");
    const cursor = svg.querySelector(".cursor");
    const scale = () => svg.viewBox.baseVal.width / svg.getBoundingClientRect().width;
    const toX = (step) => chart.left + (step - chart.x[0]) / (chart.x[1] - chart.x[0]) * (chart.right - chart.left);
    const longest = chart.curves.reduce((a, b) => (b.xs.length > a.xs.length ? b : a));
    let index = longest.xs.length - 1;

    function point(at) {
      index = Math.max(0, Math.min(longest.xs.length - 1, at));
      const step = longest.xs[index];
      const lines = [{ text: "step " + step.toLocaleString("en") }];
      cursor.replaceChildren();
      add(cursor, "path", { d: `M${toX(step)} ${chart.top}V${chart.bottom}` });
      for (const curve of chart.curves) {
        const i = nearest(curve.xs, step);
        if (curve.texts[i] == null) continue;
        const other = curve.xs[i] === step ? "" : " (step " + curve.xs[i].toLocaleString("en") + ")";
        lines.push({ colour: curve.colour, text: `${curve.name} ${curve.texts[i]}${other}` });
        add(cursor, "circle", { class: "c" + curve.colour, cx: toX(curve.xs[i]), cy: curve.tops[i], r: 4 });
      }
      const box = svg.getBoundingClientRect();
      show(lines, box.left + toX(step) / scale(), box.top + 40);
    }
    function hide() { tip.hidden = true; cursor.replaceChildren(); }

    svg.addEventListener("pointermove", (event) => {
      const x = (event.clientX - svg.getBoundingClientRect().left) * scale();
      const share = (x - chart.left) / (chart.right - chart.left);
      point(nearest(longest.xs, chart.x[0] + share * (chart.x[1] - chart.x[0])));
    });
    svg.addEventListener("pointerleave", hide);
    svg.addEventListener("blur", hide);
    svg.addEventListener("keydown", (event) => {
      const target = { ArrowLeft: index - 1, ArrowRight: index + 1, Home: 0, End: longest.xs.length - 1 }[event.key];
      if (event.key === "Escape") hide();
      if (target === undefined) return;
      event.preventDefault();
      point(target);
    });
  }

  const heat = document.getElementById("heat");
  if (heat) {
    const { left, top, tall, wide } = heat.dataset;
    heat.addEventListener("pointermove", (event) => {
      const box = heat.getBoundingClientRect();
      const scale = heat.viewBox.baseVal.width / box.width;
      const layer = Math.floor(((event.clientY - box.top) * scale - top) / tall);
      const expert = Math.floor(((event.clientX - box.left) * scale - left) / wide);
      const ratio = page.heat[layer] && page.heat[layer][expert];
      if (ratio === undefined) { tip.hidden = true; return; }
      show([{ text: `layer ${page.layers[layer]}, expert ${expert}` }, { text: (ratio / 100).toFixed(2) + " times the fair share" }],
        event.clientX, event.clientY);
    });
    heat.addEventListener("pointerleave", () => { tip.hidden = true; });
  }

  // Paper shows everything; the screen's state comes back afterwards.
  let closed = [];
  addEventListener("beforeprint", () => {
    closed = [...document.querySelectorAll("details:not([open])")];
    for (const details of closed) details.open = true;
  });
  addEventListener("afterprint", () => {
    for (const details of closed) details.open = false;
  });
})();
