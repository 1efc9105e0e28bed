"""Ray Train: `python ray_train.py finetune MODEL ...` on the head of a Ray cluster.

`JaxTrainer` starts one worker per TPU host and joins them before the function runs, so
the function must not join again. Set the slice with TPU_TYPE and TPU_TOPOLOGY and
the number of its hosts with TPU_HOSTS.
"""

import os
import sys

from ray.train import ScalingConfig
from ray.train.v2.jax import JaxTrainer


def run(config: dict) -> None:
    """What every host does."""
    from qjax.cli.main import main

    status = main(config["arguments"])
    if status:
        raise RuntimeError(f"qjax ended with status {status}")


if __name__ == "__main__":
    JaxTrainer(
        run,
        train_loop_config={"arguments": sys.argv[1:]},
        scaling_config=ScalingConfig(
            use_tpu=True,
            accelerator_type=os.environ.get("TPU_TYPE", "TPU-V6E"),
            topology=os.environ.get("TPU_TOPOLOGY", "4x4"),
            num_workers=int(os.environ.get("TPU_HOSTS", "4")),
        ),
    ).fit()
