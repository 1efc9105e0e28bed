"""Files to batches: the same every time, on every host, and across a restart."""

import itertools
import json
import sys

import jax
import numpy as np
import pytest

from qjax.errors import FormatError, MissingExtraError, SpecError
from qjax.models import Decoder, ModelConfig, from_hf, plan
from qjax.text import Tokenizer, load_tokenizer
from qjax.train.data import Data, load_data, make_batches, make_eval_batches
from qjax.train.loss import token_losses
from tests.byte_tokenizer import CONFIG, make_backend

TOKENIZER = Tokenizer(make_backend(), config=CONFIG)


@pytest.fixture
def path(tmp_path):
    """20 samples of 4 to 11 bytes, each of one letter."""
    file = tmp_path / "a.jsonl"
    lines = [json.dumps({"text": chr(97 + n) * (4 + n % 8)}) for n in range(20)]
    file.write_text("\n".join(lines))
    return str(file)


def take(batches, count):
    found = list(itertools.islice(batches, count))
    batches.close()
    return found


def same(one, other):
    return all(np.array_equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("pack", [False, True])
def test_an_epoch_has_every_sample_once(path, pack, workers):
    """Shapes and dtypes are a step's; weights count each token to learn once."""
    config = Data(path, context=16, pack=pack, workers=workers)
    batches = make_batches(config, TOKENIZER, rows=1, accumulate=2)
    report = batches.report
    assert report.rows < 20 if pack else report.rows == 20
    assert batches.steps_per_epoch == -(-report.rows // 2)
    rows = [
        {name: array[m, 0] for name, array in batch.items()}
        for batch in take(batches, report.rows)  # two epochs
        for m in range(2)
    ]
    assert {row["tokens"].dtype for row in rows} == {np.dtype(np.int32)}
    for epoch in (rows[: report.rows], rows[report.rows :]):
        targets = np.concatenate([r["targets"][r["weights"] > 0] for r in epoch])
        letters = TOKENIZER.decode(sorted(targets), skip_special_tokens=True)
        assert letters == "".join(chr(97 + n) * (3 + n % 8) for n in range(20))
    order = [row["tokens"].tolist() for row in rows]
    one, two = order[: report.rows], order[report.rows :]
    assert one != two and sorted(one) == sorted(two)
    assert report.tokens == batches.tokens_per_epoch == len(targets)
    assert report.fill == report.tokens / (16 * report.rows)


def test_the_order_is_that_of_earlier_versions(path):
    """A run that a later version resumes must see the rows it would have seen."""
    config = Data(path, context=16, pack=False, seed=3)
    batches = take(make_batches(config, TOKENIZER, rows=20), 2)
    order = [TOKENIZER.decode(b["tokens"][0, :, 0]) for b in batches]
    assert order == ["erqhfdstpacnoilkjgbm", "obphnkqecmlagridsjtf"]
    plain = Data(path, context=16, pack=False, shuffle=False)
    (batch,) = take(make_batches(plain, TOKENIZER, rows=20), 1)
    assert TOKENIZER.decode(batch["tokens"][0, :, 0]) == "abcdefghijklmnopqrst"


@pytest.mark.parametrize("workers", [0, 1])
def test_resume(path, workers):
    """From a state through JSON, batches are those of the run, across epochs."""
    config = Data(path, context=16, workers=workers)
    run = make_batches(config, TOKENIZER, rows=2, accumulate=2)
    for _ in range(3):
        next(run)
    state = json.loads(json.dumps(run.get_state()))
    assert state["step"] == 3 and len(json.dumps(state)) < 1000
    expected = take(run, 9)
    other = make_batches(config, TOKENIZER, rows=2, accumulate=2)
    next(other)
    other.set_state(state)
    assert other.get_state() == state
    assert all(itertools.starmap(same, zip(expected, take(other, 9), strict=True)))


def test_resume_on_other_hosts(path):
    """A state does not depend on how many hosts there are."""
    config = Data(path, context=16)
    run = make_batches(config, TOKENIZER, rows=4)
    next(run)
    state = run.get_state()
    (expected,) = take(run, 1)
    parts = []
    for index in range(2):
        half = make_batches(config, TOKENIZER, rows=4, process=(index, 2))
        half.set_state(state)
        parts += take(half, 1)
    joined = {n: np.concatenate([p[n] for p in parts], axis=1) for n in expected}
    assert same(joined, expected)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"rows": 4}, "rows: got 4, the run has 2"),
        ({"accumulate": 3}, "accumulate: got 3, the run has 1"),
        ({"context": 32}, "context: got 32, the run has 16"),
        ({"seed": 1}, "seed: got 1, the run has 0"),
        ({"pack": False}, "pack: got False, the run has True"),
        ({"eval_fraction": 0.2}, "eval_fraction: got 0.2, the run has 0.0"),
        ({"line": '{"text": "new"}'}, r"data: got '\w+', .*files: they have changed"),
        ({"bos": True}, r"tokenizer: got '\w+', the run has '\w+' .*it is another"),
        ({"template": "chatml"}, r"template: got '\w+'"),
    ],
)
def test_resume_with_other_settings_is_refused(path, changed, message):
    """The message names what differs, and not its consequences."""
    config = Data(path, context=16, workers=0)
    state = make_batches(config, TOKENIZER, rows=2).get_state()
    changed = dict(changed)
    if "line" in changed:
        with open(path, "a") as file:
            file.write("\n" + changed.pop("line"))
    tokenizer = TOKENIZER
    if changed.pop("bos", False):
        tokenizer = Tokenizer(make_backend(bos=True), config=CONFIG)
    shape = {
        name: changed.pop(name) for name in ("rows", "accumulate") & changed.keys()
    }
    config = Data(path, **{"context": 16, "workers": 0, **changed})
    batches = make_batches(config, tokenizer, **{"rows": 2, **shape})
    with pytest.raises(SpecError, match=f"cannot resume.*: {message}") as caught:
        batches.set_state(state)
    assert "tokens:" not in str(caught.value) and batches.step == 0


