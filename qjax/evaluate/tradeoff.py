"""The plot everyone asks for: quality against bits per weight.

Decides: with a known original, perplexity is drawn on an axis that grows
logarithmically with the loss (`asinh` of the relative increase), because methods that
lose 0.1 % and 25 % belong in one plot; ticks show the perplexity and the increase.
KL divergence has a logarithmic axis. Every point carries its name, placed where it
covers nothing.
"""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from qjax.errors import SpecError
from qjax.evaluate.plots import (
    GREY,
    PALE,
    PALETTE,
    STYLE,
    canvas,
    require_matplotlib,
    save,
)

Point = tuple[float, float, str]
_INCREASES = (0, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.25, 0.5, 1, 2, 5, 10, 100, 1000)
_LINEAR = 0.002  # relative increase up to which the axis is linear
_LABEL = {"gap": 8.0, "height": 16.0, "per_letter": 7.2}  # pixels at 100 dpi


def plot_tradeoff(
    results: Sequence[Mapping[str, Any]], path: Path, metric: str = "perplexity"
) -> Path:
    """Draw quality against bits per weight, one labelled point per result.

    Points of one method family share a colour and are joined. The original, where a
    result carries `baseline_perplexity`, is a dashed line.

    Args:
        results: Each with `name`, `bits_per_weight` and `metric`.
        path: PNG file to write.
        metric: `perplexity`, or `kl_divergence` on a logarithmic axis.

    Raises:
        MissingExtraError: matplotlib is not installed.
        SpecError: No result has the numbers.
    """
    points = [
        (float(r["bits_per_weight"]), float(r[metric]), str(r["name"]))
        for r in results
        if r.get("bits_per_weight") is not None and r.get(metric) is not None
    ]
    if metric == "kl_divergence":
        points = [point for point in points if point[1] > 0]
    if not points:
        raise SpecError(f"plot: no result has both bits_per_weight and {metric}")
    bases = [r.get("baseline_perplexity") for r in results]
    base = next((float(b) for b in bases if b is not None), None)
    with require_matplotlib().rc_context(STYLE):
        figure = canvas(9.0, 5.6)
        axes = figure.subplots()
        families = list(dict.fromkeys(family(name) for *_, name in points))
        colours = {f: PALETTE[i % len(PALETTE)] for i, f in enumerate(families)}
        for name, colour in colours.items():
            xs, ys = zip(
                *sorted((x, y) for x, y, n in points if family(n) == name), strict=True
            )
            axes.plot(xs, ys, color=colour, alpha=0.3, linewidth=1.5, zorder=2)
            axes.plot(xs, ys, "o", color=colour, markersize=7, zorder=3)
        _scale_x(axes, points)
        if metric == "kl_divergence":
            _scale_divergence(axes, points)
        else:
            _scale_perplexity(axes, points, base)
        axes.grid(True, which="major")
        axes.minorticks_off()
        _label_points(figure, axes, points, colours)
        return save(figure, path)


def family(name: str) -> str:
    """Return the method family of a result's name: `int4-g128` is of `int`."""
    found = re.match(r"[A-Za-z_.]+", name)
    return found[0].rstrip("_.") if found else name


def _scale_x(axes: Any, points: list[Point]) -> None:
    """Leave room right of the last point for its name."""
    xs = [x for x, *_ in points]
    span = max(max(xs) - min(xs), 0.5)
    axes.set_xlim(min(xs) - 0.07 * span, max(xs) + 0.13 * span)
    axes.set_xlabel("bits per weight (all stored bits)")


def _scale_divergence(axes: Any, points: list[Point]) -> None:
    """Use a logarithmic axis for KL divergence."""
    ys = [y for _, y, _ in points]
    axes.set_yscale("log")
    axes.set_ylim(min(ys) / 1.8, max(ys) * 1.8)
    axes.set_ylabel("KL divergence from the original (nats per token)")
    axes.set_title("Distance from the original against size")


