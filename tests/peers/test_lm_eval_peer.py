"""The harness adapter, on a local task and against sums of full forward passes."""

import json

import numpy as np
import pytest

from qjax.evaluate.lm_eval import as_harness_model

pytestmark = pytest.mark.filterwarnings("ignore")

TASK = """
task: local_choice
dataset_path: json
dataset_kwargs:
  data_files: {{test: {path}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: "{{{{answer}}}}"
target_delimiter: " "
metric_list:
  - metric: acc
  - metric: acc_norm
"""
QUESTIONS = [
    ("The captain of the", ["ship", "qqzxv"]),
    ("He sat down at the", ["zzkq vv", "table"]),
    ("She was a very", ["xylqk", "beautiful woman", "of of of of"]),
    ("It was the month of", ["May", "vvrrq"]),
]


@pytest.fixture(scope="module")
def api(tmp_path_factory):
    """lm_eval, kept from the network and from the user's caches."""
    patch = pytest.MonkeyPatch()
    patch.setenv("HF_DATASETS_OFFLINE", "1")
    patch.setenv("HF_HUB_OFFLINE", "1")
    patch.setenv("HF_HOME", str(tmp_path_factory.mktemp("hf")))
    pytest.importorskip("lm_eval")
    from lm_eval.api import instance

    yield instance
    patch.undo()


def request(api, kind, *arguments):
    """Return one request of the harness."""
    return api.Instance(request_type=kind, doc={}, arguments=arguments, idx=0)


def log_probs(model, ids):
    """Return log-probabilities after each token of `ids`, in float64."""
    logits = np.asarray(model(np.array([ids], np.int32))[0][0], np.float64)
    logits -= logits.max(-1, keepdims=True)
    return logits - np.log(np.exp(logits).sum(-1, keepdims=True))


def test_a_local_task(api, model, tokenizer, tmp_path):
    """A multiple-choice task runs end to end, offline."""
    import lm_eval
    from lm_eval.tasks import TaskManager

    docs = [
        {"question": q, "choices": c, "answer": i}
        for (q, c), i in zip(QUESTIONS, (0, 1, 1, 0), strict=True)
    ]
    (tmp_path / "docs.jsonl").write_text("".join(json.dumps(d) + "\n" for d in docs))
    (tmp_path / "local_choice.yaml").write_text(
        TASK.format(path=tmp_path / "docs.jsonl")
    )
    result = lm_eval.simple_evaluate(
        as_harness_model(model, tokenizer, batch=4),
        tasks=["local_choice"],
        task_manager=TaskManager(include_path=str(tmp_path), include_defaults=False),
        bootstrap_iters=0,
    )
    scores = result["results"]["local_choice"]
    assert scores["acc,none"] == 1.0
    assert scores["acc_norm,none"] >= 0.5


def test_scores_do_not_depend_on_batches(api, model, tokenizer):
    """Scores are sums of plain log-probabilities, whatever the neighbours."""
    requests = [
        request(api, "loglikelihood", question, " " + choice)
        for question, choices in QUESTIONS
        for choice in choices
    ]
    requests.append(request(api, "loglikelihood", "", "The"))
    requests.append(request(api, "loglikelihood", "word" + " word" * 300, " word word"))
    results = [
        as_harness_model(model, tokenizer, batch=batch).loglikelihood(
            requests, disable_tqdm=True
        )
        for batch in (1, 5)
    ]
    for one, other in zip(*results, strict=True):
        assert one[0] == pytest.approx(other[0], abs=1e-4)
        assert one[1] == other[1]
    for asked, (score, greedy) in zip(requests, results[0], strict=True):
        context, continuation = asked.args
        start = tokenizer.encode(context) or [0]
        ids = start + tokenizer.encode(continuation)
        rows = log_probs(model, ids)[len(start) - 1 : -1]
        target = ids[len(start) :]
        expected = rows[np.arange(len(target)), target].sum()
        assert score == pytest.approx(expected, abs=1e-3)
        assert greedy == (rows.argmax(-1) == target).all()


def test_long_inputs_keep_their_end(api, model, tokenizer):
    """What exceeds the context is cut from the left."""
    adapter = as_harness_model(model, tokenizer, max_length=16)
    text = "the captain of the ship and the men" * 10
    long = adapter.loglikelihood(
        [request(api, "loglikelihood", text, " were")], disable_tqdm=True
    )[0]
    full = tokenizer.encode(text + " were")[-17:]
    assert long[0] == pytest.approx(log_probs(model, full)[-2, full[-1]], abs=1e-3)


def test_rolling_scores_every_token_once(api, model, tokenizer, books_text):
    """Rolling log-likelihood of a text of one window, and of several."""
    text = books_text[9000:9600]
    ids = [0, *tokenizer.encode(text)]
    rows = log_probs(model, ids)
    expected = rows[np.arange(len(ids) - 1), ids[1:]].sum()
    asked = [request(api, "loglikelihood_rolling", text)]
    adapter = as_harness_model(model, tokenizer)
    assert adapter.loglikelihood_rolling(asked)[0] == pytest.approx(expected, rel=1e-5)
    short = as_harness_model(model, tokenizer, max_length=50)
    assert short.loglikelihood_rolling(asked)[0] < expected  # less context


def test_generate_until(api, model, tokenizer):
    """Continuations end at the task's stop strings."""
    adapter = as_harness_model(model, tokenizer, batch=2)
    settings = {"until": [".", "\n"], "max_gen_toks": 30, "do_sample": False}
    prompts = ["It was the", "Call me", "The captain of the ship"]
    asked = [request(api, "generate_until", p, settings) for p in prompts]
    texts = adapter.generate_until(asked)
    assert all(text and "." not in text and "\n" not in text for text in texts)
    alone = as_harness_model(model, tokenizer, batch=1).generate_until(asked)
    assert texts == alone
