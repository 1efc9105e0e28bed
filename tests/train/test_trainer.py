"""Runs: what they write, and that being stopped or killed changes nothing."""

import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import qjax
from qjax.converters.huggingface import write_checkpoint
from qjax.errors import IntegrityError, MissingExtraError, NonFiniteError, SpecError
from qjax.formats import Int
from qjax.models import ModelConfig, plan
from qjax.recipes import Recipe, Rule
from qjax.train.checkpoints import Checkpoints
from qjax.train.config import Finetune, Log
from qjax.train.data_config import Data
from qjax.train.lora import LoRA
from qjax.train.mesh import Mesh
from qjax.train.optimizers import Optimizer
from qjax.train.qat import QAT
from qjax.train.run import finetune
from qjax.train.run_files import RunFiles
from qjax.train.stops import Stops

CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "vocab_size": 4096,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
    "hidden_act": "silu",
    "bos_token_id": 0,
    "eos_token_id": 0,
}


def random_model(folder, model_path, seed, **changes):
    """Writes a small random model with the bundled tokenizer."""
    rng, config = np.random.default_rng(seed), {**CONFIG, **changes}
    tensors = {
        entry.name: (rng.standard_normal(entry.shape) * 0.2).astype(np.float32)
        for entry in plan(ModelConfig.from_hf(config))
    }
    names = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json")
    write_checkpoint(folder, config, tensors, {n: model_path / n for n in names})
    return folder


@pytest.fixture(scope="module")
def base(tmp_path_factory, model_path):
    """A model in a directory; dense, since packed ones take long to trace."""
    return random_model(tmp_path_factory.mktemp("base") / "model", model_path, 3)


@pytest.fixture(scope="module")
def words(tmp_path_factory):
    path = tmp_path_factory.mktemp("data") / "words.txt"
    path.write_text("The old man looked out over the sea. " * 150, "utf-8")
    return path


@pytest.fixture(scope="module")
def config(words):
    """Six steps with dropout, accumulation, and a checkpoint every second step."""
    return Finetune(
        Data(str(words), context=16, eval_fraction=0.2),
        lora=LoRA(rank=2, dropout=0.1, targets=("q", "down")),
        optimizer=Optimizer(learning_rate=5e-2),
        steps=6,
        batch=2,
        accumulate=2,
        eval_every=3,
        save_every=2,
        log=Log(every=1),
    )


def lines(out):
    return [json.loads(x) for x in (out / "metrics.jsonl").read_text().splitlines()]


def told(out):
    """What two equal runs say alike: all but time and memory."""
    names = ("step", "loss", "grad_norm", "tokens", "learning_rate", "eval_loss")
    return [{k: v for k, v in line.items() if k in names} for line in lines(out)]


def bits(out):
    """The arrays of the newest checkpoint, and the adapter's bytes."""
    checkpoints = Checkpoints(out / "checkpoints")
    saved = checkpoints.newest()
    like = {
        name: jax.random.key(0) if "key" in dtype else jnp.zeros(shape, dtype)
        for name, (dtype, shape) in saved.leaves.items()
    }
    state = checkpoints.load(saved, like)
    state["key"] = jax.random.key_data(state["key"])
    arrays = {name: np.asarray(x).tobytes() for name, x in state.items()}
    adapter = (out / "adapter" / "adapter_model.safetensors").read_bytes()
    return saved.step, saved.run["data"], arrays, adapter


@pytest.fixture(scope="module")
def whole(base, config, tmp_path_factory):
    """A run that nothing interrupts: its directory and result."""
    out = tmp_path_factory.mktemp("whole") / "out"
    model, tokenizer = qjax.load(base)
    result = finetune(model, tokenizer, config, out, base_model="somebody/model")
    return out, result, model


