"""Writes the base file that llama.cpp makes of the bundled model.

    python tests/golden/evaluate/make_base_file.py PATH/TO/llama-perplexity

The committed file is by llama.cpp as vendored in llama-cpp-python 0.3.36, on CPU.
"""

import subprocess
import sys
import tempfile
from pathlib import Path

import qjax

HERE = Path(__file__).resolve().parent
EXAMPLES = HERE.parents[2] / "examples"


def main(program: str) -> None:
    """Convert the model to GGUF floats and let llama.cpp read two windows."""
    with tempfile.TemporaryDirectory() as folder:
        model = Path(folder, "model.gguf")
        qjax.convert(EXAMPLES / "model", model, "gguf:F32")
        text = EXAMPLES / "data" / "wikitext-2-test.txt"
        command = f"{program} -m {model} -f {text} -c 8 -b 8 --chunks 2"
        file = ["--kl-divergence-base", str(HERE / "llama_cpp.kld")]
        subprocess.run([*command.split(), *file], check=True)


if __name__ == "__main__":
    main(sys.argv[1])
