"""Checkpoints: whole or absent, checked byte by byte, bit for bit what was saved."""

import errno
import json
import os
import shutil
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from qjax.errors import IntegrityError, QjaxError, SpecError
from qjax.train import checkpoints as module
from qjax.train.checkpoints import Checkpoints


class State(NamedTuple):
    trainable: dict
    optimizer: tuple
    step: jax.Array
    key: jax.Array


def state(seed, **changes):
    rng = np.random.default_rng(seed)
    made = State(
        {"layers": [{"a": jnp.asarray(rng.standard_normal((3, 4)), jnp.float32)}]},
        (
            jnp.asarray(rng.integers(0, 255, (2, 8)), jnp.uint8),
            jnp.asarray(rng.standard_normal(5), jnp.bfloat16),
            jnp.zeros((0, 4)),
        ),
        jnp.asarray(seed, jnp.int32),
        jax.random.key(seed),
    )
    return made._replace(**changes)


def bits(tree):
    def one(x):
        key = jnp.issubdtype(x.dtype, jax.dtypes.prng_key)
        return np.asarray(jax.random.key_data(x) if key else x).tobytes()

    return [(str(x.dtype), x.shape, one(x)) for x in jax.tree.leaves(tree)]


@pytest.fixture
def folder(tmp_path):
    """Two checkpoints, of steps 1 and 2."""
    with Checkpoints(tmp_path / "c") as checkpoints:
        for step in (1, 2):
            checkpoints.save(step, state(step), {"data": {"at": step}})
    return tmp_path / "c"


def test_everything_comes_back_bit_for_bit(folder):
    checkpoints = Checkpoints(folder)
    saved = checkpoints.newest()
    assert (saved.step, saved.run, saved.skipped) == (2, {"data": {"at": 2}}, ())
    loaded = checkpoints.load(saved, state(0))
    assert bits(loaded) == bits(state(2))
    assert jax.tree.structure(loaded) == jax.tree.structure(state(0))


def test_the_state_may_be_donated_at_once(tmp_path):
    step = jax.jit(lambda x: jax.tree.map(lambda y: y * 0, x), donate_argnums=0)
    big = jnp.arange(1 << 18, dtype=jnp.float32)
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, {"x": big}, {})
        jax.block_until_ready(step({"x": big}))
        checkpoints.wait()
    loaded = checkpoints.load(checkpoints.newest(), {"x": jnp.zeros(1 << 18)})
    np.testing.assert_array_equal(loaded["x"], np.arange(1 << 18, dtype=np.float32))


def test_sharded_arrays_come_back_where_they_are_wanted(tmp_path):
    mesh = jax.make_mesh((4,), ("x",), devices=jax.devices()[:4])
    rows = NamedSharding(mesh, PartitionSpec("x"))
    columns = NamedSharding(mesh, PartitionSpec(None, "x"))
    x = jnp.arange(64, dtype=jnp.float32).reshape(8, 8)
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, {"x": jax.device_put(x, rows)}, {})
    like = {"x": jax.device_put(jnp.zeros((8, 8)), columns)}
    loaded = checkpoints.load(checkpoints.newest(), like)["x"]
    assert loaded.sharding == columns
    np.testing.assert_array_equal(loaded, x)


def test_the_newest_ones_are_kept(tmp_path):
    with Checkpoints(tmp_path, keep=2) as checkpoints:
        for step in (5, 9, 10, 100):
            checkpoints.save(step, state(step), {})
    assert checkpoints.steps() == [10, 100]
    assert sorted(os.listdir(tmp_path)) == ["00000010", "00000100"]