def test_a_run_writes_adapter_metrics_and_report(whole, base):
    out, result, model = whole
    assert result.steps == 6 and result.adapter == str(out / "adapter")
    assert result.interrupted is result.resumed_from is None
    report = json.loads((out / "report.json").read_text())
    needed = {"steps", "final_loss", "seconds", "peak_memory_bytes", "adapter"}
    assert needed <= set(report) and report["final_loss"] == result.final_loss
    assert len(report["modules"]) == 2 and report["config"]["batch"] == 2
    steps = [line for line in lines(out) if "loss" in line]
    evals = [line for line in lines(out) if "eval_loss" in line]
    assert [line["step"] for line in steps] == [1, 2, 3, 4, 5, 6]
    assert [line["step"] for line in evals] == [0, 3, 6]
    assert result.eval_perplexity < result.eval_perplexity_before
    assert steps[-1]["loss"] == result.final_loss < steps[0]["loss"] - 0.1
    assert steps[-1]["mfu"] is None and steps[-1]["peak_memory_bytes"] > 0
    assert result.eval_loss == evals[-1]["eval_loss"]
    assert result.eval_perplexity == pytest.approx(np.exp(result.eval_loss))
    assert result.loss_tokens == sum(line["tokens"] for line in steps)
    settings = json.loads((out / "adapter" / "adapter_config.json").read_text())
    assert settings["base_model_name_or_path"] == "somebody/model"
    # The model itself has the trained adapter, and so has one that reads the file.
    tokens = np.arange(8)[None] + 100
    again, _ = qjax.load(base, adapter=out / "adapter")
    plain, _ = qjax.load(base)
    got, want = again(tokens)[0], model(tokens)[0]
    np.testing.assert_allclose(got, want, atol=1e-4)
    assert np.abs(plain(tokens)[0] - want).max() > 0.01


def test_only_the_newest_checkpoints_are_kept(whole):
    assert Checkpoints(whole[0] / "checkpoints").steps() == [2, 4, 6]


def test_a_signal_saves_and_the_run_continues_bit_for_bit(
    whole, base, config, tmp_path
):
    def interrupt(done, steps, note):
        if done == 3:
            os.kill(os.getpid(), signal.SIGTERM)

    out = tmp_path / "out"
    model, tokenizer = qjax.load(base)
    result = finetune(model, tokenizer, config, out, progress=interrupt)
    assert (result.steps, result.interrupted, result.adapter) == (3, "SIGTERM", None)
    assert Checkpoints(out / "checkpoints").steps() == [2, 3]
    model, tokenizer = qjax.load(base)
    result = finetune(model, tokenizer, config, out, resume=True)
    assert (result.steps, result.resumed_from, result.interrupted) == (6, 3, None)
    assert result.final_loss == whole[1].final_loss
    assert told(out) == told(whole[0]) and bits(out) == bits(whole[0])


@pytest.fixture
def interruptible():
    """SIGINT as in a foreground process; a shell's background jobs ignore it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("interruptible")
def test_the_first_signal_is_a_request_and_the_second_is_not():
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    with Stops() as stops:
        assert not stops.wanted()
        os.kill(os.getpid(), signal.SIGINT)
        assert stops.wanted() and stops.received == "SIGINT"
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
    assert before == (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM))


CHILD = """
import json, os, signal, sys
import jax
import qjax
from qjax.train import checkpoints
from qjax.train.config import finetune_from_dict
from qjax.train.run import finetune
from tests import fast_compiler

base, config, out, write = sys.argv[1:]
jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_numpy_dtype_promotion", "strict")
count, written = 0, checkpoints.write_bytes

def dying(*args, **kwargs):
    global count
    count += 1
    if count == int(write):
        os.kill(os.getpid(), signal.SIGKILL)
    return written(*args, **kwargs)

