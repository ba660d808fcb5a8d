/* TV over size, density against entropy, early exits. */

const GROUP_KEYS = () => [
  key(line([[1, 7], [33, 7]], { class: "easy", style: { stroke: SINGLE ? colour(0) : "var(--soft)" } }), "easy tokens (lowest entropy)"),
  key(line([[1, 7], [33, 7]], { class: "all", style: { stroke: SINGLE ? "var(--partner)" : "var(--soft)" } }), "all tokens"),
];

function look(run, group) {
  const stroke = group === "all" && SINGLE ? "var(--partner)" : colour(run);
  return { class: group, style: { stroke } };
}

/* Easy lines have filled marks; those of all tokens hollow ones, where there are several to tell apart. */
function marks(run, group, points, every) {
  if (group === "all" && SINGLE) return [];
  const from = group === "all" ? run + 2 : run;
  return points
    .filter((point, step) => step % every === from % every && point[1] !== null)
    .map((point) => (group === "all" ? mark(run, ...point, 3.4, "hollow") : mark(run, ...point)));
}

const BASELINES = [
  ["random_connected", "residual_kept", "random connected edges, residual kept", "base-a long"],
  ["random_connected", "residual_not_kept", "random connected edges, residual not kept", "base-a short"],
  ["inverse", "residual_kept", "least important first, residual kept", "base-b long"],
  ["inverse", "residual_not_kept", "least important first, residual not kept", "base-b short"],
];

function drawCurves(place) {
  const canvas = html("div", { class: "canvas" });
  const readout = readoutLine();
  const reference = RUNS.find(({ density }) => density.curve.baselines);
  const sizes = RUNS[0].density.curve.sizes;
  const baselines = reference ? BASELINES : [];
  const baseline = ([kind, residual]) => reference.density.curve.baselines[kind][residual];
  const columns = [
    ...RUNS.flatMap(({ label, density }) =>
      ["easy", "all", "hard"].map((group) => [SINGLE ? group : `${label}, ${group}`, density.curve[group].mean]),
    ),
    ...baselines.map((entry) => [entry[2], baseline(entry)]),
  ];
  place.append(
    canvas,
    readout,
    legend(
      ...(SINGLE ? [] : runKeys()),
      ...GROUP_KEYS(),
      SINGLE ? key(svg("rect", { x: 1, y: 1, width: 32, height: 12, class: "band", style: { fill: colour(0) } }), "middle half of the easy tokens") : null,
      ...baselines.map(([, , name, look]) => key(line([[1, 7], [33, 7]], { class: look }), name)),
    ),
    numbersTable(["size of the trace", ...columns.map(([name]) => name)], () =>
      sizes.map((size, step) => [percent(size), ...columns.map(([, values]) => fixed(values[step]))]),
    ),
  );
  responsive(canvas, (width) => {
    const box = board(width, Math.min(420, Math.max(280, width * 0.5)), "Mean total variation over the size of the trace", { top: 40 });
    const x = logScale(1e-4, 1, box.x0, box.x1);
    const y = linearScale(0, 1, box.y0, box.y1);
    for (const { name, from: low, to: high } of DATA.phases) {
      box.root.append(
        svg("rect", { x: x(low), y: box.y1, width: x(high) - x(low), height: box.y0 - box.y1, class: name }),
        text(name, (x(low) + x(high)) / 2, box.y1 - 7, { "text-anchor": "middle", class: "phase" }),
      );
    }
    if (DATA.phases.length) box.root.append(svg("path", { d: `M${x(DATA.phases[0].to)} ${box.y1 - 14}V${box.y0}`, class: "boundary" }));
    yAxis(box, y, [0, 0.2, 0.4, 0.6, 0.8, 1], (value) => value.toFixed(1), "mean total variation (0: the same prediction, 1: nothing in common)".slice(0, width < 500 ? 20 : 99));
    xAxis(box, x, LOG_TICKS, tick, width < 500 ? "size of the trace (log scale)" : "size of the trace (share of all edges, log scale)");
    for (const entry of baselines) {
      box.root.append(line(baseline(entry).map((value, step) => [x(sizes[step]), y(value)]), { class: entry[3] }));
    }
    RUNS.forEach(({ density: { curve } }, run) => {
      if (SINGLE) {
        const edge = (name) => curve.easy[name].map((value, step) => [x(curve.sizes[step]), y(value)]).filter((point) => point[1] !== null);
        const outline = [...edge("q25"), ...edge("q75").reverse()];
        if (outline.length) box.root.append(svg("polygon", { points: outline.map((point) => point.join()).join(" "), class: "band", style: { fill: colour(0) } }));
      }
      for (const group of ["all", "easy"]) {
        const points = curve[group].mean.map((value, step) => [x(curve.sizes[step]), y(value)]);
        box.root.append(line(points, look(run, group)), ...marks(run, group, points, 5));
      }
    });
    guide(box, sizes.length,
      (px) => sizes.reduce((best, size, step) => (Math.abs(x(size) - px) < Math.abs(x(sizes[best]) - px) ? step : best), 0),
      (step, sign) => {
        sign.append(svg("path", { d: `M${x(sizes[step])} ${box.y1}V${box.y0}` }));
        const values = RUNS.map(({ label, density: { curve } }) => `${SINGLE ? "" : `${shorten(label, 24)} `}${fixed(curve.easy.mean[step])} easy, ${fixed(curve.all.mean[step])} all`);
        return `Trace of ${percent(sizes[step])}: TV ${values.join("; ")}`;
      }, readout);
    canvas.replaceChildren(box.root);
  });
}

