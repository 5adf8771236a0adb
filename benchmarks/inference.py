"""How fast networks with zeros run after ``accelerate``, compared with dense ones in torch and other engines.

Masks are random and uniform. The first convolution and the classifier stay dense, as in the literature, except in the
perceptrons, where all layers are sparse. Every contender computes the same network, in turns with all others; its time
is that of its fastest turn. Each row is one line of JSON. A case that is already in the file is not run again::

    python -m benchmarks.inference --out benchmarks/results/inference.jsonl --networks resnet18-32 --batch 1 16
    python -m benchmarks.inference --grid  # never slower: many small layers, most of which cannot gain

The baselines ONNX Runtime and OpenVINO come with the extra ``benchmarks``. They are left out if not installed.
"""

from __future__ import annotations

import copy
import importlib.util
import itertools
import json
import time
import warnings
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torchvision
from rich.table import Table
from torch import Tensor, nn

from benchmarks.cases import resnet18, vit
from benchmarks.harness import argument_parser, cpu_name, print_table, versions, write
from lightning_sparse import accelerate
from lightning_sparse.execution.timing import num_threads
from lightning_sparse.zoo import LeNet5Caffe, LeNet300100

Call = Callable[[], Any]


def perceptron() -> nn.Module:
    """Make a perceptron of two hidden layers of 1024 units."""
    return nn.Sequential(nn.Linear(784, 1024), nn.ReLU(), nn.Linear(1024, 1024), nn.ReLU(), nn.Linear(1024, 10))


def linear(width: int) -> Callable[[], nn.Module]:
    """Make a square linear layer."""
    return lambda: nn.Linear(width, width)


def feed_forward() -> nn.Module:
    """Make the feed-forward part of a block of BERT's size: 768, 3072, 768, with a GELU."""
    return nn.Sequential(nn.Linear(768, 3072), nn.GELU(), nn.Linear(3072, 768))


def transformer_block() -> nn.Module:
    """Make a whole block of BERT's size: attention of 12 heads, and the feed-forward part."""
    return nn.TransformerEncoderLayer(768, 12, 3072, activation="gelu", batch_first=True)


NETWORKS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...], tuple[str, ...]]] = {
    "linear-1024": (linear(1024), (1024,), ()),
    "linear-4096": (linear(4096), (4096,), ()),
    "mlp": (perceptron, (784,), ()),
    "lenet300": (LeNet300100, (1, 28, 28), ()),
    "lenet5": (LeNet5Caffe, (1, 28, 28), ()),
    "bert-ffn-128": (feed_forward, (128, 768), ()),
    "bert-block-128": (transformer_block, (128, 768), ()),
    "resnet18-32": (resnet18, (3, 32, 32), ("conv1", "fc")),
    "resnet18-224": (torchvision.models.resnet18, (3, 224, 224), ("conv1", "fc")),
    "resnet50-224": (torchvision.models.resnet50, (3, 224, 224), ("conv1", "fc")),
    "vit-32": (vit, (3, 32, 32), ("conv_proj", "heads.head")),
}
"""By name: what makes it, the shape of one input, and the layers that stay dense."""


def sparse_network(name: str, sparsity: float) -> nn.Module:
    """Make a network and zero its weights at random, the same fraction in every layer."""
    torch.manual_seed(0)
    make, _, dense = NETWORKS[name]
    network = make().eval().requires_grad_(False)
    for layer_name, layer in network.named_modules():
        if isinstance(layer, nn.MultiheadAttention):
            layer.in_proj_weight.mul_(torch.rand_like(layer.in_proj_weight) >= sparsity)
        if layer_name == "heads.head":
            nn.init.normal_(layer.get_parameter("weight"))  # torchvision begins with zeros: all outputs would be zero
        if isinstance(layer, (nn.Linear, nn.Conv2d)) and layer_name not in dense:
            layer.weight.mul_(torch.rand_like(layer.weight) >= sparsity)
    return network


def contenders(network: nn.Module, x: Tensor, threads: int, *, compiled: bool) -> dict[str, Call]:
    """Return the dense baselines that are installed, by name; those that do not compute in fp32 end in bf16."""
    calls: dict[str, Call] = {"torch": lambda: network(x)}
    if x.dim() == 4:
        last = copy.deepcopy(network).to(memory_format=torch.channels_last)
        images = x.contiguous(memory_format=torch.channels_last)
        calls["torch channels_last"] = lambda: last(images)
    if compiled:
        compiled_network = torch.compile(network)
        calls["torch.compile"] = lambda: compiled_network(x)
    model = onnx_bytes(network, x)
    if model is not None and importlib.util.find_spec("onnxruntime"):
        calls["ONNX Runtime"] = onnx_runtime(model, x, threads)
    if model is not None and importlib.util.find_spec("openvino"):
        calls["OpenVINO"] = openvino(model, x, threads, "f32")
        calls["OpenVINO bf16"] = openvino(model, x, threads, "bf16")
    return calls


