// Small charts as inline SVG: a line with its area, gaps where nothing was.

const SVG = "http://www.w3.org/2000/svg";
const WIDTH = 300;
const HEIGHT = 60;

function shape(name, attributes) {
  const made = document.createElementNS(SVG, name);
  for (const [attribute, value] of Object.entries(attributes)) made.setAttribute(attribute, value);
  return made;
}

export function makeChart(label) {
  const chart = shape("svg", { viewBox: `0 0 ${WIDTH} ${HEIGHT}`, preserveAspectRatio: "none", role: "img", "aria-label": label });
  chart.append(
    shape("line", { class: "chart-base", x1: 0, x2: WIDTH, y1: HEIGHT, y2: HEIGHT }),
    shape("path", { class: "chart-area" }),
    shape("path", { class: "chart-line" }),
    shape("line", { class: "chart-mark", y1: 0, y2: HEIGHT, visibility: "hidden" }),
  );
  return chart;
}

// `values`: a number or null for each slot, the last at the right edge of `slots` slots.
export function drawChart(chart, values, slots) {
  const [, area, line] = chart.children;
  const highest = Math.max(...values.map((value) => value ?? 0), 0) * 1.08 || 1;
  const x = (index) => ((slots - values.length + index + 0.5) / slots) * WIDTH;
  const y = (value) => HEIGHT - (value / highest) * HEIGHT;
  let path = "";
  let filled = "";
  let run = [];
  const close = () => {
    if (run.length) {
      const points = run.map(([px, py]) => `${px.toFixed(1)} ${py.toFixed(1)}`);
      // A single point is a short dash, or nobody would see it.
      if (run.length === 1) points.push(`${(run[0][0] + WIDTH / slots / 2).toFixed(1)} ${run[0][1].toFixed(1)}`);
      path += `M${points.join("L")}`;
      filled += `M${run[0][0].toFixed(1)} ${HEIGHT}L${points.join("L")}L${run.at(-1)[0].toFixed(1)} ${HEIGHT}Z`;
    }
    run = [];
  };
  values.forEach((value, index) => (value === null ? close() : run.push([x(index), y(value)])));
  close();
  line.setAttribute("d", path);
  area.setAttribute("d", filled);
}

// Calls `show(index)` with the slot under the pointer, and `show(null)` when it leaves.
export function watchPointer(chart, numberOfValues, slots, show) {
  const mark = chart.children[3];
  chart.addEventListener("pointermove", (event) => {
    const box = chart.getBoundingClientRect();
    const slot = Math.floor(((event.clientX - box.left) / box.width) * slots);
    const index = slot - (slots - numberOfValues());
    const inside = index >= 0 && index < numberOfValues();
    const at = ((slot + 0.5) / slots) * WIDTH;
    mark.setAttribute("x1", at);
    mark.setAttribute("x2", at);
    mark.setAttribute("visibility", inside ? "visible" : "hidden");
    show(inside ? index : null);
  });
  chart.addEventListener("pointerleave", () => {
    mark.setAttribute("visibility", "hidden");
    show(null);
  });
}