/* Panels of runs beside each other, at most three in a row. */
function panels(place, height, draw) {
  RUNS.forEach(({ label }, run) => {
    const canvas = html("div", { class: "canvas" });
    const title = html("p", { class: "panel-title" }, html("span", { class: "mark", "data-mark": run }), label);
    place.append(html("div", { class: "panel" }, SINGLE ? null : title, canvas));
    responsive(canvas, (width) => canvas.replaceChildren(draw(run, width, height(width))));
  });
  place.style.setProperty("--across", { 1: 1, 2: 2, 4: 2 }[RUNS.length] || 3);
}

function drawScatter(place) {
  const grid = html("div", { class: "panels" });
  place.append(
    grid,
    numbersTable(["run", "rank correlation of entropy with size at TV 0.2", "with area", "easy up to (nats)", "hard from (nats)"], () =>
      RUNS.map(({ label, density }) => [
        label,
        fixed(density.entropy_spearman["size_at_tv_0.2"], 2),
        fixed(density.entropy_spearman.area, 2),
        fixed(density.easy.entropy_bound, 2),
        fixed(density.hard.entropy_bound, 2),
      ]),
    ),
  );
  const scatters = RUNS.map(({ density }) => density.scatter);
  const top = Math.max(DATA.floor, ...scatters.flatMap((points) => points["size_at_tv_0.2"].filter((size) => size !== null)));
  const right = Math.max(0.5, ...scatters.flatMap((points) => points.entropy.filter((entropy) => entropy !== null)));
  const ticks = logTicks(DATA.floor, top);
  const [low, high] = [ticks[0], Math.max(top, ticks.at(-1))];
  panels(grid, (width) => Math.min(400, Math.max(240, width * 0.55)), (run, width, height) => {
    const { density, medians } = RUNS[run];
    const correlation = density.entropy_spearman["size_at_tv_0.2"];
    const note = `rank correlation ${correlation === null ? NOTHING : `${correlation < 0 ? "−" : "+"}${Math.abs(correlation).toFixed(2)}`}`;
    const box = board(width, height, `Edges needed over entropy, ${note}`, { top: 34 });
    const x = linearScale(0, right * 1.03, box.x0, box.x1);
    const y = logScale(low, high, box.y0, box.y1);
    yAxis(box, y, ticks, tick, width < 420 ? "edges needed (log)" : "edges needed for a TV of 0.2 (share of all edges, log scale)");
    const every = Math.max(1, Math.ceil(right / 6));
    xAxis(box, x, Array.from({ length: Math.floor(right / every) + 1 }, (_, step) => step * every), String, "entropy of the full prediction (nats)");
    const { entropy, "size_at_tv_0.2": size } = density.scatter;
    const dots = entropy.map((value, token) => (value === null || size[token] === null ? "" : `M${x(value).toFixed(1)} ${y(Math.max(size[token], DATA.floor)).toFixed(1)}h0`));
    box.root.append(svg("path", { d: dots.join(""), class: "dots", style: { stroke: colour(run) } }));
    for (const [bound, words, anchor] of [[density.easy.entropy_bound, "← easy ", "end"], [density.hard.entropy_bound, " hard →", "start"]]) {
      box.root.append(
        svg("path", { d: `M${x(bound)} ${box.y1}V${box.y0}`, class: "boundary" }),
        text(words, Math.max(box.x0 + 34, x(bound)) + (anchor === "end" ? -4 : 4), box.y1 - 5, { "text-anchor": anchor }),
      );
    }
    const middle = ([xs, ys]) => xs.map((value, step) => [x(value), ys[step] === null ? null : y(ys[step])]);
    if (run) box.root.append(line(middle(RUNS[0].medians), { class: "first" }));
    const points = middle(medians);
    box.root.append(line(points, { class: "easy", style: { stroke: colour(run) } }), ...points.filter((point) => point[1] !== null).map((point) => mark(run, ...point)));
    box.root.append(text(note, box.x1, box.y0 - 8, { "text-anchor": "end", class: "halo" }));
    return box.root;
  });
}

