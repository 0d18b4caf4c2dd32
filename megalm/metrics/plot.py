"""loss.png: the curve of a run, drawn from its metrics.jsonl without a display."""

from __future__ import annotations

from pathlib import Path

from .jsonl import read_metrics

NAME = "loss.png"


def draw_loss(folder: str | Path, unigram_entropy: float | None = None) -> Path | None:
    """Draw the training and validation loss over the steps; returns the picture's path, None if nothing was logged.

    unigram_entropy (nats a token) is drawn as a horizontal line: below it a model knows more than frequencies.
    """
    records = read_metrics(folder)
    curves = [
        ("training", "loss", "-", [(record["step"], record["loss"]) for record in records if record.get("loss") is not None]),
        ("validation", "eval_loss", "o-", [(r["step"], r["eval_loss"]) for r in records if r.get("eval_loss") is not None]),
    ]
    if not any(points for *_, points in curves):
        return None
    # Figure and its canvas rather than pyplot: no state beyond this function, whatever backend the user has set.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4.5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    for label, _, style, points in curves:
        if points:
            axes.plot(*zip(*points, strict=True), style, label=label, linewidth=1.2, markersize=4)
    if unigram_entropy is not None:
        axes.axhline(unigram_entropy, linestyle="--", color="gray", linewidth=1, label="unigram entropy")
    axes.set_xlabel("step")
    axes.set_ylabel("loss (nats a token)")
    axes.grid(alpha=0.3)
    axes.legend()
    path = Path(folder) / NAME
    figure.savefig(path, dpi=120)
    return path
