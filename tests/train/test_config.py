"""The settings of a run: JSON in and out, and what is refused."""

import json

import pytest

from qjax.errors import FormatError, SpecError
from qjax.recipes import preset
from qjax.train.config import Finetune, Log, finetune_from_dict, load_finetune
from qjax.train.data_config import Data
from qjax.train.lora import LoRA
from qjax.train.mesh import Mesh
from qjax.train.optimizers import Optimizer
from qjax.train.qat import QAT

DATA = Data("words.txt")


@pytest.mark.parametrize(
    "config",
    [
        Finetune(DATA),
        Finetune(
            Data(("a.jsonl", "b.jsonl"), context=64),
            lora=LoRA(rank=4, targets=("q", "v"), rank_pattern={"layers.0.attn.q": 8}),
            optimizer=Optimizer(learning_rate=1e-3, schedule="cosine", clip=None),
            mesh=Mesh(fsdp=-1),
            steps=7,
            log=Log(every=1, wandb="project"),
        ),
        Finetune(DATA, qat=QAT("int4-g32", lora=LoRA(rank=2)), epochs=0.5),
        Finetune(DATA, qat=QAT(preset("int3-g64"))),
    ],
)
def test_json_there_and_back(config, tmp_path):
    path = tmp_path / "config.json"
    path.write_text(json.dumps(config.to_dict()))
    assert load_finetune(path) == config


def test_what_is_left_out_has_its_default():
    made = finetune_from_dict({"data": {"path": "words.txt"}, "lora": {"rank": 2}})
    assert made == Finetune(DATA, lora=LoRA(rank=2))
    assert finetune_from_dict({"data": {"path": "words.txt"}, "qat": {}}).lora is None
    assert Finetune(DATA).lora == LoRA() and Finetune(DATA, qat=QAT()).lora is None


@pytest.mark.parametrize(
    "spec, message",
    [
        (
            {"setps": 3},
            r"where: unknown key setps; did you mean steps or epochs\? known: da",
        ),
        ({"lora": {"rang": 3}}, r"unknown key lora\.rang; did you mean rank"),
        ({"lora": {"rank": "8"}}, r"lora\.rank is '8'; expected an integer"),
        ({"lora": {"targets": [1]}}, r"lora\.targets is \(1,\); expected .* a list"),
        ({"lora": 3}, r"where: lora: expected an object, got 3"),
        (
            {"optimizer": {"learning_rate": True}},
            "learning_rate is True; expected a",
        ),
        ({"qat": {"recipe": {"rules": 3}}}, r"qat\.recipe.*rules"),
        ({"data": {}}, r"data\.path is missing"),
        ({"steps": 0}, "steps is 0; expected an integer from 1 on"),
        ({"steps": 2.5}, "steps is 2.5; expected an integer or null"),
        ({"steps": 3, "epochs": 1}, "steps or epochs, not both"),
        ({"epochs": 0}, "epochs is 0.0; expected more than 0"),
        ({"batch": 0}, "batch is 0; expected an integer from 1 on"),
        ({"accumulate": -1}, "accumulate is -1"),
        ({"keep": 0}, "keep is 0"),
        ({"eval_every": 0}, "eval_every is 0"),
        ({"save_every": 0}, "save_every is 0"),
        ({"loss_chunk": 0}, "loss_chunk is 0"),
        ({"seed": -1}, "seed is -1"),
        ({"log": {"every": 0}}, r"log\.every is 0"),
        ({"remat": "all"}, "remat is 'all'; expected one of none, products"),
        (
            {"optimizer": {"learning_rate": 0.0}},
            r"where: optimizer: learning_rate.*0\.0",
        ),
        ({"optimizer": {"learning_rate": -1e-4}}, r"learning_rate.*-0\.0001"),
        ({"lora": {}, "qat": {}}, r"lora and qat are both given.*qat\.lora"),
    ],
)
def test_bad_settings_are_named(spec, message):
    with pytest.raises(SpecError, match=message):
        finetune_from_dict({"data": {"path": "words.txt"}, **spec}, "where")


def test_bad_files_are_refused(tmp_path):
    with pytest.raises(SpecError, match="no such file"):
        load_finetune(tmp_path / "none.json")
    (tmp_path / "odd.json").write_text("[]")
    with pytest.raises(FormatError, match="expected a JSON object"):
        load_finetune(tmp_path / "odd.json")
