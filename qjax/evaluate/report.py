"""Reports: results as JSON, CSV, a Markdown page, and plots.

A report folder holds

    report.json          everything, as given
    results.csv          one line per model
    report.md            the table, how it was measured, and the plots
    perplexity.png       perplexity against bits per weight
    kl_divergence.png    KL divergence against bits per weight
    layer_errors.png     weight error of every layer
    tensor.png           error heatmap and histogram of one tensor
    memory.png           size by component

each as far as its numbers were given; the first two plots need two models or more.

Refuses to start without matplotlib (extra `[plot]`): a report is made after long work,
so `require_matplotlib` is the first thing to call before that work.
"""

import csv
import io
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from qjax.errors import SpecError
from qjax.evaluate.plots import (
    plot_layer_errors,
    plot_memory,
    plot_tensor,
    require_matplotlib,
)
from qjax.evaluate.tradeoff import plot_tradeoff
from qjax.evaluate.weights import (
    bits_per_weight,
    by_component,
    choose_tensor,
    compare_weights,
    dense_matrix,
    memory_by_component,
)
from qjax.models import Decoder

_COLUMNS = {
    "name": ("model", "{}"),
    "bits_per_weight": ("bits per weight", "{:.3f}"),
    "size_bytes": ("size (MB)", "{:.2f}"),
    "perplexity": ("perplexity", "{:.3f}"),
    "bits_per_byte": ("bits per byte", "{:.4f}"),
    "kl_divergence": ("KL divergence", "{:.5f}"),
    "kl_divergence_stderr": ("± error", "{:.5f}"),
    "top1_agreement": ("same top token (%)", "{:.2f}"),
    "decode_tokens_per_second": ("decode (tokens/s)", "{:.0f}"),
}
_FACTORS = {"size_bytes": 1e-6, "top1_agreement": 100.0}
_PROTOCOL = ("protocol", "context", "stride", "windows", "bos", "tokens", "text_sha256")
_CAPTIONS = {
    "perplexity": "Perplexity against bits per weight",
    "kl_divergence": "KL divergence against bits per weight",
    "layer_errors": "Weight error of every layer",
    "tensor": "Where the error of one tensor sits, and its values",
    "memory": "Memory by component",
}


def write_report(
    directory: str | os.PathLike[str],
    results: Sequence[Mapping[str, Any]],
    *,
    tensors: Sequence[Mapping[str, Any]] | None = None,
    tensor: tuple[str, Any, Any] | None = None,
    memory: Mapping[str, Mapping[str, int]] | None = None,
) -> list[Path]:
    """Write a report folder, creating it where needed.

    Args:
        directory: Folder to write into; files of an earlier report are replaced.
        results: What `evaluate` returned, one dict per model, with `name` added and
            where known `bits_per_weight`, `size_bytes`, `decode_tokens_per_second`.
        tensors: Quantization's report of tensors: `name` and `error` of each.
        tensor: Name, original matrix and quantized matrix of one tensor to look into.
        memory: Bytes by component, by model; see `memory_by_component`.

    Returns:
        The files written.

    Raises:
        MissingExtraError: matplotlib is not installed; nothing is written.
        SpecError: There are no results, or the folder is a file.
    """
    require_matplotlib()
    if not results or any("name" not in result for result in results):
        raise SpecError("report: expected at least one result, each with a 'name'")
    folder = Path(directory)
    if folder.exists() and not folder.is_dir():
        raise SpecError(f"report: {folder} is a file; name a folder")
    folder.mkdir(parents=True, exist_ok=True)
    plots = _draw(folder, results, tensors, tensor, memory)
    content = {"results": [dict(r) for r in results]}
    content |= {"tensors": [dict(t) for t in tensors]} if tensors else {}
    content |= {"memory": {k: dict(v) for k, v in memory.items()}} if memory else {}
    texts = {
        "report.json": json.dumps(content, indent=1, default=float) + "\n",
        "results.csv": _csv(results),
        "report.md": _markdown(results, plots),
    }
    for name, text in texts.items():
        (folder / name).write_text(text, encoding="utf-8", newline="")
    return [*(folder / name for name in texts), *plots]


def _draw(
    folder: Path,
    results: Sequence[Mapping[str, Any]],
    tensors: Sequence[Mapping[str, Any]] | None,
    tensor: tuple[str, Any, Any] | None,
    memory: Mapping[str, Mapping[str, int]] | None,
) -> list[Path]:
    """Draw every plot whose numbers are there; return the files."""
    files = []
    sized = [r for r in results if r.get("bits_per_weight") is not None]
    for metric in ("perplexity", "kl_divergence"):
        path = folder / f"{metric}.png"
        path.unlink(missing_ok=True)
        if sum((r.get(metric) or 0) > 0 for r in sized) >= 2:
            files.append(plot_tradeoff(sized, path, metric))
    for name in ("layer_errors", "tensor", "memory"):
        (folder / f"{name}.png").unlink(missing_ok=True)
    if tensors and any(t.get("error") is not None for t in tensors):
        files.append(plot_layer_errors(tensors, folder / "layer_errors.png"))
    if tensor is not None:
        files.append(plot_tensor(*tensor, folder / "tensor.png"))
    if memory:
        files.append(plot_memory(memory, folder / "memory.png"))
    return files


