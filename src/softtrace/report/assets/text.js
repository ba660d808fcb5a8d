/* The text, token by token: colours, details, and what a trace of a chosen size would predict. */

/* Of the deepest run, so that a colour means the same layer in all. */
const LAYERS = Math.max(...RUNS.map(({ density }) => density.early_exit.layers.length));

const MODES = {
  size: {
    name: "size needed",
    step: (token) => (token.size === null ? null : shadeOf(token.size, DATA.size_bounds)),
    keys: () => shadeNames(DATA.size_bounds, "of the edges"),
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

/* Characters of which nothing is seen, as the joiners of emoji, go by their numbers. */
const UNSEEN = /^(?!\t+$)[\p{Default_Ignorable_Code_Point}\p{Cc}\u2028\u2029]+$/u;

function seen(piece) {
  const number = (sign) => `⟨U+${sign.codePointAt(0).toString(16).toUpperCase().padStart(4, "0")}⟩`;
  return UNSEEN.test(piece) ? [...piece].map(number).join("") : piece;
}

/* Whether nothing but numbers can be shown: of bytes, or of a character of which nothing is seen. */
const isCode = (shown) => /^(⟨(([0-9A-F]{2})+|U\+[0-9A-F]{4,6})⟩)+$/.test(shown);

/* White space that can be seen; what a reader of a list needs, not of running text. */
function visible(piece) {
  return seen(piece.replaceAll("\n", "⏎").replaceAll("\t", "⇥").replaceAll("\r", "␍").replaceAll(" ", "␣"));
}

/* What a token adds to the text: nothing where a later one completes the character. */
const textOf = (run, token) => run.piece(token.text ?? token.token);

/* What stands for it in the text, where every token can be seen: parts of characters are bytes. */
function shownOf(run, token) {
  const said = textOf(run, token);
  return /^\uFFFD*$/.test(said) ? run.piece(token.token) : said;
}

/* The texts that all runs with text have, so that the same token stands in each. */
function commonTexts(readable) {
  const same = (a, b) => a.block === b.block && a.tokens.length === b.tokens.length;
  return readable[0].density.samples.texts
    .filter((text) => readable.every(({ density }) => density.samples.texts.some((other) => same(text, other))))
    .map((text) => text.block);
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
  for (const run of readable) {
    run.texts = blocks.map((block) => run.density.samples.texts.find((text) => text.block === block));
    run.tokens = run.texts.flatMap((text) => text.tokens);
    run.piece = (index) => run.density.samples.vocabulary[index] ?? NOTHING;
  }
  const state = {
    token: firstShown(readable[0]),
    step: Math.max(0, readable[0].density.samples.sizes.findIndex((size) => size > 9e-4)),
    mode: "size",
    panes: readable.length > 1 ? [readable[0], readable.at(-1)] : [readable[0]],
  };
  const several = state.panes.length > 1;
  const passages = html("div", { class: "passages" });
  const keys = html("div", { class: "keys" });
  const body = html("div", { class: "token-body" });
  const spoken = html("p", { class: "spoken", "aria-live": "polite" });
  const slider = makeSlider(readable[0].density.samples.sizes, state, () => show(state.token));

  function show(token) {
    body.replaceChildren(...detailsOf(state, token));
  }

  function choose(token, pane) {
    state.token = Math.max(0, Math.min(state.panes[0].tokens.length - 1, token));
    for (const option of passages.querySelectorAll("[role=option]")) {
      const chosen = Number(option.dataset.token) === state.token;
      option.setAttribute("aria-selected", chosen);
      option.tabIndex = chosen ? 0 : -1;
      if (chosen && option.dataset.pane === pane) option.focus();
    }
    show(state.token);
    spoken.textContent = spokenOf(state);
  }

  function passage(pane, number, text, offset) {
    const options = text.tokens.map((token, at) => {
      const step = MODES[state.mode].step(token, LAYERS);
      const words = visible(shownOf(pane, token));
      const shown = seen(shownOf(pane, token).replaceAll("\r", "␍").replaceAll("\n", "⏎\n"));
      return html("span", {
        role: "option",
        class: `token${step === null ? "" : ` shade-${step}`}${isCode(shown) ? " code" : ""}`,
        "data-token": offset + at,
        "data-pane": number,
        "aria-label": `${words}, ${state.mode === "size" ? percent(token.size) : `exit layer ${token.exit_layer}`}`,
      }, shown);
    });
    const name = `Tokens of block ${text.block + 1}${several ? `, ${pane.label}` : ""}`;
    const context = text.context.map(pane.piece).join("").split("\n").slice(-6).join("\n").trimStart();
    return html("p", { class: "passage", translate: "no" },
      html("span", { class: "context" }, context),
      html("span", { role: "listbox", "aria-label": name }, options));
  }

  function draw() {
    let offset = 0;
    const rows = state.panes[0].texts.map((text, at) => {
      const cells = state.panes.map((pane, number) => passage(pane, number, pane.texts[at], offset));
      offset += text.tokens.length;
      return cells;
    });
    passages.replaceChildren(...state.panes.map((pane, number) => paneTitle(state, pane, number, readable, draw)).filter(Boolean), ...rows.flat());
    const names = MODES[state.mode].keys(LAYERS);
    keys.replaceChildren(
      legend(
        ...names.flatMap((name, step) => (name ? [html("li", {}, html("span", { class: `token shade-${step}` }, "abc"), name)] : [])),
        passages.querySelector(".code") ? html("li", {}, html("span", { class: "token code" }, "⟨E381⟩"), "bytes of a character that a later token completes, or one of which nothing is seen") : [],
      ),
    );
    choose(state.token);
  }

  const tokenAt = (event) => event.target.closest?.("[role=option]");
  fill(passages, {
    onpointerover: (event) => tokenAt(event) && show(Number(tokenAt(event).dataset.token)),
    onpointerleave: () => show(state.token),
    onclick: (event) => tokenAt(event) && choose(Number(tokenAt(event).dataset.token), tokenAt(event).dataset.pane),
    onfocusin: (event) => {
      const option = tokenAt(event);
      if (option && Number(option.dataset.token) !== state.token) choose(Number(option.dataset.token));
    },
    onkeydown: (event) => {
      const option = tokenAt(event);
      const by = { ArrowRight: 1, ArrowDown: 1, ArrowLeft: -1, ArrowUp: -1, Home: -Infinity, End: Infinity }[event.key];
      if (!option || by === undefined) return;
      event.preventDefault();
      choose(state.token + by, option.dataset.pane);
    },
  }, []);

  const { data, tokens } = RUNS[0].density;
  const lacking = RUNS.length - readable.length;
  const many = (number) => number.toLocaleString("en-US");
  place.append(
    html("p", { class: "why" },
      `${several ? "Both columns show the same tokens. " : ""}Colour and bar say how much of the model it took to predict a token. Point at one, or use Tab and the arrow keys, and move the slider to see what a smaller trace would have said. Grey text is context.`),
    html("div", { class: "controls" }, modeChoice(state, draw), keys),
    html("div", { class: several ? "reader two" : "reader" }, passages,
      html("aside", { class: "details", "aria-label": "The chosen token" }, slider, body, spoken)),
    html("p", { class: "cap" },
      `Text of ${blocks.length} of ${many(data.blocks)} blocks (${many(state.panes[0].tokens.length)} of ${many(tokens)} measured tokens), to keep this page small; all numbers are of all tokens. ${scaleNote("the sizes that tokens need")}`,
      lacking ? ` ${lacking === 1 ? "One run has" : `${lacking} runs have`} no text in density.json.` : ""),
  );
  draw();
}

/* The first easy word that the model has right: what a page should open with. */
function firstShown(run) {
  const easy = (token) => token.entropy <= run.density.easy.entropy_bound && token.full[0][0] === token.token;
  const found = run.tokens.findIndex((token) => easy(token) && /\p{L}{2}/u.test(textOf(run, token)));
  return Math.max(0, found);
}

function spokenOf({ token, panes, mode }) {
  const values = panes.map(({ label, tokens }) => `${panes.length > 1 ? `${label}: ` : ""}${mode === "size" ? percent(tokens[token].size) : `exit layer ${tokens[token].exit_layer}`}`);
  return `${visible(shownOf(panes[0], panes[0].tokens[token]))}, ${values.join("; ")}`;
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
    output.textContent = percent(sizes[state.step]);
    input.setAttribute("aria-valuetext", `traces of about ${percent(sizes[state.step])} of the edges`);
  };
  tell();
  return html("div", { class: "slider" }, html("label", { for: "size-slider" }, "Keep about this share of the edges: ", output), input);
}

function detailsOf(state, number) {
  const { panes } = state;
  const tokens = panes.map((pane) => pane.tokens[number]);
  const rows = [
    ["entropy", (token, { easy, hard }) => `${fixed(token.entropy, 2)} nats${token.entropy === null ? "" : token.entropy <= easy.entropy_bound ? ", easy" : token.entropy >= hard.entropy_bound ? ", hard" : ""}`],
    ["loss", (token) => `${fixed(token.loss, 2)} nats`],
    ["size at TV 0.2", (token) => percent(token.size)],
    ["area", (token) => fixed(token.area)],
    ["exit layer", (token, { early_exit }) => `${token.exit_layer} of ${early_exit.layers.length}`],
  ];
  const several = panes.length > 1;
  const head = several ? html("thead", {}, html("tr", {}, html("td"), panes.map(({ label }) => html("th", { scope: "col" }, shorten(label, 18))))) : null;
  const cells = rows.map(([name, format]) =>
    html("tr", {}, html("th", { scope: "row" }, name), tokens.map((token, pane) => html("td", { "data-detail": name }, format(token, panes[pane].density)))),
  );
  const [token, said] = [panes[0].piece(tokens[0].token), textOf(panes[0], tokens[0])].map(visible);
  return [
    html("h3", { class: "chosen" }, "Predicting ", html("code", {}, token), said && said !== token ? [", which reads ", html("code", {}, said), " here"] : []),
    html("table", { class: "facts-table" }, head, html("tbody", {}, cells)),
    ...panes.map((pane) => predictions(state, pane.tokens[number], pane, several)),
  ];
}

function predictions(state, token, { label, piece }, several) {
  const trace = token.traces[state.step];
  const kept = Math.round(trace.size * token.edges);
  const said = (title, note, top, name) =>
    html("div", { class: "said", "data-said": name }, html("h4", {}, title), html("p", { class: "note" }, note[0], html("br"), note[1]),
      html("ol", {}, top.map(([index, chance]) => {
        const right = index === token.token;
        return html("li", { class: right ? "right" : null, style: { "--chance": `${100 * chance}%` } },
          html("code", {}, visible(piece(index))), html("span", {}, `${(100 * chance).toFixed(1)} %`),
          html("b", right ? { title: "the token that came", role: "img", "aria-label": "the token that came" } : {}, right ? "✓" : ""));
      })));
  return html("section", { class: "predictions", "aria-label": label },
    several ? html("h3", { class: "panel-title" }, label) : null,
    html("div", { class: "pair" },
      said(`Trace of ${percent(trace.size)}`, [`${kept.toLocaleString("en-US")} of ${token.edges.toLocaleString("en-US")} edges`, `TV ${fixed(trace.tv, 2)}`], trace.top, "trace"),
      said("Full model", ["all edges", "✓: what came"], token.full, "full")),
    tokenCurve(token, state.step));
}

/* TV of this token's own traces, the chosen one marked. */
function tokenCurve(token, step) {
  const box = board(300, 104, "TV of this token's traces over their size", { left: 30, top: 26, bottom: 20, right: 8 });
  const x = logScale(5e-5, 1, box.x0, box.x1);
  const y = linearScale(0, 1, box.y0, box.y1);
  const at = ({ size, tv }) => [x(Math.max(size, 5e-5)), y(tv)];
  yAxis(box, y, [0, DATA.bound, 1], String, "TV of this token’s traces");
  for (const size of [1e-4, 1e-2, 1]) box.root.append(text(tick(size), x(size), box.y0 + 15, { "text-anchor": size === 1 ? "end" : "middle" }));
  box.root.append(
    svg("path", { d: `M${box.x0} ${y(DATA.bound)}H${box.x1}`, class: "boundary" }),
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
