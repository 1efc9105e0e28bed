"""Plots of tensors, layers and memory, as PNG files.

Decides: colours that colour-blind readers tell apart (Okabe and Ito), labels beside the
points they name, units on every axis. Draws on figures of its own, never on a window or
on global plotting state.

Refuses to run without matplotlib (extra `[plot]`), with the line that installs it.
Costs: a tensor's plot reads it once and keeps at most `CELLS` squared numbers.
"""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from qjax.errors import MissingExtraError, SpecError

PALETTE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
INK, GREY, PALE = "#222222", "#777777", "#B8B8B8"
CELLS = 256
STYLE = {
    "font.family": "sans-serif",
    "font.sans-serif": ["DejaVu Sans"],
    "font.size": 11,
    "axes.titlesize": 13,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.titlepad": 12,
    "axes.labelsize": 11,
    "axes.labelcolor": INK,
    "axes.edgecolor": "#888888",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "grid.color": "#E6E6E6",
    "grid.linewidth": 0.8,
    "text.color": INK,
    "xtick.color": "#555555",
    "ytick.color": "#555555",
}


def require_matplotlib() -> Any:
    """Return matplotlib; MissingExtraError with the install line without it."""
    try:
        import matplotlib
        import matplotlib.figure
        import matplotlib.ticker
    except ImportError:
        raise MissingExtraError(
            'plots need matplotlib; run: pip install "qjax-llm[plot]"'
        ) from None
    return matplotlib


def canvas(width: float, height: float) -> Any:
    """Return an empty figure of this size in inches."""
    matplotlib = require_matplotlib()
    return matplotlib.figure.Figure(figsize=(width, height), layout="constrained")


def save(figure: Any, path: Path) -> Path:
    """Write a figure; the bytes depend on its content alone."""
    figure.savefig(path, dpi=160, facecolor="white", metadata={"Software": None})
    return path


def plot_allocation(units: Sequence[Mapping[str, Any]], path: Path) -> Path:
    """Draw how many bits every group of kernels got: layers across, kinds down.

    Args:
        units: Each with `paths` and `bits`, as `qjax.allocate` reports them.
        path: PNG file to write.

    Raises:
        MissingExtraError: matplotlib is not installed.
        SpecError: There are no units.
    """
    cells: dict[str, dict[int, float]] = {}
    for unit in units:
        layer, kind = _layer_and_kind(unit["paths"][0])
        names = [_layer_and_kind(p)[1].rpartition(".")[2] for p in unit["paths"][1:]]
        label = ", ".join([kind, *names])
        cells.setdefault(label, {})[layer] = float(unit["bits"])
    if not cells:
        raise SpecError("plot: no units to draw")
    layers = sorted({layer for row in cells.values() for layer in row})
    grid = np.full((len(cells), len(layers)), np.nan)
    for i, row in enumerate(cells.values()):
        for layer, bits in row.items():
            grid[i, layers.index(layer)] = bits
    with require_matplotlib().rc_context(STYLE):
        figure = canvas(2.6 + 0.55 * len(layers), 1.6 + 0.5 * len(cells))
        axes = figure.subplots()
        image = axes.imshow(grid, aspect="auto", cmap="Blues", vmin=0)
        middle = np.nanmax(grid) / 2
        for (i, j), bits in np.ndenumerate(grid):
            if np.isfinite(bits):
                color = "white" if bits > middle else INK
                axes.text(j, i, f"{bits:.2g}", ha="center", va="center", color=color)
        axes.set_yticks(range(len(cells)), list(cells))
        axes.set_xticks(range(len(layers)), layers)
        axes.set_xlabel("layer")
        axes.set_title("Bits per weight")
        axes.tick_params(length=0)
        for spine in axes.spines.values():
            spine.set_visible(False)
        image.set_clim(0, max(8.0, float(np.nanmax(grid))))
        return save(figure, path)


def _layer_and_kind(name: str) -> tuple[int, str]:
    """Return layer 3 and kind `attn.q` of `layers.3.attn.q.kernel`."""
    found = re.fullmatch(r".*?layers\.(\d+)\.(.+?)(\.kernel)?", name)
    return (int(found[1]), found[2]) if found else (0, name)


