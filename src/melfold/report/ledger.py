"""The ledger as a picture: out-of-fold against leaderboard scores."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from melfold.errors import MelfoldError
from melfold.files import atomic_path
from melfold.kaggle.ledger import Row


def number_of(text: str) -> float | None:
    """A score of the ledger. Exactly 0 is none: a late submission's Public score."""
    return float(text) if text and float(text) else None


def scored(rows: Sequence[Row], half: str) -> list[tuple[float, float, str]]:
    """(OOF score, score, id) of the submissions that have both.

    Args:
        half: `public_score` or `private_score`.
    """
    found = [(number_of(row.oof_lwlrap), number_of(getattr(row, half)), row.id) for row in rows]
    return [(oof, value, id) for oof, value, id in found if oof and value]


def plot_ledger(rows: Sequence[Row], path: Path) -> None:
    """Draw OOF lwlrap against Public and Private scores, with Spearman's rank correlation of each pair.

    Raises:
        MelfoldError: fewer than two submissions have an OOF and a leaderboard score.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    from scipy.stats import spearmanr

    halves = {half: scored(rows, f"{half}_score") for half in ("public", "private")}
    most = max(len(pairs) for pairs in halves.values())
    if most < 2:
        raise MelfoldError("too little to draw", f"{most} submissions with OOF and leaderboard scores", "Submit more, then sync")
    figure, axes = plt.subplots(figsize=(7, 5), constrained_layout=True)
    for half, colour, marker in (("public", "#2b6cb0", "o"), ("private", "#c05621", "s")):
        pairs = halves[half]
        if not pairs:
            continue
        oof, scores = [p[0] for p in pairs], [p[1] for p in pairs]
        rank = spearmanr(oof, scores).statistic if len(set(oof)) > 1 and len(set(scores)) > 1 else float("nan")
        told = f"rank correlation {rank:.2f}, n = {len(pairs)}" if rank == rank else f"n = {len(pairs)}"
        axes.scatter(oof, scores, color=colour, marker=marker, label=f"{half.title()} ({told})")
        if half == "private" or not halves["private"]:
            for x, y, name in pairs:
                axes.annotate(name, (x, y), xytext=(5, 4), textcoords="offset points", fontsize=7)
    axes.margins(0.12)  # room for the names
    axes.set_xlabel("out-of-fold lwlrap")
    axes.set_ylabel("leaderboard lwlrap")
    axes.legend(fontsize=8)
    axes.grid(alpha=0.3)
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_path(path) as temporary:
        figure.savefig(temporary, dpi=120, format="png")
    plt.close(figure)
