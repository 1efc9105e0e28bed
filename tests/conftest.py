"""Settings and fixtures that every test shares.

Eight CPU devices stand in for a mesh, and dtype promotion is strict: a test that passes
here holds on machines with many devices, and no result depends on an implicit cast.
"""

import gc
import os
import random
from collections.abc import Iterator
from pathlib import Path

import jax
import numpy as np
import pytest

from tests import fast_compiler

jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_numpy_dtype_promotion", "strict")

ROOT = Path(__file__).resolve().parent.parent
OPTIMIZED = {
    "evaluate",
    "formats",
    "peers",
    "test_aot_memory.py",
    "test_examples.py",
    "test_memory.py",
    "test_optimizers.py",
    "test_qat.py",
    "test_tpu_compile.py",
}


def pytest_configure(config: pytest.Config) -> None:
    """A program that another worker is still writing is compiled again."""
    message = "ignore:Error reading persistent compilation cache entry"
    config.addinivalue_line("filterwarnings", message)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark tests/peers as comparisons with other libraries; begin with slow files."""
    peers = Path(__file__).parent / "peers"
    for item in items:
        if peers in item.path.parents:
            item.add_marker("peer")
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: item.path not in slow)


def pytest_collection_finish() -> None:
    """Spare the garbage collector the tests, what they import, and most of its runs."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(50_000)


@pytest.fixture(autouse=True)
def _seeded() -> None:
    """Start every test from the same global random state."""
    random.seed(0)
    np.random.seed(0)  # noqa: NPY002 - libraries under comparison draw from it


@pytest.fixture(autouse=True, scope="session")
def _programs(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Workers and their children share the programs that they compile."""
    folder = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        folder = folder.parent
    for name, value in (
        ("jax_compilation_cache_dir", str(folder / "programs")),
        ("jax_persistent_cache_min_compile_time_secs", 0.0),
    ):
        jax.config.update(name, value)
        os.environ[name.upper()] = str(value)
    fast_compiler.install()


@pytest.fixture(autouse=True, scope="module")
def _compiler(request: pytest.FixtureRequest, _programs: None) -> Iterator[None]:
    """Compile fast where that hides nothing, and forget programs in time.

    LLVM's optimizations take half of the suite's time, XLA's emitters of fusions half
    of the rest. They stay on where results are compared bit for bit, in examples, in
    what compilers promise (memory, schedules) and in comparisons with other libraries;
    `QJAX_TEST_OPTIMIZE=1` turns them on everywhere. Each program takes several of the
    65530 maps that Linux grants a process; beyond, the compiler crashes.
    """
    slow = OPTIMIZED.intersection(request.path.relative_to(ROOT / "tests").parts)
    fast = not slow and "QJAX_TEST_OPTIMIZE" not in os.environ
    name, value = "jax_disable_most_optimizations", str(int(fast))
    if os.environ.get(name.upper(), value) != value:
        jax.clear_caches()  # which do not tell such programs from others
    jax.config.update(name, fast)
    os.environ[name.upper()] = value  # of child processes
    yield
    maps = Path("/proc/self/maps")
    if maps.exists() and maps.read_bytes().count(b"\n") > 15000:
        jax.clear_caches()


@pytest.fixture
def rng() -> np.random.Generator:
    """A NumPy generator with a fixed seed."""
    return np.random.default_rng(0)


@pytest.fixture
def key() -> jax.Array:
    """A JAX random key with a fixed seed."""
    return jax.random.key(0)


@pytest.fixture(scope="session")
def root() -> Path:
    """The root of the checkout."""
    return ROOT


@pytest.fixture(scope="session")
def model_path() -> Path:
    """The bundled model: a trained 6.8M-parameter Llama in Hugging Face layout."""
    return ROOT / "examples" / "model"


@pytest.fixture(scope="session")
def books_text() -> str:
    """Held-out books: text the bundled model was not trained on."""
    return (ROOT / "examples" / "data" / "books-test.txt").read_text("utf-8")


@pytest.fixture(scope="session")
def wikitext() -> str:
    """The WikiText-2 test split."""
    return (ROOT / "examples" / "data" / "wikitext-2-test.txt").read_text("utf-8")


@pytest.fixture(scope="session")
def calibration_text() -> str:
    """Excerpts from the training books, for calibration."""
    return (ROOT / "examples" / "data" / "books-calibration.txt").read_text("utf-8")
