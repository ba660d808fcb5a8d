"""The drawings of recipes/concepts.md: a graph, and measurements of the shipped model.

python -m recipes.benchmarks.pages.drawings
"""

from __future__ import annotations

import argparse
from collections.abc import Iterable
from pathlib import Path

import matplotlib as mpl
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure

import softtrace
from recipes.benchmarks.places import MODEL, ROOT
from softtrace.graph.edges import Edge
from softtrace.model.loading import load_model, load_tokenizer

FOLDER = ROOT / "recipes" / "concepts"
TEXT = """def area_of_circle(radius):
    return math.pi * radius ** 2

def area_of_square(side):
    return side ** 2
"""
INK, ATTENTION, MLP, RESIDUAL = "#30343b", "#d1495b", "#2e86ab", "#9aa0a8"
STYLE = {"svg.hashsalt": "softtrace", "svg.fonttype": "path", "font.size": 9}


def height(kind: str, layer: int) -> int:
    """Row of the node that an edge of this kind goes into; embeddings are row 0."""
    return 2 * layer + (1 if kind.startswith("attention") else 2)


def draw(axes: Axes, edges: Iterable[Edge], continuous: bool = False) -> None:
    """Edges between nodes at (token, half-layer), the MLP's beside the residual edge."""
    colours = {"attention": ATTENTION, "mlp": MLP}
    for edge in edges:
        top = height(edge.kind, edge.layer)
        beside = edge.source == edge.target and edge.kind in colours
        axes.annotate(
            "",
            xy=(edge.target, top),
            xytext=(edge.source, top - 1),
            arrowprops={
                "arrowstyle": "-" if continuous else "-|>",
                "color": colours.get(edge.kind, RESIDUAL),
                "connectionstyle": f"arc3,rad={0.4 if beside else 0}",
                "linewidth": 1.2,
                "shrinkA": 0 if continuous else 3,
                "shrinkB": 0 if continuous else 3,
            },
        )


def graph() -> Figure:
    """All edges of two layers and four tokens, with one head."""
    figure = Figure(figsize=(6.4, 4.2), layout="constrained")
    axes = figure.subplots()
    tokens = ["The", "cat", "sat", "on"]
    edges: list[Edge] = []
    for layer in range(2):
        for token in range(4):
            edges += [Edge("attention", layer, token, 0, source) for source in range(token + 1)]
            edges += [
                Edge("attention_residual", layer, token, -1, token),
                Edge("mlp", layer, token, -1, token),
                Edge("mlp_residual", layer, token, -1, token),
            ]
    draw(axes, edges)
    for row in range(5):
        axes.scatter(range(4), [row] * 4, s=60, color=INK, zorder=3)
    axes.scatter([3], [4], s=150, color="#f2b134", edgecolor=INK, zorder=4)
    axes.annotate("output node: what follows “on”", (3, 4), (1.62, 4.35))
    rows = ["embedding", "after attention 1", "after MLP 1", "after attention 2", "after MLP 2"]
    axes.set(xticks=range(4), xticklabels=tokens, yticks=range(5), yticklabels=rows)
    axes.set(xlim=(-0.5, 3.6), ylim=(-0.3, 4.7))
    legend(axes)
    return figure


def legend(axes: Axes) -> None:
    """What the colours mean, above the drawing."""
    for name, colour in (("residual", RESIDUAL), ("attention", ATTENTION), ("MLP", MLP)):
        axes.plot([], [], color=colour, label=f"{name} edge", linewidth=2)
    axes.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=3, frameon=False)
    axes.spines[:].set_visible(False)
    axes.tick_params(length=0)


