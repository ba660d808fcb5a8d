/* The text, token by token: colours, details, and what a trace of a chosen size would predict. */

const SIZE_STEPS = [1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 1e-1]; // between the 7 shades

const MODES = {
  size: {
    name: "size needed",
    step: (token) => (token.size === null ? null : SIZE_STEPS.filter((bound) => token.size > bound).length),
    keys: () => ["to 0.01 %", "to 0.03 %", "to 0.1 %", "to 0.3 %", "to 1 %", "to 10 %", "over 10 % of the edges"],
  },
  exit: {
    name: "exit layer",
    step: (token, layers) => (layers < 2 ? 0 : Math.round(((SHADES - 1) * (token.exit_layer - 1)) / (layers - 1))),
    keys: (layers) => {
      const groups = Array.from({ length: SHADES }, () => []);
      for (let layer = 1; layer <= layers; layer++) groups[MODES.exit.step({ exit_layer: layer }, layers)].push(layer);
      return groups.map((group) => (group.length > 1 ? `layers ${group[0]} to ${group.at(-1)}` : group.length ? `layer ${group[0]}` : null));
    },
  },
};

/* White space that can be seen; what a reader of a list needs, not of running text. */
function visible(piece) {
  return piece.replaceAll("\n", "⏎").replaceAll("\t", "⇥").replaceAll("\r", "␍").replaceAll(" ", "␣");
}

/* The texts that all runs with text have, so that the same token stands in each. */
function commonTexts(readable) {
  const same = (a, b) => a.block === b.block && a.tokens.length === b.tokens.length;
  return readable[0].density.samples.texts.filter((text) =>
    readable.every(({ density }) => density.samples.texts.some((other) => same(text, other))),
  ).map((text) => text.block);
}

function drawReader(place) {
  const readable = RUNS.map((run, index) => ({ ...run, index })).filter(({ density }) => density.samples);
  const blocks = readable.length ? commonTexts(readable) : [];
  if (!blocks.length) {
    const why = readable.length
      ? "These runs show different passages, so no token can be compared."
      : "There is no text in density.json: it was written before reports showed text. Evaluate the model again to see its text here.";
    place.append(html("p", { class: "missing" }, why));
    return;
  }
  const lacking = RUNS.length - readable.length;
  const state = {
    block: blocks[0],
    token: 0,
    step: readable[0].density.samples.sizes.findIndex((size) => size > 9e-4),
    mode: "size",
    panes: readable.length > 1 ? [readable[0], readable.at(-1)] : [readable[0]],
  };
  const textOf = ({ density }) => density.samples.texts.find((text) => text.block === state.block);
  const passages = html("div", { class: "passages" });
  const details = html("aside", { class: "details", "aria-label": "The chosen token" });
  const keys = html("div", { class: "keys" });
  const slider = makeSlider(readable[0].density.samples.sizes, state, () => showDetails(state.token));
  const body = html("div", { class: "token-body", "aria-live": "polite" });
  details.append(body);

  function showDetails(token) {
    const tokens = state.panes.map((pane) => textOf(pane).tokens[token]);
    body.replaceChildren(...detailsOf(state, tokens, slider));
  }

  function choose(token, focus) {
    const count = textOf(state.panes[0]).tokens.length;
    state.token = Math.max(0, Math.min(count - 1, token));
    for (const list of passages.querySelectorAll("[role=listbox]")) {
      for (const option of list.children) {
        const chosen = Number(option.dataset.token) === state.token;
        option.setAttribute("aria-selected", chosen);
        option.tabIndex = chosen ? 0 : -1;
        if (chosen && focus === list) option.focus();
      }
    }
    showDetails(state.token);
  }

  function passage(pane) {
    const { vocabulary } = pane.density.samples;
    const text = textOf(pane);
    const layers = pane.density.early_exit.layers.length;
    const piece = (index) => vocabulary[index] ?? NOTHING;
    const options = text.tokens.map((token, number) => {
      const step = MODES[state.mode].step(token, layers);
      return html("span", {
        role: "option",
        class: step === null ? "token" : `token shade-${step}`,
        "data-token": number,
        "aria-label": `${visible(piece(token.token))}, ${state.mode === "size" ? percent(token.size) : `exit layer ${token.exit_layer}`}`,
      }, piece(token.token).replaceAll("\n", "⏎\n"));
    });
    const list = html("span", {
      role: "listbox",
      "aria-label": `Tokens of ${pane.label}`,
      onpointerover: (event) => {
        const option = event.target.closest(".token");
        if (option) showDetails(Number(option.dataset.token));
      },
      onpointerleave: () => showDetails(state.token),
      onclick: (event) => {
        const option = event.target.closest(".token");
        if (option) choose(Number(option.dataset.token), list);
      },
      onfocusin: (event) => {
        const token = Number(event.target.dataset.token);
        if (token !== state.token) choose(token);
      },
      onkeydown: (event) => {
        const by = { ArrowRight: 1, ArrowDown: 1, ArrowLeft: -1, ArrowUp: -1, Home: -Infinity, End: Infinity }[event.key];
        if (by === undefined) return;
        event.preventDefault();
        choose(state.token + by, list);
      },
    }, options);
    const context = text.context.map(piece).join("");
    return html("p", { class: "passage", translate: "no" }, html("span", { class: "context" }, context), list);
  }

  function draw() {
    passages.replaceChildren(
      ...state.panes.map((pane, number) => html("div", { class: "pane" }, paneTitle(state, pane, number, readable, draw), passage(pane))),
    );
    const layers = Math.max(...state.panes.map(({ density }) => density.early_exit.layers.length));
    const names = MODES[state.mode].keys(layers);
    keys.replaceChildren(
      legend(...names.map((name, step) => (name ? html("li", {}, html("span", { class: `token shade-${step}` }, "abc"), name) : null)).filter(Boolean)),
    );
    choose(state.token);
  }

  const { data, tokens } = RUNS[0].density;
  const shown = blocks.reduce((sum, block) => sum + readable[0].density.samples.texts.find((text) => text.block === block).tokens.length, 0);
  const many = (number) => number.toLocaleString("en-US");
  place.append(
    html("p", { class: "why" },
      `${state.panes.length > 1 ? "Both columns show the same tokens. " : ""}Colour and bar say how much of the model it took to predict a token. Point at one, or use Tab and the arrow keys, and move the slider to see what a smaller trace would have said. Grey text is context.`),
    html("div", { class: "controls" }, passageSelect(blocks, state, draw), modeChoice(state, draw), keys),
    html("div", { class: state.panes.length > 1 ? "reader two" : "reader" }, passages, details),
    html("p", { class: "cap" },
      `Text of ${blocks.length} of ${many(data.blocks)} blocks (${many(shown)} of ${many(tokens)} measured tokens), to keep this page small; all numbers are of all tokens.`,
      lacking ? ` ${lacking === 1 ? "One run has" : `${lacking} runs have`} no text in density.json.` : ""),
  );
  draw();
}