def test_other_tokens_from_the_same_files_are_refused(path):
    """As when another version of a package tokenizes differently."""
    config = Data(path, context=16, workers=0)
    batches = make_batches(config, TOKENIZER, rows=2)
    loaded = load_data(config, TOKENIZER)
    loaded.settings["tokens"] = "0" * 64
    with pytest.raises(SpecError, match="another version of a package made them"):
        batches.set_state(loaded.batches(rows=2).get_state())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (None, "expected what get_state returned"),
        ({"format": 2}, "expected what get_state returned"),
        ({"step": -1}, "step is -1"),
        ({"step": True}, "step is True"),
        ({"step": 2**70}, "step is "),
        ({"settings": []}, "it is damaged"),
        ({"fingerprint": "0"}, "it is damaged"),
    ],
)
def test_damaged_states(path, change, message):
    batches = make_batches(Data(path, context=16, workers=0), TOKENIZER, rows=2)
    state = None if change is None else batches.get_state() | change
    with pytest.raises(FormatError, match=f"data state: .*{message}"):
        batches.set_state(state)


@pytest.mark.parametrize("count", [1, 2])
def test_evaluation(path, count):
    """Every sample once, in the same order each time, the last batch filled up."""
    config = Data(path, eval_path=path, context=16)
    parts = [
        make_eval_batches(config, TOKENIZER, rows=4, process=(index, count))
        for index in range(count)
    ]
    rows = load_data(config, TOKENIZER).report.rows
    assert {len(part) for part in parts} == {-(-rows // 4)} and rows % 4
    batches = [
        {name: np.concatenate([p[name] for p in own], axis=1) for name in own[0]}
        for own in zip(*parts, strict=True)
    ]
    assert all(batch["tokens"].shape == (1, 4, 16) for batch in batches)
    targets = np.concatenate([b["targets"][b["weights"] > 0] for b in batches])
    letters = TOKENIZER.decode(sorted(targets))
    assert letters == "".join(chr(97 + n) * (3 + n % 8) for n in range(20))
    assert len(targets) == parts[0].learned == parts[0].tokens
    assert all(itertools.starmap(same, zip(parts[0], parts[0], strict=True)))


def test_evaluation_on_a_part(path):
    """Samples are trained on or evaluated on, never both."""
    loaded = load_data(Data(path, context=16, eval_fraction=0.3), TOKENIZER)
    report = loaded.report
    assert report.samples + report.eval_samples == 20 and report.eval_samples
    held = [b["tokens"][b["segments"] > 0] for b in loaded.eval_batches(rows=2)]
    seen = take(loaded.batches(rows=report.rows), 1)[0]["tokens"]
    assert not np.intersect1d(np.concatenate(held), seen[seen != 257]).size
    assert make_eval_batches(Data(path, context=16), TOKENIZER, rows=2) is None


def test_report(tmp_path, path):
    """Files, layouts, counts and notes, as JSON; progress is told."""
    text = tmp_path / "b.txt"
    text.write_text("x" * 40)
    seen = []
    config = Data((path, str(text)), context=8, too_long="truncate")
    report = load_data(config, TOKENIZER, seen.append).report
    assert [(f["kind"], f["layout"], f["records"]) for f in report.files] == [
        ("jsonl", "text", 20),
        ("text", "document", 1),
    ]
    assert report.samples == 25 and report.truncated == 6 and seen == [21]
    assert json.loads(json.dumps(report.to_dict()))["notes"] == []
    endless = load_data(Data(path, context=16), Tokenizer(make_backend())).report
    assert "will not learn to stop" in endless.notes[0]


def test_refused_sets(tmp_path, path):
    """Samples too long, or none left."""
    with pytest.raises(SpecError, match=r"a\.jsonl:8: the sample takes 11 tokens"):
        load_data(Data(path, context=8), TOKENIZER)
    with pytest.raises(SpecError, match="all 20 samples are longer than context=2"):
        load_data(Data(path, context=2, too_long="drop"), TOKENIZER)
    with pytest.raises(SpecError, match=r"eval_fraction=0\.001 leaves no sample"):
        load_data(Data(path, context=16, eval_fraction=0.001), TOKENIZER)
    (tmp_path / "empty.jsonl").write_text("")
    with pytest.raises(FormatError, match=r"empty\.jsonl: holds no records"):
        load_data(Data(str(tmp_path / "empty.jsonl")), TOKENIZER)


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ({"rows": 0}, "rows is 0"),
        ({"rows": 2, "accumulate": 0}, "accumulate is 0"),
        ({"rows": 3, "process": (0, 2)}, "3 rows do not divide among 2 processes"),
        ({"rows": 2, "process": (2, 2)}, "process index is 2 of 2"),
    ],
)
def test_refused_shapes(path, shape, message):
    with pytest.raises(SpecError, match=message):
        make_batches(Data(path, context=16), TOKENIZER, **shape)


