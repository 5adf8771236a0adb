"""Write docs/measured.md from benchmarks/results: ``python -m benchmarks.figures``, or ``make figures``.

The text, and the command of each table, are in benchmarks/measured.md. Each ``<!-- TABLE: name -->`` there becomes the
table of that name, with the machine and the versions that it was measured with. A test compares the page with what this
module writes, so no table can show a figure that was not measured.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any

from rich.table import Table

from benchmarks import cifar, dst, goals, mnist
from lightning_sparse.methods.catalog import all_methods

__all__ = ["TABLES", "main", "page"]

METHODS = {"gmp": "`GMP`", "fggp": "`FGGP`", "set": "`SET`", "rigl": "`RigL`", "east": "`EAST`", "dst": "`DST`"}

# The names that readers know, for networks, methods and rivals that have shorter names in the results.
NAMES = {
    "lenet300": "LeNet-300-100",
    "lenet5": "LeNet-5-Caffe",
    "lstm-a": "LSTM-a",
    "lstm-b": "LSTM-b",
    "mlp": "MLP 784-1024-1024-10",
    "linear-1024": "linear layer, 1024",
    "linear-4096": "linear layer, 4096",
    "bert-ffn-128": "BERT's feed-forward, 128 tokens",
    "bert-block-128": "a block of BERT's size, 128 tokens",
    "resnet18-32": "ResNet-18, 32 × 32",
    "resnet18-224": "ResNet-18, 224 × 224",
    "resnet50-224": "ResNet-50, 224 × 224",
    "vit-32": "ViT, 32 × 32",
    "ModelPruning": "Lightning's `ModelPruning`",
    "torch.ao": "torch.ao's sparsifier",
    "float masks": "masks of floats, by hand",
    "masked_fill_": "`masked_fill_`, by hand",
    "thresholds by parametrize": "DST's thresholds by `parametrize`",
    "a sort of all weights": "GMP by a sort of all weights",
    "two sorts of each layer": "RigL by two sorts of each layer",
    "EAST, Dynamic ReLUs": "`EAST`, while its Dynamic ReLUs last",
    **METHODS,
    **{kind.__name__: f"`{kind.__name__}`" for kind in all_methods()},
    **{name: f"`{name}`" for name in ("torch.nn.utils.prune", "parametrize")},
}
HERE = Path(__file__).parent
RESULTS = HERE / "results"
TEMPLATE = HERE / "measured.md"
PAGE = HERE.parent / "docs" / "measured.md"
MARKER = re.compile(r"^<!-- TABLE: ([\w-]+) -->$", re.MULTILINE)
NOTICE = "<!-- Written by `make figures` from benchmarks/measured.md and benchmarks/results; do not edit this page. -->"

Rows = Sequence[Mapping[str, Any]]


def main(_: Sequence[str] | None = None) -> int:
    """Write the page; return the exit code 0."""
    PAGE.write_text(page(), encoding="utf-8")
    return 0


def page() -> str:
    """The page, with its tables filled in."""
    text = TEMPLATE.read_text(encoding="utf-8")
    return f"{NOTICE}\n\n" + MARKER.sub(lambda marker: TABLES[marker[1]](), text)


# Reading.


def lines_of(name: str) -> list[dict[str, Any]]:
    """The results in a file with one JSON object in each line."""
    text = (RESULTS / name).read_text(encoding="utf-8")
    return [json.loads(line) for line in text.splitlines() if line.strip()]


def content_of(name: str) -> tuple[list[dict[str, Any]], str]:
    """The rows of a file of results, and a sentence that says what they were measured with."""
    content = json.loads((RESULTS / name).read_text(encoding="utf-8"))
    return content["rows"], measured_with([content["conditions"]])


# Writing.


def measured_with(conditions: Rows) -> str:
    """Machine and versions, as a sentence. If rows were measured with different ones, it lists all of them."""
    found: dict[str, list[str]] = {}
    for condition in conditions:
        for key, value in condition.items():
            values = found.setdefault(key, [])
            if str(value) not in values:
                values.append(str(value))
    named = {key: " and ".join(values) for key, values in found.items()}
    cores = f", {named['cpus']} cores" if "cpus" in named else ""
    machine = named.get("device") or named.get("cpu") or "a shared virtual machine whose processor was not recorded"
    threads = f", {named['threads']} thread" + "s" * (named["threads"] != "1") if "threads" in named else ""
    libraries = ("Python", "torch", "Lightning", "lightning_sparse")
    versions = ", ".join(f"{name} {named[name.lower()]}" for name in libraries if name.lower() in named)
    return f"Measured on {machine}{cores}{threads}, with {versions}."


def markdown(header: Sequence[str], rows: Sequence[Sequence[str]], conditions: str) -> str:
    """A table in Markdown, and below it what it was measured with."""
    named = [[NAMES.get(cell, cell) for cell in row] for row in rows]
    lines = [header, ["---"] * len(header), *named]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + f"\n\n{conditions}"


def of_rich(table: Table, conditions: str) -> str:
    """The table that a benchmark prints, in Markdown."""
    columns = [[number(str(cell)) for cell in column.cells] for column in table.columns]
    return markdown([str(column.header) for column in table.columns], list(zip(*columns, strict=True)), conditions)


def number(text: str) -> str:
    """A number for readers: with a minus sign, not a hyphen; without trailing zeros, and without a sign at zero."""
    if re.fullmatch(r"[-+]0\.0+", text):
        return text[1:]
    text = re.sub(r"^(0\.\d*?)0{4,}$", r"\1", text).removesuffix(".")
    return re.sub(r"^-(?=\d)", "−", text)


def percent(share: float) -> str:
    """A share in percent, with as many digits as it needs."""
    return f"{100 * share:.4g} %"


def crossed(rows: Rows, row: str, column: str, cell: Callable[[Mapping[str, Any]], str]) -> tuple[list[str], Any]:
    """A table of two keys: the header, and a line for each value of ``row``, with a cell for each of ``column``."""
    columns = list(dict.fromkeys(str(each[column]) for each in rows))
    cells: dict[str, dict[str, str]] = {}
    for each in rows:
        cells.setdefault(str(each[row]), {})[str(each[column])] = cell(each)
    return ["", *columns], [[name, *(of.get(key, "") for key in columns)] for name, of in cells.items()]


def quartiles(ratio: Mapping[str, float], digits: int = 2) -> str:
    """A ratio, and its quartiles."""
    value, low, high = (f"{ratio[key]:.{digits}f}" for key in ("value", "low", "high"))
    return f"{value} ({low} to {high})"


# The tables.


def trained(name: str, tabulate: Callable[[Sequence[dict[str, Any]]], Table]) -> str:
    """The table of a benchmark that trains networks."""
    results = lines_of(name)
    return of_rich(tabulate(results), measured_with([result["versions"] for result in results]))


def inference(batch: int) -> str:
    """How many times as fast calls are, at one batch size."""
    results = [row for row in lines_of("inference.jsonl") if row.get("batch") == batch and row["threads"] == 1]
    results.sort(key=lambda row: (row["network"], row["sparsity"]))
    header = [
        "network",
        "zeros",
        "dense torch, µs",
        "`accelerate`, µs",
        "speed-up over torch",
        "over the best dense engine",
    ]
    rows = [
        [
            row["network"],
            percent(row["sparsity"]),
            f"{row['microseconds']['torch']:,.0f}",
            f"{row['microseconds']['lightning_sparse']:,.0f}",
            f"{row['over torch']:.1f}",
            f"{row['over best fp32']:.1f} ({row['best fp32']})",
        ]
        for row in results
    ]
    return markdown(header, rows, measured_with([row["conditions"] for row in results]))


def small_layers() -> str:
    """How many small layers are replaced, and what they gain."""
    (content,) = (row for row in lines_of("inference.jsonl") if "grid" in row)
    layers = content["grid"]
    swapped = [layer["gain"] for layer in layers if layer["swapped"]]
    kept = [layer["gain"] for layer in layers if not layer["swapped"]]
    header = ["small layers tried", "replaced", "median gain", "least gain of the replaced", "gain of the others"]
    row = [f"{len(layers)}", f"{len(swapped)}", f"{median(swapped):.2f}", f"{min(swapped):.2f}"]
    row.append(f"{min(kept):.2f} to {max(kept):.2f}")
    return markdown(header, [row], measured_with([content["conditions"]]))


def limits() -> str:
    """What limits linear layers with one input."""
    rows, conditions = content_of("limits.json")
    parts = ("accelerated", "kernel", "bytes", "call")
    header = ["width", "zeros", "goal", "times as fast", "at the floor", *(f"{part}, µs" for part in parts)]
    cells = [
        [
            f"{row['width']}",
            percent(row["sparsity"]),
            f"≥ {row['goal']}",
            f"{row['times as fast']:.1f}",
            f"{row['at the floor']:.1f}",
            *(f"{row[f'{name}, µs']:.1f}" for name in parts),
        ]
        for row in rows
    ]
    return markdown(header, cells, conditions)


def files() -> str:
    """How small files are, and how long they take to load."""
    rows, conditions = content_of("files.json")
    header = ["zeros", "file", "MB", "times smaller", "load, ms", "over torch.load (quartiles)"]
    cells = [
        [
            percent(row["sparsity"]),
            row["file"],
            f"{row['MB']:.2f}",
            f"{row['times smaller']:.1f}",
            f"{row['load, ms']:.0f}",
            row["load / torch.load"],
        ]
        for row in rows
    ]
    return markdown(header, cells, conditions)


def whole_runs() -> str:
    """The time of whole training runs over dense."""
    rows, conditions = content_of("whole_runs.json")
    named = [
        row | {"run": f"{row['steps']:,} steps, {row['threads']} thread" + "s" * (row["threads"] > 1)}
        for row in sorted(rows, key=lambda row: (row["threads"], row["steps"]))
        if row["contender"] != "dense"
    ]
    whole = markdown(*crossed(named, "contender", "run", lambda row: row["whole run over dense"]), "")
    steps = markdown(*crossed(named, "contender", "run", lambda row: row["median step over dense"]), "")
    return f"{whole}The median step of the same runs, between updates:\n\n{steps}{conditions}"


def overhead(optimizer: str, precision: str, results: str = "overhead.json") -> str:
    """The time of a training step over dense."""
    rows, conditions = content_of(results)
    chosen = [row for row in rows if (row["optimizer"], row["precision"]) == (optimizer, precision)]
    chosen = [row for row in chosen if row["contender"] != "dense"]
    return markdown(
        *crossed(chosen, "contender", "network", lambda row: quartiles(row["over dense (quartiles)"])), conditions
    )


def update() -> str:
    """The time of one update over one sort."""
    rows, conditions = content_of("update.json")
    header = ["", "weights", "update, ms", "update / sort (quartiles)", "goal"]
    cells = [
        [
            row["contender"],
            row["weights"],
            f"{row['update, ms']:.0f}",
            quartiles(row["update / sort (quartiles)"], 3),
            f"≤ {row['goal']}" if row["goal"] else "",
        ]
        for row in rows
    ]
    return markdown(header, cells, conditions)


def scaling() -> str:
    """How the time of an update grows."""
    rows, conditions = content_of("scaling.json")
    header = ["", "what grows", "ms by number", "exponent", "goal"]
    cells = [
        [
            row["method"],
            row["growing"],
            re.sub(r", (?=[\d,]+: )", "; ", row["ms by number"]),
            f"{row['exponent']:.2f}",
            f"≤ {row['goal']}" if row["goal"] else "",
        ]
        for row in rows
    ]
    return markdown(header, cells, conditions)


def memory() -> str:
    """The bytes that masks take for each weight."""
    rows, conditions = content_of("memory.json")
    keys = {
        "bytes / weight between updates": "between updates",
        "goal": "goal",
        "peak of an update, bytes / weight": "peak of an update",
        "peak of training ResNet-18, bytes / weight": "peak of training ResNet-18",
        "checkpoint, share of the weights' bytes": "growth of a checkpoint",
        "goal ": "goal for growth",
    }
    digits = {"checkpoint, share of the weights' bytes": 3}

    def cell(key: str, value: Any) -> str:
        if isinstance(value, float) and not key.startswith("goal"):
            return number(f"{value:.{digits.get(key, 1)}f}")
        return f"≤ {value}" if key.startswith("goal") and value != "" else str(value)

    cells = [[row["contender"], *(cell(key, row.get(key, "")) for key in keys)] for row in rows]
    return markdown(["", *keys.values()], cells, conditions)


def sync() -> str:
    """What two processes send each other in an update."""
    rows, conditions = content_of("sync.json")
    header = [
        "",
        "transfers",
        "bytes per weight",
        "relative to the gradients",
        "update, ms",
        "transfers, ms",
        "share of the update",
    ]
    cells = [
        [
            row["method"],
            str(row["transfers of an update"]),
            f"{row['bytes / weight']:.1f}",
            format(row["of the gradients' bytes"], ".2f"),
            f"{row['update, ms']:.0f}",
            f"{row['transfers, ms']:.0f}",
            percent(round(row["transfers / update"], 2)),
        ]
        for row in rows
    ]
    return markdown(header, cells, conditions)


def sharded() -> str:
    """What an update of sharded masks sends and takes."""
    rows, conditions = content_of("sharded.json")
    header = ["", "weights", "layers", "processes", "all-reduces", "kB sent", "CPU, ms", "alone, ms", "CPU / alone"]
    cells = [
        [
            f"{NAMES[row['method']]}, {row['ranked']}",
            f"{float(row['weights']):,.0f}",
            f"{row['layers']}",
            f"{row['processes']}",
            f"{row['collectives']}",
            f"{row['kB']:,.1f}",
            f"{row['ms']:,.0f}",
            f"{row['alone']:,.0f}" if row["alone"] else "",
            f"{row['ratio']:.1f}" if row["ratio"] else "extrapolated",
        ]
        for row in rows
    ]
    return markdown(header, cells, conditions)


def goals_met() -> str:
    """Every goal, and whether it is met. The sections below say how each was measured."""
    rows = goals.summary(lambda name: lines_of(name) if name.endswith(".jsonl") else content_of(name)[0])
    return markdown(goals.HEADER, [[_with_names(cell) for cell in row] for row in rows], "").rstrip()


def _with_names(text: str) -> str:
    """A text with the name that readers know in the place of a network's own."""
    return re.sub(r"(?<=: )[\w-]+(?=, batch)", lambda network: NAMES.get(network[0], network[0]), text)


TABLES: dict[str, Callable[[], str]] = {
    "goals": goals_met,
    "mnist": lambda: trained("mnist.jsonl", mnist.tabulate),
    "dst": lambda: trained("dst.jsonl", dst.tabulate),
    "cifar": lambda: trained("cifar.jsonl", cifar.tabulate),
    "inference-1": lambda: inference(1),
    "inference-16": lambda: inference(16),
    "inference-64": lambda: inference(64),
    "small-layers": small_layers,
    "limits": limits,
    "files": files,
    "whole-runs": whole_runs,
    "steps": lambda: overhead("SGD", "fp32", "steps.json"),
    "steps-adamw": lambda: overhead("AdamW", "fp32", "steps.json"),
    "steps-fused": lambda: overhead("AdamW-fused", "fp32", "steps.json"),
    "overhead": lambda: overhead("SGD", "fp32"),
    "overhead-bf16": lambda: overhead("SGD", "bf16"),
    "overhead-adamw": lambda: overhead("AdamW", "fp32"),
    "overhead-fused": lambda: overhead("AdamW-fused", "fp32"),
    "update": update,
    "scaling": scaling,
    "memory": memory,
    "sync": sync,
    "sharded": sharded,
}

if __name__ == "__main__":
    sys.exit(main())