def onnx_bytes(network: nn.Module, x: Tensor) -> bytes | None:
    """Export a network; ``None`` if the exporter is not installed."""
    if not importlib.util.find_spec("onnxscript"):
        return None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        program = torch.onnx.export(network, (x,), dynamo=True, verbose=False)
        assert program is not None
    return program.model_proto.SerializeToString()


def onnx_runtime(model: bytes, x: Tensor, threads: int) -> Call:
    """Return a call of ONNX Runtime."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    feed = {session.get_inputs()[0].name: x.numpy()}
    return lambda: session.run(None, feed)


def openvino(model: bytes, x: Tensor, threads: int, precision: str) -> Call:
    """Return a call of OpenVINO."""
    ov: Any = importlib.import_module("openvino")
    core = ov.Core()
    settings = {
        "INFERENCE_NUM_THREADS": threads,
        "INFERENCE_PRECISION_HINT": precision,
        "PERFORMANCE_HINT": "LATENCY",
    }
    request = core.compile_model(core.read_model(model), "CPU", settings).create_infer_request()
    array = x.numpy()
    return lambda: request.infer([array], share_inputs=True)


def least_times(calls: dict[str, Call], seconds: float, clock: Call = time.perf_counter) -> dict[str, float]:
    """Return the seconds of the fastest turn of each call, by a clock. All calls take turns for ``seconds``."""
    best = dict.fromkeys(calls, float("inf"))
    repeats: dict[str, int] = {}
    for name, call in calls.items():
        call()
        start = time.perf_counter()
        call()
        # A processor clock ticks slowly, so several short calls are timed together.
        repeats[name] = max(1, int(5e-4 / max(time.perf_counter() - start, 1e-7)))
    end = time.perf_counter() + seconds
    rounds = 0
    while time.perf_counter() < end or rounds < 5:
        rounds += 1
        for name, call in calls.items():
            call()  # not timed, because the caches are full of other calls' data
            start = clock()
            for _ in range(repeats[name]):
                call()
            best[name] = min(best[name], (clock() - start) / repeats[name])
    return best


def measure(
    name: str, sparsity: float, batch: int, threads: int, seconds: float, clock: Call, *, compiled: bool
) -> dict[str, Any]:
    """Time one case; return its row of the results."""
    network = sparse_network(name, sparsity)
    x = torch.randn(batch, *NETWORKS[name][1])
    with num_threads(threads), torch.no_grad():
        fast = accelerate(network, x, threads=threads)
        calls = contenders(network, x, threads, compiled=compiled)
        calls["lightning_sparse"] = lambda: fast(x)
        times = least_times(calls, seconds, clock)
        error = float((fast(x) - network(x)).abs().max() / network(x).abs().max())
    own = times["lightning_sparse"]
    fp32 = {rival: t for rival, t in times.items() if rival != "lightning_sparse" and not rival.endswith("bf16")}
    best = min(fp32, key=fp32.__getitem__)
    return {
        "network": name,
        "sparsity": sparsity,
        "batch": batch,
        "threads": threads,
        "over torch": round(times["torch"] / own, 2),
        "over best fp32": round(fp32[best] / own, 2),
        "best fp32": best,
        "error": error,
        "microseconds": {rival: round(1e6 * t, 1) for rival, t in times.items()},
        "sparse layers": sum(layer.sparse for layer in fast.report.layers),
        "clock": "processor" if clock is time.process_time else "wall",
        "conditions": conditions(),
    }


def conditions() -> dict[str, Any]:
    """Return what the figures depend on: versions, kernels and processor."""
    return versions() | {"kernels": "llvm" if importlib.util.find_spec("llvmlite") else "torch_csr", "cpu": cpu_name()}


def small_layers(smallest: bool) -> list[tuple[str, nn.Module, Tensor]]:
    """Return layers so small that most cannot gain: name, layer, input."""
    sizes, batches, sparsities = (8, 64, 512), (1, 16, 128), (0.5, 0.9)
    if smallest:
        sizes, batches, sparsities = (8,), (1,), (0.5,)
    cases: list[tuple[str, nn.Module, Tensor]] = []
    for inputs, outputs, batch, sparsity in itertools.product(sizes, sizes, batches, sparsities):
        layer = nn.Linear(inputs, outputs)
        name = f"linear {inputs}-{outputs}, batch {batch}, {sparsity}"
        cases.append((name, _pruned(layer, sparsity), torch.randn(batch, inputs)))
    for channels, size, batch, sparsity in itertools.product(sizes[:2], (4, 16), batches[:2], sparsities):
        layer = nn.Conv2d(channels, channels, 3, padding=1)
        x = torch.randn(batch, channels, size, size)
        cases.append((f"conv {channels}, {size} x {size}, batch {batch}, {sparsity}", _pruned(layer, sparsity), x))
    return cases


def _pruned(layer: Any, sparsity: float) -> nn.Module:
    layer.weight.data.mul_(torch.rand_like(layer.weight) >= sparsity)
    return layer.eval().requires_grad_(False)


def grid(seconds: float, clock: Call, *, smallest: bool) -> list[dict[str, Any]]:
    """Time many small layers as ``accelerate`` returns them: none may be slower than the dense one."""
    rows: list[dict[str, Any]] = []
    torch.manual_seed(0)
    for name, layer, x in small_layers(smallest):
        with num_threads(1), torch.no_grad():
            fast = accelerate(layer, x, threads=1, seconds=0.1)
            times = least_times({"dense": partial(layer, x), "fast": partial(fast, x)}, seconds, clock)
        gain = round(times["dense"] / times["fast"], 3)
        rows.append({"layer": name, "gain": gain, "swapped": fast.report.accelerated})
    return rows


def summarize_grid(rows: Sequence[dict[str, Any]]) -> None:
    """Print how many layers were swapped, what they gained, and the five that gained least."""
    for swapped in (True, False):
        gains = sorted(row["gain"] for row in rows if row["swapped"] is swapped)
        if gains:
            middle = gains[len(gains) // 2]
            what = "swapped" if swapped else "left dense"
            print(f"{what}: {len(gains)}, gain {gains[0]} to {gains[-1]}, median {middle}")
    for row in sorted(rows, key=lambda row: row["gain"])[:5]:
        print(row)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the cases that are not in the file yet, and print their table."""
    parser = argument_parser(__doc__)
    parser.add_argument("--networks", nargs="+", choices=NETWORKS, default=["mlp", "lenet300", "resnet18-32"])
    parser.add_argument("--sparsity", nargs="+", type=float, default=[0.9, 0.95, 0.99])
    parser.add_argument("--batch", nargs="+", type=int, default=[1, 16])
    parser.add_argument("--threads", nargs="+", type=int, default=[1])
    parser.add_argument("--seconds", type=float, default=3.0, help="of the turns of one case")
    parser.add_argument("--compile", action="store_true", help="torch.compile too, which takes a compiler and minutes")
    parser.add_argument("--grid", action="store_true", help="many small layers instead")
    parser.add_argument("--out", type=Path, metavar="FILE", help="append a line of JSON for each case")
    options = parser.parse_args(arguments)
    if options.smallest:
        options.networks, options.sparsity, options.batch, options.threads = ["lenet300"], [0.95], [16], [1]
        options.seconds = 0.2
    if options.grid:
        rows = grid(min(options.seconds, 0.1), options.clock, smallest=options.smallest)
        summarize_grid(rows)
        _append(options.out, [{"grid": rows, "conditions": conditions()}])
        return
    known = _known(options.out)
    rows = []
    for case in itertools.product(options.networks, options.sparsity, options.batch, options.threads):
        if case not in known:
            row = measure(*case, options.seconds, options.clock, compiled=options.compile)
            rows.append(row)
            _append(options.out, [row])
            print(*case, *(f"{key} {row[key]}" for key in ("over torch", "over best fp32", "best fp32")), flush=True)
    if rows:
        columns = [name for name in rows[0] if name not in ("microseconds", "conditions", "clock")]
        table = Table(*columns)
        for row in rows:
            table.add_row(*(f"{row[name]:.2g}" if name == "error" else str(row[name]) for name in columns))
        print(", ".join(f"{name} {value}" for name, value in conditions().items()))
        print_table(table)
        write("Inference of networks with zeros", rows, options.json)


def _known(file: Path | None) -> set[tuple[Any, ...]]:
    lines = file.read_text(encoding="utf-8").splitlines() if file is not None and file.exists() else []
    rows = [row for row in map(json.loads, lines) if "network" in row]
    return {(row["network"], row["sparsity"], row["batch"], row["threads"]) for row in rows}


def _append(file: Path | None, rows: Sequence[dict[str, Any]]) -> None:
    if file is not None:
        with file.open("a", encoding="utf-8") as stream:
            stream.writelines(json.dumps(row) + "\n" for row in rows)


if __name__ == "__main__":
    main()