def test_grain_is_needed(path, monkeypatch):
    monkeypatch.setitem(sys.modules, "grain", None)
    with pytest.raises(MissingExtraError, match=r'pip install "qjax-llm\[train\]"'):
        make_batches(Data(path, context=16), TOKENIZER, rows=1)


def test_packed_samples_do_not_see_each_other(path):
    """The loss of packed rows is the sum over samples in rows of their own."""
    config = ModelConfig.from_hf(
        {
            "model_type": "llama",
            "vocab_size": 258,
            "hidden_size": 16,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "intermediate_size": 16,
            "max_position_embeddings": 64,
        }
    )
    draw = np.random.default_rng(0).standard_normal
    tensors = {e.name: draw(e.shape).astype("f4") for e in plan(config)}
    model = Decoder(config, from_hf(config, tensors))

    @jax.jit
    def loss(batch):
        options = {name: batch[name] for name in ("positions", "segments")}
        hidden, _ = model.hidden(batch["tokens"], **options)
        return token_losses(model.logits(hidden), batch["targets"])

    losses = {}
    for pack in (True, False):
        data = load_data(Data(path, context=32, pack=pack), TOKENIZER)
        rows = data.report.rows
        (batch,) = take(data.batches(rows=rows), 1)
        found = loss({name: array[0] for name, array in batch.items()})
        counted = batch["weights"][0] > 0
        losses[pack] = sorted(
            zip(batch["tokens"][0][counted], np.asarray(found)[counted], strict=True)
        )
    np.testing.assert_allclose(losses[True], losses[False], rtol=1e-4, atol=1e-4)
    assert len(losses[True]) == data.report.learned


def test_bundled_instructions(root, model_path):
    """The example's set fits the bundled model: one file, answers with an end."""
    path = str(root / "examples" / "data" / "instructions.jsonl")
    tokenizer = load_tokenizer(model_path)
    report = load_data(Data(path, context=256), tokenizer).report
    assert 150 <= report.samples <= 300 and not report.notes
    assert report.files[0]["layout"] == "instruction" and report.fill > 0.9
