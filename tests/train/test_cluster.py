"""The recipes in `examples/cluster`: what is joined where, and that files are whole."""

import importlib.util
import json
import re
import subprocess
from pathlib import Path

import jax
import pytest

from qjax.train.config import load_finetune
from qjax.train.mesh import Mesh


@pytest.fixture
def folder(root):
    return root / "examples" / "cluster"


@pytest.fixture
def launch(folder):
    spec = importlib.util.spec_from_file_location("launch", folder / "launch.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(
    ("env", "arguments"),
    [
        ({}, None),
        ({"SLURM_NTASKS": "1"}, None),
        ({"SLURM_NTASKS": "4", "SLURM_PROCID": "2"}, {}),
        ({"OMPI_COMM_WORLD_SIZE": "2"}, {}),
        ({"TPU_WORKER_HOSTNAMES": "a,b", "TPU_WORKER_ID": "1"}, {}),
        ({"JAX_PLATFORMS": "proxy,cpu", "TPU_WORKER_ID": "0"}, None),
        (
            {"JAX_COORDINATOR_IP": "10.0.0.1", "NNODES": "4", "NODE_RANK": "3"},
            {
                "coordinator_address": "10.0.0.1:8476",
                "num_processes": 4,
                "process_id": 3,
            },
        ),
        (
            {
                "SKYPILOT_NODE_IPS": "10.0.0.1\n10.0.0.2",
                "SKYPILOT_NUM_NODES": "2",
                "SKYPILOT_NODE_RANK": "1",
            },
            {
                "coordinator_address": "10.0.0.1:8476",
                "num_processes": 2,
                "process_id": 1,
            },
        ),
    ],
)
def test_who_joins(launch, monkeypatch, env, arguments):
    monkeypatch.setattr(launch, "on_tpu_vm", lambda: False)
    assert launch.arguments_of(env) == arguments
    called = []
    monkeypatch.setattr(jax.distributed, "initialize", lambda **kw: called.append(kw))
    launch.join(env)
    assert called == ([] if arguments is None else [arguments])
    called.clear()
    monkeypatch.setattr(jax.distributed, "is_initialized", lambda: True)
    launch.join(env)
    assert not called  # Ray joined already


def test_the_recipe_of_70b_is_a_run(folder):
    run = load_finetune(folder / "llama-3-70b.json")
    assert run.mesh == Mesh(fsdp=-1) and run.lora.rank == 64
    readme = (folder / "README.md").read_text("utf-8")
    assert f"--batch {run.batch} --lora.rank {run.lora.rank}" in readme


def test_scripts_are_whole(folder):
    readme = (folder / "README.md").read_text("utf-8")
    for file in filter(Path.is_file, folder.iterdir()):
        assert f"`{file.name}`" in readme or file.name == "README.md"
        if file.suffix in (".sh", ".sbatch"):
            subprocess.run(["bash", "-n", str(file)], check=True)
        if file.suffix == ".py":
            compile(file.read_text("utf-8"), file.name, "exec")
    options = re.findall(r"--[a-z.]+", (folder / "slurm.sbatch").read_text("utf-8"))
    known = {"--data", "--to", "--resume", "--mesh.fsdp", "--batch", "--data.context"}
    assert known <= set(options)
    assert json.loads((folder / "llama-3-70b.json").read_text())["data"]["path"]