function passageSelect(blocks, state, draw) {
  const select = html("select", {
    id: "passage",
    onchange: () => {
      state.block = blocks[Number(select.value)];
      state.token = 0;
      draw();
    },
  }, blocks.map((block, number) => html("option", { value: number }, `${number + 1} of ${blocks.length} (block ${block + 1})`)));
  return html("label", { for: "passage" }, "Passage ", select);
}

function modeChoice(state, draw) {
  return html("fieldset", { class: "switch" }, html("legend", {}, "Colour by"),
    Object.entries(MODES).map(([mode, { name }]) =>
      html("label", {},
        html("input", { type: "radio", name: "mode", value: mode, checked: mode === state.mode, onchange: () => { state.mode = mode; draw(); } }),
        name),
    ));
}

function paneTitle(state, pane, number, readable, draw) {
  if (readable.length === 1) return null;
  const sign = html("span", { class: "mark" }, svg("svg", { viewBox: "-1.5 -1.5 3 3", "aria-hidden": "true" }, mark(pane.index, 0, 0, 1)));
  if (readable.length === 2) return html("h3", { class: "panel-title" }, sign, pane.label);
  const select = html("select", {
    "aria-label": number ? "Right run" : "Left run",
    onchange: () => {
      state.panes[number] = readable[Number(select.value)];
      draw();
    },
  }, readable.map((run, index) => html("option", { value: index, selected: run === pane }, run.label)));
  return html("div", { class: "panel-title" }, sign, select);
}

function makeSlider(sizes, state, changed) {
  const output = html("output", { for: "size-slider" });
  const input = html("input", {
    type: "range",
    id: "size-slider",
    min: 0,
    max: sizes.length - 1,
    step: 1,
    value: state.step,
    oninput: () => {
      state.step = Number(input.value);
      tell();
      changed();
    },
  });
  const tell = () => {
    output.textContent = `about ${percent(sizes[state.step])}`;
    input.setAttribute("aria-valuetext", `traces of about ${percent(sizes[state.step])} of the edges`);
  };
  tell();
  return html("div", { class: "slider" }, html("label", { for: "size-slider" }, "Keep only this share of the edges: ", output), input);
}