def plot_layer_errors(tensors: Sequence[Mapping[str, Any]], path: Path) -> Path:
    """Draw the weight error of every quantized tensor: one panel per kind of matrix.

    Args:
        tensors: Each with `name` and `error`, as quantization reports them: the
            relative error `|W - W_q| / |W|` in Frobenius norm.
        path: PNG file to write.

    Raises:
        MissingExtraError: matplotlib is not installed.
        SpecError: No tensor has an error.
    """
    kinds: dict[str, list[tuple[int, float]]] = {}
    for tensor in tensors:
        if tensor.get("error") is None:
            continue
        layer, kind = _layer_and_kind(tensor["name"])
        kinds.setdefault(kind, []).append((layer, float(tensor["error"])))
    if not kinds:
        raise SpecError("plot: no tensor has an error to draw")
    with require_matplotlib().rc_context(STYLE):
        columns = min(4, len(kinds))
        rows = -(-len(kinds) // columns)
        figure = canvas(2.9 * columns + 0.8, 2.3 * rows + 1.1)
        grid = figure.subplots(rows, columns, sharey=True, squeeze=False)
        top = 100 * max(e for values in kinds.values() for _, e in values)
        for axes, (kind, values) in zip(grid.flat, kinds.items(), strict=False):
            layers, errors = zip(*sorted(values), strict=True)
            axes.bar(layers, 100 * np.array(errors), color=PALETTE[0], width=0.75)
            axes.set_title(kind, fontsize=11, pad=5)
            axes.set_ylim(0, 1.12 * top or 1.0)
            axes.grid(True, axis="y")
            axes.locator_params(axis="x", integer=True, nbins=6)
            worst = int(np.argmax(errors))
            axes.annotate(
                f"{100 * errors[worst]:.3g} %",
                (layers[worst], 100 * errors[worst]),
                xytext=(0, 2),
                textcoords="offset points",
                ha="center",
                fontsize=9,
            )
        for axes in list(grid.flat)[len(kinds) :]:
            axes.set_visible(False)
        figure.suptitle(
            "Weight error of every layer", x=0.01, ha="left", fontweight="bold"
        )
        figure.supxlabel("layer", fontsize=11)
        figure.supylabel("relative error |W − Wq| / |W| (%)", fontsize=11)
        return save(figure, path)


def plot_tensor(name: str, weight: Any, quantized: Any, path: Path) -> Path:
    """Draw where a tensor's error sits, and how its values moved.

    Left, the root mean square of `W - W_q` over cells of the matrix; right, histograms
    of `W` and `W_q`.

    Args:
        name: Name for the title.
        weight: Original values, `[in, out]`.
        quantized: Values after quantization, of the same shape.
        path: PNG file to write.

    Raises:
        MissingExtraError: matplotlib is not installed.
        SpecError: The shapes differ or are not matrices.
    """
    weight = np.asarray(weight, np.float32)
    quantized = np.asarray(quantized, np.float32)
    if weight.ndim != 2 or weight.shape != quantized.shape or not weight.size:
        raise SpecError(
            f"plot of {name}: got shapes {weight.shape} and {quantized.shape}, "
            "expected one matrix before and after quantization"
        )
    error = np.square(weight - quantized)
    cells, steps = _pool(error)
    with require_matplotlib().rc_context(STYLE):
        figure = canvas(12.4, 4.9)
        left, right = figure.subplots(1, 2, width_ratios=[1.15, 1])
        image = left.imshow(
            np.sqrt(cells),
            cmap="viridis",
            vmin=0,
            aspect="auto",
            interpolation="nearest",
            extent=(0, weight.shape[1], weight.shape[0], 0),
        )
        for spine in left.spines.values():
            spine.set_visible(False)
        left.set_title(f"Error of {name}")
        left.set_xlabel("output")
        left.set_ylabel("input")
        label = "RMS error" if max(steps) == 1 else (
            f"RMS error over {steps[0]} × {steps[1]} weights")  # fmt: skip
        bar = figure.colorbar(image, ax=left, pad=0.02, label=label)
        bar.outline.set_visible(False)
        _histogram(right, weight, quantized)
        return save(figure, path)


def _histogram(axes: Any, weight: np.ndarray, quantized: np.ndarray) -> None:
    """Draw the values of a tensor before and after."""
    limit = float(np.quantile(np.abs(weight), 0.9999)) * 1.05 or 1.0
    edges = np.linspace(-limit, limit, 161)
    axes.hist(
        np.clip(quantized.ravel(), -limit, limit),
        edges,
        color=PALETTE[1],
        alpha=0.75,
        label="quantized",
    )
    axes.hist(
        np.clip(weight.ravel(), -limit, limit),
        edges,
        color=PALETTE[0],
        histtype="step",
        linewidth=1.8,
        label="original",
    )
    axes.set_yscale("log")
    axes.set_title("Values")
    axes.set_xlabel("weight")
    axes.set_ylabel("number of weights")
    axes.grid(True, axis="y")
    norm = float(np.linalg.norm(weight))
    error = float(np.linalg.norm(weight - quantized)) / (norm or 1.0)
    axes.legend(
        frameon=False, loc="upper left", title=f"relative error {100 * error:.2f} %",
        alignment="left",
    )  # fmt: skip
    axes.set_ylim(0.7, axes.get_ylim()[1] * 6)


def _pool(values: np.ndarray) -> tuple[np.ndarray, tuple[int, int]]:
    """Return means over cells so that at most `CELLS` remain per axis; cell size."""
    steps = tuple(-(-size // CELLS) for size in values.shape)
    for axis, step in enumerate(steps):
        edges = np.arange(0, values.shape[axis], step)
        counts = np.diff(np.append(edges, values.shape[axis]))
        shape = [-1 if i == axis else 1 for i in range(2)]
        values = np.add.reduceat(values, edges, axis=axis) / counts.reshape(shape)
    return values, (steps[0], steps[1])


def plot_memory(memory: Mapping[str, Mapping[str, int]], path: Path) -> Path:
    """Draw what the parts of each model weigh, as stacked bars.

    Args:
        memory: Bytes by component, by model.
        path: PNG file to write.

    Raises:
        MissingExtraError: matplotlib is not installed.
        SpecError: There is nothing to draw.
    """
    components = list(dict.fromkeys(c for parts in memory.values() for c in parts))
    largest = max((sum(parts.values()) for parts in memory.values()), default=0)
    if not largest:
        raise SpecError("plot: no component has any bytes")
    unit, divisor = _unit(largest)
    with require_matplotlib().rc_context(STYLE):
        figure = canvas(8.6, 1.7 + 0.5 * len(memory))
        axes = figure.subplots()
        names = list(memory)
        start = np.zeros(len(names))
        for i, component in enumerate(components):
            sizes = np.array([memory[n].get(component, 0) for n in names]) / divisor
            axes.barh(
                names,
                sizes,
                left=start,
                height=0.62,
                label=component,
                color=PALETTE[i % len(PALETTE)],
                edgecolor="white",
                linewidth=0.8,
            )
            start += sizes
        for row, total in enumerate(start):
            axes.annotate(
                f"{total:.3g} {unit}",
                (total, row),
                xytext=(6, 0),
                textcoords="offset points",
                va="center",
                fontweight="bold",
                fontsize=10,
            )
        _finish_bars(figure, axes, float(start.max()), unit, len(components))
        return save(figure, path)


def _finish_bars(
    figure: Any, axes: Any, largest: float, unit: str, components: int
) -> None:
    """Set limits, titles and legend of the memory plot."""
    axes.invert_yaxis()
    axes.set_xlim(0, largest * 1.16)
    axes.tick_params(axis="y", length=0, labelcolor=INK)
    axes.spines["left"].set_visible(False)
    axes.grid(True, axis="x")
    axes.set_xlabel(f"size ({unit})")
    figure.suptitle("Memory by component", x=0.01, ha="left", fontweight="bold")
    figure.legend(
        *axes.get_legend_handles_labels(),
        loc="outside upper right",
        ncols=components,
        frameon=False,
        handlelength=1,
        columnspacing=1.2,
        fontsize=10,
    )


def _unit(size: float) -> tuple[str, float]:
    """Return the decimal unit in which `size` reads best, and its bytes."""
    for unit, divisor in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if size >= divisor:
            return unit, divisor
    return "bytes", 1.0