def report_evaluation(
    directory: str | os.PathLike[str],
    result: Mapping[str, Any],
    model: Decoder,
    *,
    name: str = "model",
    baseline: Decoder | None = None,
    tensor: str | None = None,
    stored: Mapping[str, Any] | None = None,
    baseline_stored: Mapping[str, Any] | None = None,
) -> list[Path]:
    """Write the report of one evaluation, with what the models themselves tell.

    Args:
        directory: Folder to write into.
        result: What `evaluate` returned.
        model: The model it was measured on.
        name: Its name in tables and plots.
        baseline: The original; adds weight errors and the look into one tensor.
        tensor: Which tensor to look into, such as `layers.3.mlp.down`; by default the
            one with the largest error.
        stored: What `qjax.inspect` says of the model's files; without it, sizes are
            those in memory, where float weights may be wider.
        baseline_stored: The same of the baseline.

    Returns:
        The files written.

    Raises:
        MissingExtraError: matplotlib is not installed; nothing is written.
        SpecError: No tensor has that name, or the models do not match.
    """
    require_matplotlib()
    size, parts = _size(model, stored)
    sizes, row = {name: parts}, {"name": name, **size, **result}
    if baseline is None:
        return write_report(directory, [row], memory=sizes)
    shared = {key: result[key] for key in _PROTOCOL if key in result}
    size, parts = _size(baseline, baseline_stored)
    original = {
        "name": "original",
        **size,
        **shared,
        "perplexity": result.get("baseline_perplexity"),
    }
    tensors = compare_weights(model, baseline)
    looked_at = None
    if tensors:
        chosen = choose_tensor(tensors, tensor)
        before, after = dense_matrix(baseline, chosen), dense_matrix(model, chosen)
        looked_at = (chosen, before, after)
    sizes = {"original": parts, **sizes}
    return write_report(
        directory, [original, row], tensors=tensors, tensor=looked_at, memory=sizes
    )


def _size(
    model: Decoder, stored: Mapping[str, Any] | None
) -> tuple[dict[str, Any], dict[str, int]]:
    """Return a row's sizes, and bytes by component: stored if known, else in memory."""
    if stored is None:
        bits, size = bits_per_weight(model)
        parts = memory_by_component(model)
    else:
        bits, size = stored["bits_per_weight"], stored["size_bytes"]
        tensors = {tensor["name"]: tensor["nbytes"] for tensor in stored["tensors"]}
        parts = by_component(tensors)
    return {"bits_per_weight": bits, "size_bytes": size}, parts


def markdown_table(results: Sequence[Mapping[str, Any]]) -> str:
    """Return results as a Markdown table; columns nobody has are left out."""
    columns = [c for c in _COLUMNS if any(r.get(c) is not None for r in results)]
    lines = [[_COLUMNS[c][0] for c in columns]]
    lines.append([":--" if c == "name" else "--:" for c in columns])
    for result in results:
        lines.append([_cell(c, result.get(c)) for c in columns])
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def _cell(column: str, value: Any) -> str:
    if value is None:
        return ""
    if column == "name":
        return str(value).replace("|", "\\|")
    return _COLUMNS[column][1].format(float(value) * _FACTORS.get(column, 1.0))


def _csv(results: Sequence[Mapping[str, Any]]) -> str:
    """Return all plain numbers and strings of the results, full precision."""
    columns = list(
        dict.fromkeys(
            key
            for result in results
            for key, value in result.items()
            if not isinstance(value, (dict, list, tuple))
        )
    )
    columns = ["name", *(c for c in columns if c != "name")]
    out = io.StringIO()
    writer = csv.DictWriter(out, columns, extrasaction="ignore", lineterminator="\n")
    writer.writeheader()
    writer.writerows(results)
    return out.getvalue()


def _markdown(results: Sequence[Mapping[str, Any]], plots: Sequence[Path]) -> str:
    """Return the report page."""
    text = "# Evaluation\n\n" + markdown_table(results) + "\n"
    base = next((r.get("baseline_perplexity") for r in results
                 if r.get("baseline_perplexity") is not None), None)  # fmt: skip
    if base is not None:
        text += f"Perplexity of the original: {base:.3f}. "
    used = {key: results[0][key] for key in _PROTOCOL if key in results[0]}
    same = all(r.get(key) == value for r in results for key, value in used.items())
    if used and same:
        said = ", ".join(f"{key.replace('_', ' ')} {v}" for key, v in used.items())
        text += f"Measured with {said}.\n"
    elif used:
        text += "The rows were measured differently; see report.json.\n"
    for path in plots:
        text += f"\n![{_CAPTIONS[path.stem]}]({path.name})\n"
    return text