function detailsOf(state, tokens, slider) {
  const { density } = state.panes[0];
  const { vocabulary } = density.samples;
  const rows = [
    ["entropy", (token, { easy, hard }) => `${fixed(token.entropy, 2)} nats${token.entropy === null ? "" : token.entropy <= easy.entropy_bound ? ", easy" : token.entropy >= hard.entropy_bound ? ", hard" : ""}`],
    ["loss", (token) => `${fixed(token.loss, 2)} nats`],
    ["size at TV 0.2", (token) => percent(token.size)],
    ["area", (token) => fixed(token.area)],
    ["exit layer", (token, { early_exit }) => `${token.exit_layer} of ${early_exit.layers.length}`],
  ];
  const several = state.panes.length > 1;
  const head = several ? html("thead", {}, html("tr", {}, html("td"), state.panes.map(({ label }) => html("th", { scope: "col" }, shorten(label, 18))))) : null;
  const cells = rows.map(([name, format]) =>
    html("tr", {}, html("th", { scope: "row" }, name), tokens.map((token, pane) => html("td", { "data-detail": name }, format(token, state.panes[pane].density)))),
  );
  return [
    html("h3", { class: "chosen" }, "Predicting ", html("code", {}, visible(vocabulary[tokens[0].token] ?? NOTHING))),
    html("table", { class: "facts-table" }, head, html("tbody", {}, cells)),
    slider,
    ...tokens.map((token, pane) => predictions(state, token, state.panes[pane], several)),
  ];
}

function predictions(state, token, { label, density }, several) {
  const { vocabulary } = density.samples;
  const trace = token.traces[state.step];
  const kept = Math.round(trace.size * token.edges);
  const said = (title, note, top, name) =>
    html("div", { class: "said", "data-said": name }, html("h4", {}, title), html("p", { class: "note" }, note),
      html("ol", {}, top.map(([index, chance]) =>
        html("li", { class: index === token.token ? "right" : null, style: { "--chance": `${100 * chance}%` } },
          html("code", {}, visible(vocabulary[index] ?? NOTHING)), html("span", {}, `${(100 * chance).toFixed(1)} %`),
          index === token.token ? html("b", { title: "the token that came" }, "✓") : null))));
  return html("section", { class: "predictions", "aria-label": label },
    several ? html("h3", { class: "panel-title" }, label) : null,
    html("div", { class: "pair" },
      said("Trace", `${percent(trace.size)}: ${kept.toLocaleString("en-US")} of ${token.edges.toLocaleString("en-US")} edges; TV ${fixed(trace.tv, 2)}`, trace.top, "trace"),
      said("Full model", `all edges${state.panes.length > 1 ? "" : "; ✓ is the token that came"}`, token.full, "full")),
    tokenCurve(token, state.step));
}

/* TV of this token's own traces, the chosen one marked. */
function tokenCurve(token, step) {
  const box = board(300, 92, "TV of this token's traces over their size", { left: 30, top: 14, bottom: 20, right: 8 });
  const x = logScale(5e-5, 1, box.x0, box.x1);
  const y = linearScale(0, 1, box.y0, box.y1);
  const at = ({ size, tv }) => [x(Math.max(size, 5e-5)), y(tv)];
  yAxis(box, y, [0, 0.2, 1], String, "TV of this token’s traces");
  for (const size of [1e-4, 1e-2, 1]) box.root.append(text(tick(size), x(size), box.y0 + 15, { "text-anchor": size === 1 ? "end" : "middle" }));
  box.root.append(
    svg("path", { d: `M${box.x0} ${y(0.2)}H${box.x1}`, class: "boundary" }),
    line([...token.traces.map(at), [x(1), y(0)]], { class: "all", style: { stroke: "var(--accent)" } }),
    svg("circle", { cx: at(token.traces[step])[0], cy: at(token.traces[step])[1], r: 4.5, class: "now" }),
  );
  return box.root;
}

drawReader(document.getElementById("reader"));
drawCurves(document.getElementById("tv"));
drawScatter(document.getElementById("scatter"));
drawExits(document.getElementById("agreement"));
drawHeat(document.getElementById("heat"));
markAll();
