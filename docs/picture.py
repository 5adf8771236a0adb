"""Make docs/gains.png, the picture in the README, of what benchmarks/results holds: ``python docs/picture.py``.

The picture says in its metadata what figures it shows, so that a test finds out when others are there.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from statistics import mean, stdev
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

RESULTS = Path(__file__).parents[1] / "benchmarks" / "results"
PICTURE = Path(__file__).with_name("gains.png")
SPARSITY = 0.95
BATCH = 1

LENETS = {"lenet5": "LeNet-5", "lenet300": "LeNet-300-100"}
METHODS = {"gmp": "GMP", "fggp": "FGGP"}
TIMED = {
    "lenet300": "LeNet-300-100",
    "mlp": "MLP 784-1024-1024",
    "bert-ffn-128": "BERT's feed-forward",
    "resnet18-32": "ResNet-18, 32²",
    "resnet18-224": "ResNet-18, 224²",
    "resnet50-224": "ResNet-50, 224²",
    "vit-32": "ViT, 32²",
}

DENSE_COLOUR, METHOD_COLOURS = "#6b7280", {"gmp": "#7f9cc0", "fggp": "#d1495b"}
OURS, RIVALS = "#d1495b", "#f0c0c6"


def main() -> int:
    """Draw; return the exit code 0."""
    figures = read()
    draw(figures).savefig(PICTURE, dpi=110, metadata={"Software": None, "Source": digest(figures)})
    return 0


def read() -> dict[str, Any]:
    """Return what is shown: accuracies, files and times."""
    accuracies: dict[str, list[float]] = {}
    for row in rows("mnist.jsonl"):
        key = f"{row['network']} {row['method']} {row['sparsity']}"
        accuracies.setdefault(key, []).append(round(row["accuracy"], 2))
    files = [
        {"sparsity": row["sparsity"], "MB": row["MB"], "smaller": row["times smaller"]}
        for row in json.loads((RESULTS / "files.json").read_text(encoding="utf-8"))["rows"]
        if row["file"] == "save_sparse"
    ]
    speeds = {
        row["network"]: {"torch": row["over torch"], "best": row["over best fp32"], "rival": row["best fp32"]}
        for row in rows("inference.jsonl")
        if (row.get("sparsity"), row.get("batch"), row.get("threads")) == (SPARSITY, BATCH, 1)
    }
    conditions = next(row["conditions"] for row in rows("inference.jsonl") if row.get("network") in TIMED)
    return {
        "accuracies": accuracies,
        "files": files,
        "speeds": {name: speeds[name] for name in TIMED if name in speeds},
        "conditions": {key: conditions[key] for key in ("cpu", "torch")},
    }


def rows(name: str) -> list[dict[str, Any]]:
    """Return the rows of a file of results with a line of JSON each."""
    return [json.loads(line) for line in (RESULTS / name).read_text(encoding="utf-8").splitlines() if line.strip()]


def digest(figures: dict[str, Any]) -> str:
    """Return what a picture of these figures has in its metadata."""
    return hashlib.sha256(json.dumps(figures, sort_keys=True).encode()).hexdigest()


def draw(figures: dict[str, Any]) -> Figure:
    """Draw accuracy, size and speed side by side."""
    import matplotlib as mpl
    from matplotlib.figure import Figure

    style: dict[Any, Any] = {"font.size": 10, "axes.titleweight": "bold", "axes.titlesize": 11}
    with mpl.rc_context({**mpl.rcParamsDefault, **style}):
        figure = Figure(figsize=(12, 3.9), layout="constrained", facecolor="white")
        accuracy, size, speed = figure.subplots(1, 3, width_ratios=[1.15, 0.9, 1.15])
        draw_accuracy(accuracy, figures["accuracies"])
        draw_files(size, figures["files"])
        draw_speeds(speed, figures["speeds"], figures["conditions"])
        figure.get_layout_engine().set(wspace=0.06)  # pyright: ignore[reportOptionalMemberAccess, reportCallIssue]
    return figure


def draw_accuracy(axes: Axes, accuracies: dict[str, list[float]]) -> None:
    """Accuracy over sparsity of two networks by two methods, with the dense ones as lines across."""
    for network, label in LENETS.items():
        dense = mean(accuracies[f"{network} dense 0.0"])
        axes.axhline(dense, color=DENSE_COLOUR, linestyle="--", linewidth=1)
        text = f"{label}, dense {dense:.1f}"
        axes.text(2.15, dense + 0.03, text, color=DENSE_COLOUR, ha="right", va="bottom", fontsize=9)
        for number, (method, name) in enumerate(METHODS.items()):
            sparsities = sorted(float(key.split()[2]) for key in accuracies if key.startswith(f"{network} {method} "))
            values = [accuracies[f"{network} {method} {sparsity}"] for sparsity in sparsities]
            axes.errorbar(
                [place + 0.08 * number for place in range(len(sparsities))],
                [mean(of_seeds) for of_seeds in values],
                [stdev(of_seeds) if len(of_seeds) > 1 else 0 for of_seeds in values],
                color=METHOD_COLOURS[method],
                marker="o",
                markersize=5,
                linewidth=2,
                capsize=2.5,
                label=name if network == "lenet5" else None,
            )
            axes.set_xticks(range(len(sparsities)), [f"{sparsity:.0%}" for sparsity in sparsities])
    axes.set_ylim(97.4, 99.75)
    axes.set_xlabel("weights that are zero")
    axes.legend(frameon=False, loc="lower left", title="trained with", alignment="left")
    tidy(axes, "Accuracy on MNIST, %")
    axes.grid(axis="y", color="#e6e6e6", linewidth=0.8)


def draw_files(axes: Axes, files: Sequence[dict[str, Any]]) -> None:
    """How many times smaller the file of a ResNet-18 is."""
    axes.bar(range(len(files)), [row["smaller"] for row in files], color=OURS, width=0.62)
    for place, row in enumerate(files):
        size = f"{row['MB']:.1f} MB" if row["MB"] >= 1 else f"{1000 * row['MB']:.0f} kB"
        axes.text(place, row["smaller"] * 1.08, f"{row['smaller']:.0f} ×\n{size}", ha="center", va="bottom", fontsize=9)
    axes.set_yscale("log")
    axes.set_ylim(1, 1400)
    axes.set_yticks([1, 10, 100, 1000], ["1 ×", "10 ×", "100 ×", "1000 ×"])
    axes.minorticks_off()
    axes.set_xticks(range(len(files)), [f"{100 * row['sparsity']:g}%" for row in files])
    axes.set_xlabel("weights that are zero")
    tidy(axes, "File of a ResNet-18 (46.8 MB): times smaller")


def draw_speeds(axes: Axes, speeds: dict[str, dict[str, Any]], conditions: dict[str, str]) -> None:
    """How many times as fast networks run, beside torch and beside the fastest dense engine."""
    for row, (name, speed) in enumerate(speeds.items()):
        axes.barh(row - 0.2, speed["torch"], height=0.38, color=OURS, label="dense torch" if not row else None)
        axes.barh(row + 0.2, speed["best"], height=0.38, color=RIVALS, label="best dense engine" if not row else None)
        axes.text(speed["torch"] + 0.12, row - 0.2, f"{speed['torch']:.1f}", va="center", fontsize=9)
        axes.text(speed["best"] + 0.12, row + 0.2, f"{speed['best']:.1f}, {speed['rival']}", va="center", fontsize=9)
        axes.text(-0.2, row, TIMED[name], va="center", ha="right", fontsize=9.5)
    axes.set_yticks([])
    axes.axvline(1, color=DENSE_COLOUR, linestyle="--", linewidth=1)
    axes.set_xlim(0, 1.25 * max(speed["torch"] for speed in speeds.values()))
    axes.invert_yaxis()
    torch_version = conditions["torch"].split("+")[0]
    axes.set_xlabel(f"times as fast, in fp32 on one core\nof {conditions['cpu'].split(',')[0]}, torch {torch_version}")
    axes.legend(frameon=False, loc="lower right", bbox_to_anchor=(1.03, 0.1), fontsize=9, title="compared with")
    tidy(axes, f"Speed at {SPARSITY:.0%} zeros, batch {BATCH}")


def tidy(axes: Axes, title: str) -> None:
    """Leave of the frame what carries a scale."""
    axes.set_title(title, loc="left", pad=10)
    axes.spines[["top", "right"]].set_visible(False)
    axes.set_axisbelow(True)


if __name__ == "__main__":
    raise SystemExit(main())