def _scale_perplexity(axes: Any, points: list[Point], base: float | None) -> None:
    """Scale by relative increase over the original, or linearly without one."""
    axes.set_title("Perplexity against size")
    axes.set_ylabel("perplexity (lower is better)")
    ys = [y for _, y, _ in points]
    if base is None:
        return
    axes.axhline(base, color=GREY, linewidth=1.2, linestyle=(0, (5, 4)), zorder=1)

    def forward(y: Any) -> Any:
        return np.arcsinh((np.asarray(y) / base - 1) / _LINEAR)

    def inverse(z: Any) -> Any:
        return base * (1 + np.sinh(z) * _LINEAR)

    low, high = forward(min(*ys, base)), forward(max(*ys, base))
    margin = max(0.1 * (high - low), 0.3)
    axes.set_yscale("function", functions=(forward, inverse))
    axes.set_ylim(inverse(low - margin), inverse(high + margin))
    shown = [p for p in _INCREASES if forward(base * (1 + p)) < high + margin]
    shown = shown if len(shown) <= 8 else [p for p in shown if p == 0 or p >= 0.005]
    axes.set_yticks([base * (1 + p) for p in shown])
    axes.set_yticklabels(
        [
            f"{base * (1 + p):.4g}  +{100 * p:g} %" if p else f"{base:.4g}  original"
            for p in shown
        ]
    )


def _label_points(
    figure: Any, axes: Any, points: list[Point], colours: Mapping[str, str]
) -> None:
    """Write each name beside its point, moved until it covers nothing."""
    figure.canvas.draw()
    places = axes.transData.transform([(x, y) for x, y, _ in points])
    box = axes.get_window_extent()
    taken: list[tuple[float, float, float]] = []
    for (px, py), (x, y, name) in sorted(
        zip(places, points, strict=True), key=lambda item: -item[0][1]
    ):
        width = _LABEL["per_letter"] * len(name)
        left, at = _free_place(px, py, width, taken, places, box)
        taken.append((left, left + width, at))
        away = abs(at - py) > _LABEL["height"] * 0.7
        axes.annotate(
            name,
            (x, y),
            xytext=((left - px) * 0.72, (at - py) * 0.72),
            textcoords="offset points",
            va="center",
            fontsize=10,
            color=colours[family(name)],
            path_effects=[_halo()],
            arrowprops={
                "arrowstyle": "-",
                "color": PALE,
                "linewidth": 0.8,
                "shrinkA": 0,
                "shrinkB": 4,
                "relpos": (0.0 if left > px else 1.0, 0.5),
            }
            if away
            else None,
        )


def _halo() -> Any:
    """Return a white outline that keeps letters readable on lines."""
    from matplotlib import patheffects

    return patheffects.withStroke(linewidth=3, foreground="white")


def _free_place(
    px: float,
    py: float,
    width: float,
    taken: list[tuple[float, float, float]],
    points: Any,
    box: Any,
) -> tuple[float, float]:
    """Return left edge and height of the nearest place where a label fits."""
    gap, height = _LABEL["gap"], _LABEL["height"]
    best, best_cost = (px + gap, py), np.inf
    for left in (px + gap, px + 3 * gap, px - gap - width, px - 3 * gap - width):
        sideways = (2.0 if left < px else 0.0) + abs(left - px) / 100
        for step in range(-40, 41):
            at = py + step * height / 4
            cost = abs(step) + 4 * sideways
            if cost >= best_cost or not box.y0 + 8 < at < box.y1 - 4:
                continue
            if left < box.x0 or left + width > box.x1 + 20:
                continue
            covers = any(
                left < other_right + 4
                and left + width + 4 > other_left
                and abs(at - other) < height
                for other_left, other_right, other in taken
            ) or any(
                left - 5 < x < left + width + 5 and abs(at - y) < height * 0.75
                for x, y in points
            )
            if not covers:
                best, best_cost = (left, at), cost
    return best
