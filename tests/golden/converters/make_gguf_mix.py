"""Writes which types llama.cpp gives to the tensors of four models, for every preset.

    python tests/golden/converters/make_gguf_mix.py LLAMA_CPP/tests/snapshots

The snapshots are llama.cpp's own (MIT), here those in the source archive of
llama-cpp-python 0.3.36. Consecutive layers of one type become ranges.
"""

import json
import re
import sys
from pathlib import Path

MODELS = {
    "qwen3-0.6b": "qwen3",
    "qwen3-14b": "qwen3",
    "gemma-3-4b-it": "gemma3_text",
    "meta-llama-3.1-70b-instruct": "llama",
}


def read(path: Path) -> dict:
    """Sizes of a model, and for each preset its type and the layers that differ."""
    text = path.read_text("utf-8")
    sizes = {k: int(v) for k, v in re.findall(r"(n_\w+)=(\d+)", text)}
    presets: dict[str, dict] = {}
    for part in text.split("\n[")[1:]:
        title, *lines = part.strip().splitlines()
        name, base = title.split("] ")
        different: dict[str, dict] = {}
        for line in filter(None, lines):
            tensor, kind = line.split()
            found = re.fullmatch(r"blk\.(\d+)\.(.+)", tensor)
            stem, layer = (found[2], int(found[1])) if found else (tensor, -1)
            different.setdefault(stem, {}).setdefault(kind.lower(), []).append(layer)
        presets[name] = {"base": base.lower(), "different": different}
    return {"sizes": sizes, "presets": presets}


def ranges(value):
    """Lists of layers as `0-3,7`."""
    if isinstance(value, dict):
        return {key: ranges(inner) for key, inner in value.items()}
    if not isinstance(value, list):
        return value
    runs: list[list[int]] = []
    for number in sorted(value):
        if runs and number == runs[-1][1] + 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    return ",".join(f"{a}-{b}" if a != b else f"{a}" for a, b in runs)


def main() -> None:
    folder, made = Path(sys.argv[1]), {}
    for name, family in MODELS.items():
        made[name] = {"family": family} | ranges(read(folder / f"{name}.schema"))
    text = json.dumps({"llama-cpp-python": "0.3.36", "models": made}, indent=0)
    Path(__file__).with_name("gguf_mix.json").write_text(text + "\n", "utf-8")


if __name__ == "__main__":
    main()
