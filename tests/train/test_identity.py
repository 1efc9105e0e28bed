"""What tells two runs apart, and lines of a run that was cut short."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from qjax.errors import SpecError
from qjax.train.identity import check_same, digest_of
from qjax.train.metrics import JsonLines


def tree(**changes):
    rng = np.random.default_rng(0)
    made = {
        "w": jnp.asarray(rng.standard_normal((4, 6)), jnp.float32),
        "codes": jnp.asarray(rng.integers(0, 256, (3, 8)), jnp.uint8),
        "half": jnp.asarray(rng.standard_normal(5), jnp.bfloat16),
        "key": jax.random.key(0),
    }
    return made | changes


@pytest.mark.parametrize(
    "change",
    [
        lambda t: {"w": t["w"].at[3, 5].set(jnp.nextafter(t["w"][3, 5], 9.0))},
        lambda t: {"w": t["w"][::-1]},
        lambda t: {"w": t["w"][:, ::-1]},
        lambda t: {"w": t["w"].reshape(6, 4)},
        lambda t: {"codes": t["codes"].at[0, 0].add(1)},
        lambda t: {"codes": t["codes"].astype(jnp.int32)},
        lambda t: {"half": -t["half"]},
        lambda t: {"key": jax.random.key(1)},
        lambda t: {"more": jnp.zeros(1)},
    ],
)
def test_digests_differ_when_anything_does(change):
    assert digest_of(tree()) != digest_of(tree() | change(tree()))


def test_digests_do_not_depend_on_devices():
    mesh = jax.make_mesh((2,), ("x",), devices=jax.devices()[:2])
    split = NamedSharding(mesh, PartitionSpec("x"))
    assert digest_of(tree(w=jax.device_put(tree()["w"], split))) == digest_of(tree())


def test_all_that_differs_is_named():
    theirs = {"base": "a", "lora": {"rank": 8, "targets": ["q"]}, "qat": None}
    check_same(theirs | {"lora": {"rank": 8, "targets": ("q",)}}, theirs)
    ours = {"base": "b", "lora": {"rank": 4, "targets": ["q", "v"]}, "qat": None}
    expected = (
        r"lora\.rank is 4, the run has 8; lora\.targets is \['q', 'v'\], the run has "
        r"\['q'\]; use what the run had"
    )
    with pytest.raises(SpecError, match=rf"cannot resume: {expected}"):
        check_same(ours, theirs)
    with pytest.raises(SpecError, match=r"base is 'b', .*another model or another"):
        check_same(theirs | {"base": "b"}, theirs)
    with pytest.raises(SpecError, match=r"lora is None, the run has \{'rank': 8"):
        check_same(theirs | {"lora": None}, theirs)


def test_what_changes_no_number_may_change():
    theirs = {
        "base": "a",
        "optimizer": {"offload": "never", "bits": 8},
        "lora": {"rank": 8, "original": "here"},
        "qat": {"calibration": None},
    }
    ours = theirs | {
        "optimizer": {"offload": "always", "bits": 8},
        "lora": {"rank": 8, "original": "there"},
        "qat": {"calibration": "words.txt"},
    }
    check_same(ours, theirs)
    with pytest.raises(SpecError, match=r"optimizer\.bits is 32, the run has 8"):
        check_same(ours | {"optimizer": {"bits": 32}}, theirs)


def test_lines_behind_the_step_and_torn_ones_are_dropped(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"step": 2}\n{"step": 3}\n{"st')
    lines = JsonLines(path, 2)
    lines.write({"step": 3, "loss": 1.5})
    lines.close()
    found = [json.loads(line) for line in path.read_text().splitlines()]
    assert found == [{"step": 1}, {"step": 2}, {"step": 3, "loss": 1.5}]