def trace(importance: softtrace.EdgeImportance, words: list[str], position: int) -> Figure:
    """The 60 edges that matter most for one token of the shipped model."""
    found = softtrace.extract_trace(importance, sequence=0, position=position, size=60)
    figure = Figure(figsize=(7.6, 4.6), layout="constrained")
    axes = figure.subplots()
    draw(axes, found.edges, continuous=True)
    layers = len(importance.layers)
    axes.scatter([position], [2 * layers], s=120, color="#f2b134", edgecolor=INK, zorder=4)
    axes.set(xlim=(-0.6, position + 0.8), ylim=(-0.4, 2 * layers + 0.6))
    axes.set_xticks(range(position + 1), words[: position + 1], rotation=90, family="monospace")
    axes.set_yticks(range(0, 2 * layers + 1, 2), ["embedding", *map(str, range(1, layers + 1))])
    axes.set_ylabel("layer")
    legend(axes)
    return figure


def curve(found: softtrace.DensityCurve, words: list[str], easy: int, hard: int) -> Figure:
    """TV over size of one easy and one hard token."""
    figure = Figure(figsize=(6.4, 3.6), layout="constrained")
    axes = figure.subplots()
    for position, colour, name in ((easy, MLP, "easy"), (hard, ATTENTION, "hard")):
        size, variation = found.size[:, 0, position], found.total_variation[:, 0, position]
        order = size.argsort()
        label = f"{name}: what follows {words[position]}"
        axes.plot(size[order], variation[order], "o-", color=colour, markersize=3, label=label)
        reached = float(found.size_at(total_variation=0.2)[0, position])
        axes.plot([reached, reached], [0, 0.2], ":", color=colour)
    axes.axhline(0.2, color=RESIDUAL, linewidth=1, linestyle="--")
    axes.annotate("TV 0.2: where the size is read", (1.2e-4, 0.22), color=INK)
    axes.set(xscale="log", xlim=(1e-4, 1), ylim=(0, 1))
    axes.set(xlabel="size of the trace, share of all edges", ylabel="TV from the full prediction")
    axes.legend(frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    return figure


def density(area: torch.Tensor, entropy: torch.Tensor) -> Figure:
    """Area of every token over the entropy of its prediction, with the easy and hard quarters."""
    figure = Figure(figsize=(6.4, 3.6), layout="constrained")
    axes = figure.subplots()
    low, high = (float(entropy.quantile(share)) for share in (0.25, 0.75))
    top = float(entropy.max()) * 1.04
    for start, end, colour, name in ((0, low, MLP, "easy"), (high, top, ATTENTION, "hard")):
        axes.axvspan(start, end, color=colour, alpha=0.12)
        axes.annotate(f"{name} quarter", ((start + end) / 2, 0.95), ha="center", color=colour)
    axes.scatter(entropy, area, s=16, color=INK)
    axes.set(xlim=(0, top), ylim=(0, 1))
    axes.set(xlabel="entropy of the full prediction, nats", ylabel="area: mean TV over sizes")
    axes.spines[["top", "right"]].set_visible(False)
    return figure


def measured() -> dict[str, Figure]:
    """The drawings that the shipped model is run for."""
    model, tokenizer = load_model(MODEL), load_tokenizer(MODEL)
    input_ids = tokenizer(TEXT, return_tensors="pt")["input_ids"]
    words = [repr(tokenizer.decode(token))[1:-1].replace(" ", "␣") for token in input_ids[0]]
    importance = softtrace.edge_importance(model, input_ids)
    found = softtrace.density_curve(model, input_ids, attention="recomputed")
    with torch.no_grad():
        logs = model(input_ids).logits[0].log_softmax(-1)
    entropy = -(logs.exp() * logs).sum(-1)
    half = len(words) // 2  # the first tokens have too little before them
    easy, hard = half + int(entropy[half:].argmin()), half + int(entropy[half:].argmax())
    return {
        "trace": trace(importance, words, easy),
        "curve": curve(found, words, easy, hard),
        "density": density(found.area()[0, 8:], entropy[8:]),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--out", type=Path, default=FOLDER)
    out = parser.parse_args().out
    out.mkdir(parents=True, exist_ok=True)
    with mpl.rc_context(STYLE):
        for name, figure in {"graph": graph(), **measured()}.items():
            figure.savefig(out / f"{name}.svg", facecolor="white", metadata={"Date": None})


if __name__ == "__main__":
    main()