def test_at_every_instant_of_a_save_the_last_checkpoint_is_whole(folder, monkeypatch):
    """Copies the directory before every change of it: what a kill would leave."""
    instants = []

    def watch(owner, name):
        function = getattr(owner, name)

        def call(*args, **kwargs):
            copy = folder.with_name(f"instant-{len(instants)}")
            instants.append(copy)
            shutil.copytree(folder, copy)
            return function(*args, **kwargs)

        monkeypatch.setattr(owner, name, call)

    for owner, name in [
        *[(module, "write_bytes"), (module, "sha256_file"), (module, "sync_tree")],
        *[(module.os, "replace"), (module.shutil, "rmtree")],
    ]:
        watch(owner, name)
    with Checkpoints(folder, keep=2) as checkpoints:
        checkpoints.save(3, state(3), {"data": {"at": 3}})
    monkeypatch.undo()
    seen = set()
    for copy in instants:
        again = Checkpoints(copy)
        saved = again.newest()
        assert saved.skipped == () and saved.run == {"data": {"at": saved.step}}
        assert bits(again.load(saved, state(0))) == bits(state(saved.step))
        seen.add(saved.step)
    assert seen == {2, 3} and len(instants) > 10
    with again:  # what was left over is gone after the next save
        again.save(4, state(4), {})
    assert not [n for n in os.listdir(again.directory) if n.startswith(".")]


@pytest.mark.parametrize("damage", ["byte", "missing", "extra", "manifest", "run"])
def test_a_damaged_checkpoint_is_passed_over(folder, damage):
    newest = folder / "00000002"
    data = max((f for f in newest.rglob("*") if f.is_file()), key=lambda f: len(f.name))
    if damage == "byte":
        data.write_bytes(data.read_bytes()[:-1] + b"!")
    elif damage == "missing":
        data.unlink()
    elif damage == "extra":
        (newest / "state" / "more").write_bytes(b"")
    elif damage == "manifest":
        (newest / "manifest.json").write_text("{")
    else:
        (newest / "run.json").write_text(json.dumps({"version": 1, "step": 2}))
    checkpoints = Checkpoints(folder)
    saved = checkpoints.newest()
    assert saved.step == 1 and len(saved.skipped) == 1
    assert "00000002" in saved.skipped[0]
    assert bits(checkpoints.load(saved, state(0))) == bits(state(1))
    with checkpoints:  # and is replaced when training gets there again
        checkpoints.save(2, state(7), {})
    saved = checkpoints.newest()
    assert saved.step == 2 and saved.skipped == ()
    assert bits(checkpoints.load(saved, state(0))) == bits(state(7))


def test_when_all_are_damaged_it_says_so(folder):
    for name in ("00000001", "00000002"):
        (folder / name / "run.json").write_text("{}")
    with pytest.raises(IntegrityError, match=r"every checkpoint is damaged.*run.json"):
        Checkpoints(folder).newest()
    assert Checkpoints(folder / "none").newest() is None


def test_other_arrays_are_refused_by_name(folder):
    checkpoints = Checkpoints(folder)
    saved = checkpoints.newest()
    wide = {"layers": [{"a": jnp.zeros((3, 8))}]}
    with pytest.raises(SpecError, match=r"a is float32\[3, 4\] in the .*\[3, 8\]"):
        checkpoints.load(saved, state(0, trainable=wide))
    # Orbax would cast without a word.
    half = {"layers": [{"a": jnp.zeros((3, 4), jnp.bfloat16)}]}
    with pytest.raises(SpecError, match=r"float32\[3, 4\] in .* bfloat16\[3, 4\]"):
        checkpoints.load(saved, state(0, trainable=half))
    with pytest.raises(SpecError, match="b is absent in the checkpoint, float32"):
        more = {"layers": [{"a": jnp.zeros((3, 4)), "b": jnp.zeros(3)}]}
        checkpoints.load(saved, state(0, trainable=more))


def test_a_full_disk_keeps_what_was_there(folder, monkeypatch):
    def full(*args, **kwargs):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(module, "write_bytes", full)
    with Checkpoints(folder) as checkpoints:
        checkpoints.save(3, state(3), {})
        with pytest.raises(QjaxError, match=r"00000003: .*No space left.*is intact"):
            checkpoints.wait()
    assert checkpoints.newest().step == 2


def test_keep_is_positive(tmp_path):
    with pytest.raises(SpecError, match="keep is 0"):
        Checkpoints(tmp_path, keep=0)