checkpoints.write_bytes = dying
fast_compiler.install()
finetune(*qjax.load(base), finetune_from_dict(json.loads(config)), out)
"""


def test_a_run_killed_while_it_saves_continues_bit_for_bit(
    whole, base, config, tmp_path, root
):
    out = tmp_path / "out"
    # The fourth file written is the manifest of the second checkpoint.
    arguments = [str(base), json.dumps(config.to_dict()), str(out), "4"]
    command = [sys.executable, "-c", CHILD, *arguments]
    child = subprocess.run(command, cwd=root, check=False)
    assert child.returncode == -signal.SIGKILL
    assert Checkpoints(out / "checkpoints").steps() == [2]
    assert (out / "checkpoints" / ".00000004.partial").exists()
    model, tokenizer = qjax.load(base)
    result = finetune(model, tokenizer, config, out, resume=True)
    assert result.resumed_from == 2
    assert told(out) == told(whole[0]) and bits(out) == bits(whole[0])


def test_a_damaged_checkpoint_is_passed_over_and_told(whole, base, config, tmp_path):
    out = shutil.copytree(whole[0], tmp_path / "out")
    for step in (6, 4):
        path = out / "checkpoints" / f"{step:08d}" / "run.json"
        path.write_bytes(path.read_bytes()[:-2])
    model, tokenizer = qjax.load(base)
    result = finetune(model, tokenizer, config, out, resume=True)
    assert result.resumed_from == 2 and len(result.notes) == 2
    assert "00000006: run.json differs from its digest" in result.notes[0]
    assert told(out) == told(whole[0]) and bits(out) == bits(whole[0])
    for path in (out / "checkpoints").glob("*/run.json"):
        path.unlink()
    with pytest.raises(IntegrityError, match="every checkpoint is damaged"):
        finetune(*qjax.load(base), config, out, resume=True)


def test_a_finished_run_continues_to_its_end(whole, base, config, tmp_path):
    out = shutil.copytree(whole[0], tmp_path / "out")
    shutil.rmtree(out / "adapter")
    result = finetune(*qjax.load(base), config, out, resume=True)
    assert result.resumed_from == 6 and result.final_loss == whole[1].final_loss
    assert told(out) == told(whole[0]) and bits(out) == bits(whole[0])


def test_a_run_continues_on_other_devices(whole, base, config, tmp_path):
    out = shutil.copytree(whole[0], tmp_path / "out")
    shutil.rmtree(out / "checkpoints" / "00000006")
    split = dataclasses.replace(config, mesh=Mesh(data=2))
    result = finetune(*qjax.load(base), split, out, resume=True)
    assert result.resumed_from == 4 and result.steps == 6
    for ours, theirs in zip(told(out), told(whole[0]), strict=True):
        # Devices draw dropout of their own.
        assert ours == pytest.approx(theirs, rel=2e-2)


def changed_data(config, words, tmp_path):
    other = tmp_path / "other.txt"
    other.write_text(words.read_text("utf-8")[:-1], "utf-8")
    return dataclasses.replace(config.data, path=str(other))


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda c, *_: {"batch": 4}, r"rows: got 4, the run has 2 \(rows of a batch"),
        (lambda c, *_: {"accumulate": 1}, "accumulate: got 1, the run has 2"),
        (lambda *a: {"data": changed_data(*a)}, "data: .*files: they have changed"),
        (
            lambda c, *_: {"lora": dataclasses.replace(c.lora, rank=4, alpha=8.0)},
            r"lora\.rank is 4, the run has 2; lora\.alpha is 8.0, the run has 16",
        ),
        (
            lambda c, *_: {"optimizer": Optimizer()},
            r"optimizer\.learning_rate is 0",
        ),
        (lambda c, *_: {"seed": 1}, "seed is 1, the run has 0"),
        (lambda c, *_: {"steps": 9}, r"steps is 9, the run has 6 \(the learning rate"),
    ],
    ids=["batch", "accumulate", "data", "lora", "optimizer", "seed", "steps"],
)
def test_a_run_is_not_continued_as_another(
    change, message, whole, base, config, words, tmp_path
):
    out = shutil.copytree(whole[0], tmp_path / "out")
    changed = dataclasses.replace(config, **change(config, words, tmp_path))
    before = (out / "metrics.jsonl").read_bytes()
    with pytest.raises(SpecError, match=f"(?s)cannot resume.*{message}"):
        finetune(*qjax.load(base), changed, out, resume=True)
    assert (out / "metrics.jsonl").read_bytes() == before


def test_another_base_or_tokenizer_is_refused(
    whole, base, config, tmp_path, model_path
):
    out = shutil.copytree(whole[0], tmp_path / "out")
    other, tokenizer = qjax.load(random_model(tmp_path / "other", model_path, 4))
    with pytest.raises(SpecError, match=r"base is .*another model or another recipe"):
        finetune(other, tokenizer, config, out, resume=True)
    model, tokenizer = qjax.load(base)
    tokenizer.backend.add_tokens(["seafaring"])
    with pytest.raises(SpecError, match=r"tokenizer: .*it is another"):
        finetune(model, tokenizer, config, out, resume=True)


def test_a_loss_that_is_not_finite_ends_the_run(base, config, tmp_path):
    wild = Optimizer(learning_rate=3e38, schedule="constant", warmup=0, clip=None)
    config = dataclasses.replace(config, optimizer=wild, save_every=1)
    message = (
        r"step 2: the loss is (nan|inf).*changed nothing and the checkpoint of step 1"
    )
    with pytest.raises(NonFiniteError, match=message):
        finetune(*qjax.load(base), config, tmp_path / "out")
    assert Checkpoints(tmp_path / "out" / "checkpoints").steps() == [1]
    assert not (tmp_path / "out" / "adapter").exists()


def test_a_base_of_its_own_is_written_with_the_adapter(base, config, tmp_path):
    lora = LoRA(rank=2, targets=("q",), init="pissa")
    changed = dataclasses.replace(config, lora=lora, steps=2)
    model, tokenizer = qjax.load(base)
    result = finetune(model, tokenizer, changed, tmp_path / "out")
    tokens = np.arange(8)[None] + 100
    again, _ = qjax.load(result.model, adapter=result.adapter)
    np.testing.assert_allclose(again(tokens)[0], model(tokens)[0], atol=1e-4)
    settings = json.loads((tmp_path / "out/adapter/adapter_config.json").read_text())
    assert settings["base_model_name_or_path"] == result.model


def test_quantization_aware_training_ends_in_a_packed_model(base, config, tmp_path):
    recipe = Recipe((Rule("*.q.kernel", Int(8, "channel")),), "q8")
    changed = dataclasses.replace(config, lora=None, qat=QAT(recipe), steps=2)
    model, tokenizer = qjax.load(base)
    result = finetune(model, tokenizer, changed, tmp_path / "out")
    assert result.adapter is None and result.model == str(tmp_path / "out" / "model")
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert [one["path"] for one in report["modules"]] == ["layers.0.attn.q.kernel"]
    assert qjax.inspect(result.model)["recipe"] == "q8"
    tokens = np.arange(8)[None] + 100
    again, _ = qjax.load(result.model)
    np.testing.assert_allclose(again(tokens)[0], model(tokens)[0], atol=1e-4)


def test_static_scales_come_from_the_data_or_a_file(base, config, words, tmp_path):
    from qjax.train.data import load_data
    from qjax.train.trained import calibration_of
    from qjax.train.trainer import Trainer

    qat = QAT(Int(8, "channel"), activations="int8", static=True)
    changed = dataclasses.replace(config, lora=None, qat=qat)
    model, tokenizer = qjax.load(base)
    data = load_data(config.data, tokenizer)

    def windows(**changes):
        new = dataclasses.replace(qat, **changes)
        return calibration_of(dataclasses.replace(changed, qat=new), data, tokenizer)

    assert calibration_of(config, data, tokenizer) is None
    held = windows()
    assert held.shape[1] == 16 and 0 < len(held) <= 128
    np.testing.assert_array_equal(held.reshape(-1), data.train.first(held.size))
    ids = tokenizer.encode(words.read_text("utf-8"), add_special_tokens=False)
    np.testing.assert_array_equal(windows(calibration=str(words))[1], ids[16:32])
    with pytest.raises(SpecError, match="calibration: cannot read"):
        windows(calibration=str(tmp_path / "none.txt"))
    trainer = Trainer(model, tokenizer, changed)
    assert trainer.model.layers[0].attn.q.qat.inputs.get_value() > 0
    trainer.close()


def test_steps_follow_from_epochs_and_context_from_the_model(base, config, tmp_path):
    from qjax.train.trainer import Trainer

    by_epochs = dataclasses.replace(config, steps=None, epochs=2.0)
    trainer = Trainer(*qjax.load(base), by_epochs)
    assert trainer.steps == 2 * trainer.batches.steps_per_epoch
    data = dataclasses.replace(config.data, context=65)
    with pytest.raises(SpecError, match=r"data\.context is 65; the model's is 64"):
        Trainer(*qjax.load(base), dataclasses.replace(config, data=data))


def test_a_directory_belongs_to_one_run(tmp_path):
    out = tmp_path / "out"
    with RunFiles(out) as files:
        files.start({"steps": 1})
        with pytest.raises(SpecError, match="another process is training there"):
            with RunFiles(out, resume=True):
                pass
    with pytest.raises(SpecError, match=r"holds a run; continue it \(--resume\)"):
        with RunFiles(out):
            pass
    (out / "adapter").mkdir()
    with RunFiles(out, overwrite=True) as files:
        assert (out / "adapter").exists()  # until the new run starts
        files.start({"steps": 2})
    assert sorted(os.listdir(out)) == [".lock", "finetune.json"]
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "letter.txt").write_text("dear")
    for choice in ({}, {"overwrite": True}, {"resume": True}):
        with pytest.raises(SpecError, match="is not empty and holds no run"):
            with RunFiles(tmp_path / "mine", **choice):
                pass
    with pytest.raises(SpecError, match="cannot be written"):
        with RunFiles(tmp_path / "mine" / "letter.txt" / "out"):
            pass
    with pytest.raises(SpecError, match="resume or overwrite"):
        RunFiles(out, resume=True, overwrite=True)


class FakeWriter:
    def __init__(self, directory):
        self.directory, self.scalars, self.closed = directory, [], False

    def add_scalar(self, name, value, step):
        self.scalars.append((name, value, step))

    def close(self):
        self.closed = True


def test_tensorboard_gets_the_numbers(tmp_path, monkeypatch):
    import types

    from qjax.train.metrics import TensorBoard

    monkeypatch.setitem(sys.modules, "tensorboardX", None)
    with pytest.raises(MissingExtraError, match="pip install tensorboardX"):
        TensorBoard(tmp_path)
    fake = types.SimpleNamespace(SummaryWriter=FakeWriter)
    monkeypatch.setitem(sys.modules, "tensorboardX", fake)
    board = TensorBoard(tmp_path)
    board.write({"step": 3, "loss": 0.5, "mfu": None})
    board.close()
    assert board._writer.scalars == [("loss", 0.5, 3)] and board._writer.closed


def test_weights_and_biases_gets_the_numbers_of_one_run(tmp_path, monkeypatch):
    import types

    from qjax.train.metrics import WeightsAndBiases

    calls = []
    run = types.SimpleNamespace(
        id="abc",
        log=lambda values, step: calls.append((values, step)),
        finish=lambda: calls.append("finish"),
    )
    fake = types.SimpleNamespace(init=lambda **kwargs: calls.append(kwargs) or run)
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(MissingExtraError, match="pip install wandb"):
        WeightsAndBiases("project", tmp_path, {}, False)
    monkeypatch.setitem(sys.modules, "wandb", fake)
    for resumed in (False, True):
        logger = WeightsAndBiases("project", tmp_path, {"steps": 3}, resumed)
    logger.write({"step": 3, "loss": 0.5, "mfu": None})
    logger.close()
    assert [calls[0]["id"], calls[1]["id"]] == [None, "abc"]
    assert calls[2:] == [({"loss": 0.5}, 3), "finish"]


def test_utilization_is_of_the_devices_peak(monkeypatch):
    from qjax.train import metrics

    assert metrics.utilization(1e3, 1e9) is None  # a CPU
    device = type("Device", (), {"device_kind": "TPU v5 lite"})()
    monkeypatch.setattr(jax, "devices", lambda: [device])
    monkeypatch.setattr(jax, "device_count", lambda: 4)
    assert metrics.utilization(1e3, 197e9) == pytest.approx(0.25)


def test_operations_of_a_step_are_those_of_its_products():
    from qjax.train.metrics import flops_per_token

    config = ModelConfig.from_hf(CONFIG)
    attention = 32 * 32 + 32 * 16 * 2 + 32 * 32
    weights = attention + 3 * 32 * 64 + 4096 * 32
    scores = 2 * 2 * 32 * (16 / 2)  # two products, of half a square
    assert flops_per_token(config, 16, frozen=True) == 4 * weights + 3 * scores
    assert flops_per_token(config, 16, frozen=False) == 6 * weights + 3 * scores
