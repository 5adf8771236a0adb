"""Accuracy against sparsity: a row of panels for each network, a panel for each family of methods."""

from __future__ import annotations

from pathlib import Path
from statistics import mean

from benchmarks.evidence.networks import NETWORKS
from benchmarks.evidence.tables import Evidence

__all__ = ["FAMILIES", "draw"]

FAMILIES = {
    "dense to sparse": ("GMP", "FGGP", "GraNet", "ACDC", "Feather"),
    "sparse to sparse": ("SET", "RigL", "EAST", "MEST", "SNFS", "DSR", "SRigL"),
    "at initialization": ("SNIP", "GraSP", "SynFlow"),
    "latent": ("DST", "STR", "SRSTE", "TopKAST"),
}
_COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#7f5539")  # Okabe and Ito
_MARKERS = "osD^vP*"
_BASELINES = {"one-shot": "--", "static": ":", "equal-weights": "-."}
_NAMES = {"one-shot": "one-shot", "static": "random masks", "equal-weights": "small dense"}


def draw(evidence: Evidence, path: Path) -> None:
    """Draw the figure into a file.

    Args:
        evidence: The runs.
        path: The path of the figure; its ending sets the format.
    """
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    mpl.rcParams["svg.hashsalt"] = "evidence"  # the same runs give the same file
    # A single sparsity makes no line.
    networks = [name for name in evidence.networks if len(evidence.sparsities(name)) > 1] or evidence.networks
    figure, grid = plt.subplots(
        len(networks), len(FAMILIES), figsize=(13, 3.1 * len(networks) + 1.2), squeeze=False, layout="constrained"
    )
    for network, axes in zip(networks, grid, strict=True):
        sparsities = evidence.sparsities(network)
        everything = [method for family in FAMILIES.values() for method in family]
        lines = {m: _line(evidence, network, m) for m in (*everything, *_BASELINES)}
        values = sorted(value for _, ys in lines.values() for value in ys)
        dense = evidence.accuracies(network, 0.0, "dense")
        top = max([*values, *dense])
        low = max(min(values), top - 12.0)  # points further down are outside the panel
        for (family, methods), axis in zip(FAMILIES.items(), axes, strict=True):
            for other in everything:
                if other not in methods:
                    axis.plot(*lines[other], color="#dcdcdc", linewidth=0.8, zorder=1)
            for baseline, style in _BASELINES.items():
                axis.plot(*lines[baseline], color="#444444", linestyle=style, linewidth=1.2, label=_NAMES[baseline])
            for method, colour, marker in zip(methods, _COLOURS, _MARKERS, strict=False):
                axis.plot(*lines[method], color=colour, marker=marker, markersize=4, linewidth=1.5, label=method)
            if dense:
                axis.axhline(mean(dense), color="#444444", linewidth=0.8)
            axis.set_xticks(range(len(sparsities)), [f"{100 * s:g} %" for s in sparsities])
            axis.set_ylim(low - 0.3, top + 0.4)
            axis.spines[["top", "right"]].set_visible(False)
            axis.set_title(family, fontsize=9)
        axes[0].set_ylabel(f"{NETWORKS[network].title}\ntest accuracy, %", fontsize=9)
    for axis in grid[-1]:
        axis.set_xlabel("sparsity", fontsize=9)
        # One legend for each family, below its column: inside a panel it would hide points.
        axis.legend(fontsize=7, frameon=False, ncols=2, loc="upper center", bbox_to_anchor=(0.5, -0.2))
    figure.savefig(path, dpi=110, metadata={"Date": None} if path.suffix == ".svg" else None)
    plt.close(figure)


def _line(evidence: Evidence, network: str, method: str) -> tuple[list[int], list[float]]:
    """Places of the sparsities, evenly spaced, and mean accuracies, without those where a run missed its sparsity."""
    points = [
        (place, mean(accuracies))
        for place, sparsity in enumerate(evidence.sparsities(network))
        if (accuracies := evidence.accuracies(network, sparsity, method))
        and not evidence.misses(network, sparsity, method)
    ]
    return [place for place, _ in points], [accuracy for _, accuracy in points]
