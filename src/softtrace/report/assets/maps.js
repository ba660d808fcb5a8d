/* Heat maps: share of a trace's edges by component and depth quarter, over the size of the trace. */

const COMPONENTS = [
  ["attention", "attention"],
  ["mlp", "MLP"],
  ["attention_residual", "residual, attn"],
  ["mlp_residual", "residual, MLP"],
];
const QUARTERS = ["first", "second", "third", "last"];

/* Every fifth size: a table of all would be too wide. */
function listed({ sizes }) {
  return sizes.map((_, step) => step).filter((step) => step % 5 === 0);
}

function drawHeat(place) {
  const counted = RUNS.map((run, index) => ({ ...run, index })).filter(({ density }) => density.topology);
  if (!counted.length) {
    place.append(html("p", { class: "missing" }, "These edges were not counted."));
    return;
  }
  const names = shadeNames(DATA.share_bounds, "of the trace’s edges");
  const grid = html("div", { class: "panels" });
  const readout = readoutLine();
  place.append(
    grid,
    readout,
    legend(...names.flatMap((name, step) => (name ? [key(svg("rect", { x: 1, y: 1, width: 32, height: 12, class: `shade shade-${step}` }), name)] : []))),
    html("p", { class: "cap" }, scaleNote("these shares")),
    numbersTable(["component, quarter of the layers", ...counted.flatMap(({ label, density: { topology } }) => listed(topology).map((step) => `${SINGLE ? "" : `${label}, `}${percent(topology.sizes[step])}`))], () =>
      COMPONENTS.flatMap(([kind, name]) =>
        QUARTERS.map((quarter, depth) => [
          `${name}, ${quarter}`,
          ...counted.flatMap(({ density: { topology } }) =>
            listed(topology).map((step) => percent(topology.shares[step][depth][topology.kinds.indexOf(kind)]))),
        ]),
      ),
    ),
  );
  grid.style.setProperty("--across", { 1: 1, 2: 2, 4: 2 }[counted.length] || 3);
  for (const { label, density, phases, index } of counted) {
    const canvas = html("div", { class: "canvas" });
    const title = html("p", { class: "panel-title" }, html("span", { class: "mark", "data-mark": index }), label);
    grid.append(html("div", { class: "panel" }, SINGLE ? null : title, canvas));
    responsive(canvas, (width) => canvas.replaceChildren(heatMap(density.topology, phases, width, SINGLE ? "" : `${label}: `, readout)));
  }
}

function heatMap({ sizes, kinds, shares }, phases, width, prefix, readout) {
  const row = 15;
  const gap = 6;
  const rows = COMPONENTS.flatMap(([kind, name], group) =>
    QUARTERS.map((quarter, depth) => ({ kind, name, quarter, depth, y: 8 + (group * 4 + depth) * row + group * gap })),
  );
  const height = rows.at(-1).y + row + 42;
  const box = board(width, height, `${prefix}share of the trace's edges by component and depth, over size`, { left: 112, top: 8, right: 14 });
  const x = logScale(sizes[0], sizes.at(-1), box.x0, box.x1 - (box.x1 - box.x0) / sizes.length);
  const across = (box.x1 - box.x0) / sizes.length;
  box.across = sizes.length;
  for (const { kind, name, depth, y } of rows) {
    const column = kinds.indexOf(kind);
    shares.forEach((share, step) =>
      box.root.append(
        svg("rect", { x: (box.x0 + step * across).toFixed(2), y, width: (across + 0.3).toFixed(2), height: row, class: `shade shade-${shadeOf(share[depth][column], DATA.share_bounds)}` }),
      ),
    );
    if (depth === 0) box.root.append(text(name, box.x0 - 22, y + 11, { "text-anchor": "end" }));
    box.root.append(text(`${depth + 1}/4`, box.x0 - 4, y + 11, { "text-anchor": "end", class: "small" }));
  }
  box.y0 = height - 42;
  const middle = (size) => x(size) + across / 2;
  xAxis(box, middle, width < 420 ? [1e-4, 1e-2, 1] : LOG_TICKS, tick, "size of the trace (log scale)");
  if (phases.length) box.root.append(svg("path", { d: `M${middle(phases[0].to)} 4V${box.y0}`, class: "boundary" }));
  const find = (px, py) => {
    const step = Math.max(0, Math.min(sizes.length - 1, Math.floor((px - box.x0) / across)));
    const line = rows.filter(({ y }) => py >= y).length - 1;
    return Math.max(0, line) * sizes.length + step;
  };
  const show = (cell, sign) => {
    const { kind, name, quarter, depth, y } = rows[Math.floor(cell / sizes.length)];
    const step = cell % sizes.length;
    sign.append(svg("rect", { x: box.x0 + step * across, y, width: across, height: row, class: "cell" }));
    return `${prefix}${name}, ${quarter} quarter of the layers, trace of ${percent(sizes[step])}: ${percent(shares[step][depth][kinds.indexOf(kind)])} of its edges`;
  };
  guide(box, rows.length * sizes.length, find, show, readout);
  return box.root;
}
