"""Starts `qjax` on every host of a cluster: `python launch.py finetune MODEL ...`.

Each host runs the same command. Before it does anything else, this script joins the
processes into one JAX program, however they were started:

    Slurm, Open MPI             found by JAX itself (one task per host, or per GPU)
    Cloud TPU, TPUs on GKE      found by JAX itself
    JobSet and other launchers  JAX_COORDINATOR_IP, JAX_COORDINATOR_PORT, NNODES,
                                NODE_RANK
    SkyPilot                    SKYPILOT_NODE_IPS, SKYPILOT_NUM_NODES,
                                SKYPILOT_NODE_RANK
    Ray Train                   joined already; see ray_train.py
    Pathways                    one process sees all devices; nothing to join
    one host                    nothing to join
"""

import importlib.util
import os
import sys
from collections.abc import Mapping

import jax

from qjax.cli.main import main

PORT = 8476


def arguments_of(env: Mapping[str, str]) -> dict | None:
    """What `jax.distributed.initialize` takes here; None for one process alone."""
    if "proxy" in env.get("JAX_PLATFORMS", ""):  # Pathways
        return None
    if "JAX_COORDINATOR_IP" in env:
        port = env.get("JAX_COORDINATOR_PORT", str(PORT))
        return {
            "coordinator_address": f"{env['JAX_COORDINATOR_IP']}:{port}",
            "num_processes": int(env["NNODES"]),
            "process_id": int(env["NODE_RANK"]),
        }
    if "SKYPILOT_NODE_IPS" in env:
        first = env["SKYPILOT_NODE_IPS"].split()[0]
        return {
            "coordinator_address": f"{first}:{PORT}",
            "num_processes": int(env["SKYPILOT_NUM_NODES"]),
            "process_id": int(env["SKYPILOT_NODE_RANK"]),
        }
    many = int(env.get("SLURM_NTASKS", env.get("OMPI_COMM_WORLD_SIZE", "1"))) > 1
    tpu = any(name.startswith(("TPU_WORKER", "MEGASCALE")) for name in env)
    return {} if many or tpu or on_tpu_vm() else None


def on_tpu_vm() -> bool:
    """Whether this is a Cloud TPU's host, which no variable says."""
    return importlib.util.find_spec("libtpu") is not None and (
        os.path.exists("/dev/accel0") or os.path.exists("/dev/vfio/0")
    )


def join(env: Mapping[str, str] = os.environ) -> None:
    """Joins the processes of a run, once."""
    arguments = arguments_of(env)
    if arguments is not None and not jax.distributed.is_initialized():
        jax.distributed.initialize(**arguments)


if __name__ == "__main__":
    join()
    sys.exit(main())