function drawExits(place) {
  const canvas = html("div", { class: "canvas" });
  const readout = readoutLine();
  const deepest = Math.max(...RUNS.map(({ density }) => Math.max(...density.early_exit.layers)));
  const at = (run, group, layer) => RUNS[run].density.early_exit.agreement[group][layer - 1] ?? null;
  const columns = RUNS.flatMap(({ label }, run) => ["easy", "all", "hard"].map((group) => [SINGLE ? group : `${label}, ${group}`, run, group]));
  place.append(
    canvas,
    readout,
    legend(...(SINGLE ? [] : runKeys()), ...GROUP_KEYS()),
    numbersTable(["layers run", ...columns.map(([name]) => name)], () =>
      Array.from({ length: deepest }, (_, layer) => [String(layer + 1), ...columns.map(([, run, group]) => percent(at(run, group, layer + 1)))]),
    ),
  );
  responsive(canvas, (width) => {
    const box = board(width, Math.min(380, Math.max(260, width * 0.45)), "Agreement of early exits by layer", { top: 30 });
    const x = linearScale(0.8, deepest + 0.2, box.x0, box.x1);
    const y = linearScale(0, 1, box.y0, box.y1);
    yAxis(box, y, [0, 0.25, 0.5, 0.75, 1], tick, width < 500 ? "tokens that agree" : "tokens with the same most likely next token as the full model");
    const every = Math.ceil(deepest / Math.max(4, Math.floor(width / 60)));
    const layers = Array.from({ length: deepest }, (_, layer) => layer + 1);
    xAxis(box, x, layers.filter((layer) => layer % every === 0 || layer === deepest || every === 1), String, "layers run before the exit");
    RUNS.forEach((_, run) => {
      for (const group of ["all", "easy"]) {
        const points = RUNS[run].density.early_exit.layers.map((layer) => [x(layer), y(at(run, group, layer))]);
        box.root.append(line(points, look(run, group)), ...marks(run, group, points, 1));
      }
    });
    guide(box, deepest,
      (px) => Math.round(((px - box.x0) / (box.x1 - box.x0)) * (deepest - 0.6) + 0.8) - 1,
      (step, sign) => {
        sign.append(svg("path", { d: `M${x(step + 1)} ${box.y1}V${box.y0}` }));
        const values = RUNS.map(({ label }, run) => `${SINGLE ? "" : `${shorten(label, 24)} `}${percent(at(run, "easy", step + 1))} easy, ${percent(at(run, "all", step + 1))} all`);
        return `After ${step + 1} of ${deepest} layers: ${values.join("; ")}`;
      }, readout);
    canvas.replaceChildren(box.root);
  });
}
