"""Generation on a tiny model: against full forward passes, and its promises."""

import jax
import jax.monitoring
import jax.numpy as jnp
import numpy as np
import pytest
import tokenizers
from flax import nnx
from tokenizers import decoders, models, pre_tokenizers

from qjax import decoding
from qjax.errors import SpecError
from qjax.formats import Int
from qjax.generate import generate, generate_detailed
from qjax.methods import quantize
from qjax.models import Decoder, ModelConfig, param_shapes
from qjax.ops import prepack
from qjax.text import Tokenizer

CONTEXT = 160
PROMPTS = ["a", "bcd " * 10, "hello", "x" * 33]


def make_tokenizer(**config):
    """Return a tokenizer of single bytes."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {token: index for index, token in enumerate(alphabet)}
    backend = tokenizers.Tokenizer(models.BPE(vocab=vocab, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(["<s>", "</s>"])
    return Tokenizer(backend, config={"bos_token": "<s>", **config})


LLAMA = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 258,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": CONTEXT,
    "rms_norm_eps": 1e-5,
    "hidden_act": "silu",
}
GPT2 = {
    "architectures": ["GPT2LMHeadModel"],
    "model_type": "gpt2",
    "vocab_size": 258,
    "n_embd": 32,
    "n_layer": 2,
    "n_head": 4,
    "n_positions": 72,
    "activation_function": "gelu_new",
    "layer_norm_epsilon": 1e-5,
}


def make_model(data):
    """Return a random model with logits spread widely enough to have clear winners."""
    config = ModelConfig.from_hf(data)
    rng = np.random.default_rng(0)
    params = {
        name: jnp.asarray(rng.normal(size=shape) * 0.3, jnp.float32)
        for name, shape in param_shapes(config).items()
    }
    return Decoder(config, params)


@pytest.fixture(scope="module")
def model():
    """A random Llama."""
    return make_model(LLAMA)


@pytest.fixture(scope="module")
def tokenizer():
    """Bytes, with nothing added."""
    return make_tokenizer()


def slowly(model):
    """Return greedy continuation by a full forward pass per token, without a cache."""
    forward = jax.jit(lambda tokens: model(tokens)[0])
    context = model.config.max_context

    def run(ids, count, penalty=1.0):
        ids, start = list(ids), len(ids)
        for _ in range(count):
            row = np.zeros((1, context), np.int32)
            row[0, : len(ids)] = ids
            logits = np.array(forward(row)[0, len(ids) - 1])
            for token in set(ids):
                value = logits[token]
                logits[token] = value * penalty if value < 0 else value / penalty
            ids.append(int(logits.argmax()))
        return ids[start:]

    return run


@pytest.fixture(scope="module")
def continue_slowly(model):
    """Greedy continuation of the Llama, the slow way."""
    return slowly(model)


@pytest.mark.parametrize("penalty", [1.0, 1.5])
def test_greedy_equals_full_forward_passes(model, tokenizer, continue_slowly, penalty):
    """Cache, padding, chunks and buckets change nothing, in any batch."""
    together = generate_detailed(
        model, tokenizer, PROMPTS, 40, repetition_penalty=penalty
    )
    for prompt, result in zip(PROMPTS, together, strict=True):
        expected = continue_slowly(tokenizer.encode(prompt), 40, penalty)
        assert result.tokens == expected
        assert result.finish_reason == "length"
        assert result.prompt_tokens == len(prompt)
        assert result.prefill_tokens_per_second > 0
        assert result.decode_tokens_per_second > 0
    alone = generate_detailed(
        model, tokenizer, PROMPTS[1:2], 40, repetition_penalty=penalty
    )
    assert alone[0].tokens == together[1].tokens


@pytest.mark.parametrize("data", [LLAMA, GPT2], ids=["untied", "tied"])
def test_prepacked_weights_and_a_quantized_embedding(data, tokenizer):
    model = make_model(data)
    params = {
        name: quantize(leaf, Int(8, 16), axis=-1 if name.startswith("embed.") else -2)
        if name.startswith("embed.") or name.endswith(".kernel")
        else leaf
        for name, leaf in model.params().items()
    }
    packed = Decoder(model.config, params)
    expected = generate(packed, tokenizer, PROMPTS, 8)
    assert generate(prepack(packed), tokenizer, PROMPTS, 8) == expected


def test_one_compilation_per_batch_and_bucket(model, tokenizer):
    """Two programs per shape; no length, setting or callback compiles another."""
    decoding._compile.cache_clear()
    compiled = []

    def listen(event, duration, **_):
        if event == "/jax/core/compile/backend_compile_duration":
            compiled.append(event)

    jax.monitoring.register_event_duration_secs_listener(listen)
    generate(model, tokenizer, "ab", 20)
    assert len(compiled) == 2
    generate(model, tokenizer, "longer prompt", 45, temperature=0.7, top_k=5)
    generate(model, tokenizer, "c", 3, top_p=0.5, min_p=0.1, temperature=2.0, seed=9)
    generate(model, tokenizer, "d", 9, repetition_penalty=1.2, stop=["zz", "q"])
    generate(model, tokenizer, "e", 9, callback=lambda text, row: None)
    assert len(compiled) == 2
    generate(model, tokenizer, "ab", 80)  # the next bucket
    assert len(compiled) == 4
    generate(model, tokenizer, ["ab", "c"], 20)  # another batch
    assert len(compiled) == 6


@pytest.mark.parametrize(
    ("tokens", "bucket"),
    [(1, 64), (64, 64), (65, 128), (1024, 1024), (1025, 2048), (2049, 3072)],
)
def test_cache_buckets(tokens, bucket):
    """Powers of two, then multiples of 1024, within the context."""
    assert decoding.cache_bucket(tokens, 10_000) == bucket
    assert decoding.cache_bucket(tokens, tokens + 1) == min(bucket, tokens + 1)


def test_a_seed_fixes_each_row(model, tokenizer):
    """The same seed gives the same text, whatever else is in the batch."""
    options = {"max_tokens": 20, "temperature": 1.5}
    first = generate(model, tokenizer, ["ab"] * 3, seed=7, **options)
    assert first == generate(model, tokenizer, ["ab"] * 3, seed=7, **options)
    assert len(set(first)) == 3
    assert first[1] == generate(model, tokenizer, "ab", seed=8, **options)
    mixed = generate(
        model, tokenizer, ["zzzz", "ab"], seed=[0, 9], top_k=[3, 0], **options
    )
    assert mixed[1] == first[2]
    with pytest.raises(SpecError, match="got 1 seeds, expected one or 2"):
        generate(model, tokenizer, ["a", "b"], seed=[1], **options)


def test_top_k_of_one_is_greedy(model, tokenizer):
    """Filters apply inside the compiled loop."""
    greedy = generate(model, tokenizer, "ab", 20)
    assert greedy == generate(model, tokenizer, "ab", 20, temperature=3.0, top_k=1)
    assert greedy == generate(model, tokenizer, "ab", 20, temperature=3.0, min_p=1.0)


def test_end_token(model, tokenizer):
    """Generation ends before the end token, also one of the generation config."""
    full = generate_detailed(model, tokenizer, ["ab", "hello"], 40)
    at = next(i for i in range(3, 40) if full[0].tokens[i] not in full[0].tokens[:i])
    ending = Tokenizer(
        tokenizer.backend, generation_config={"eos_token_id": [full[0].tokens[at]]}
    )
    result = generate_detailed(model, ending, ["ab"], 40)[0]
    assert result.finish_reason == "eos"
    assert result.tokens == full[0].tokens[:at]
    both = generate_detailed(model, ending, ["hello", "ab"], 40)
    assert both[1].tokens == result.tokens


def test_stop_strings_and_streaming(model, tokenizer):
    """A stop string across tokens ends the text, and none of it is ever shown."""
    text = generate(model, tokenizer, "ab", 40, temperature=1.0)
    assert len(text) > 10
    stop = text[6:9]
    expected = text[: text.index(stop)]
    for stops in (stop, [stop], ["never", stop, stop + "x"]):
        pieces = []
        result = generate_detailed(
            model,
            tokenizer,
            ["ab"],
            40,
            temperature=1.0,
            stop=stops,
            callback=lambda piece, row, pieces=pieces: pieces.append((piece, row)),
        )[0]
        assert result.text == expected
        assert result.finish_reason == "stop"
        assert "".join(piece for piece, _ in pieces) == expected
    assert generate(model, tokenizer, "ab", 40, temperature=1.0, stop=stop) == expected


def test_streamed_pieces_join_to_the_texts(model, tokenizer):
    """Every row's pieces are its text, in a batch, with held-back stops released."""
    pieces = {0: "", 1: "", 2: ""}

    def take(piece, row):
        assert piece
        pieces[row] += piece

    options = {"temperature": 1.0, "stop": ["\x00never", "ee" * 20]}
    texts = generate(model, tokenizer, ["ab", "q", "rst"], 30, callback=take, **options)
    assert texts == list(pieces.values())


def test_forms_of_prompts(model, tokenizer):
    """A string gives a string, a list a list; ids work in the detailed form."""
    text = generate(model, tokenizer, "ab", 5)
    assert isinstance(text, str)
    assert generate(model, tokenizer, ["ab"], 5) == [text]
    assert generate(model, tokenizer, [], 5) == []
    ids = tokenizer.encode("ab")
    assert generate_detailed(model, tokenizer, [ids], 5)[0].text == text


def test_bos_starts_an_empty_prompt(model):
    """A tokenizer that opens with BOS can continue nothing."""
    result = generate_detailed(model, make_tokenizer(add_bos_token=True), [""], 5)[0]
    assert result.prompt_tokens == 1
    assert len(result.tokens) == 5


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"prompts": [""]}, "prompt 0 is empty; this tokenizer opens texts with no"),
        ({"prompts": [1, 2]}, "prompt 0 is int, expected a string or a list of ids"),
        ({"prompts": ["a", []]}, "prompt 1 is empty; give at least one token"),
        ({"prompts": [[300]]}, "prompt 0 has ids outside the tokenizer's 258"),
        ({"max_tokens": 0}, "max_tokens=0, expected at least 1"),
        ({"max_tokens": 160}, "context is 160; use max_tokens of at most 159"),
        ({"prompts": ["x" * 160]}, "has 160 tokens, but the model's context is 160"),
        ({"stop": [""]}, "expected non-empty strings"),
        ({"top_p": 2.0}, "top_p=2.0: expected above 0"),
    ],
)
def test_refuses(model, tokenizer, arguments, message):
    """Bad requests name the prompt and the numbers."""
    with pytest.raises(SpecError, match=message):
        generate_detailed(model, tokenizer, **{"prompts": ["a"], **arguments})


def test_refuses_a_foreign_tokenizer(model):
    """A tokenizer with more ids than the model is another model's."""
    tokenizer = make_tokenizer()
    tokenizer.backend.add_tokens(["one more"])
    with pytest.raises(SpecError, match="has 259 ids, but the model's vocabulary is"):
        generate(model, tokenizer, "a")


def test_the_whole_context_can_be_used(model, tokenizer, continue_slowly):
    """A context that is no multiple of the prefill chunk is filled to the end."""
    ids = [5, 9, 200] * 50
    result = generate_detailed(model, tokenizer, [ids], CONTEXT - len(ids))[0]
    assert result.tokens == continue_slowly(ids, CONTEXT - len(ids))


def test_learned_positions_end_with_the_context(tokenizer):
    """A model with a position table generates up to its last position."""
    model = make_model(GPT2)
    ids = [5, 9, 200, 31, 7] * 8
    result = generate_detailed(model, tokenizer, [ids, ids[:3]], 32)
    assert result[0].tokens == slowly(model)(ids, 32)
    assert result[1].tokens == slowly(model)(ids[:3], 32)


def test_sharded_parameters(model, tokenizer):
    """Parameters spread over eight devices give the same tokens."""
    auto = (jax.sharding.AxisType.Auto,)
    mesh = jax.make_mesh((8,), ("model",), axis_types=auto)
    place = jax.sharding.NamedSharding
    spec = jax.sharding.PartitionSpec

    def spread(leaf):
        wide = leaf.ndim > 1 and leaf.shape[-1] % 8 == 0
        axes = (None,) * (leaf.ndim - 1) + ("model",) if wide else ()
        return jax.device_put(leaf, place(mesh, spec(*axes)))

    graph, state = nnx.split(model)
    sharded = nnx.merge(graph, jax.tree.map(spread, state))
    expected = generate_detailed(model, tokenizer, ["ab", "hello"], 20)
    got = generate_detailed(sharded, tokenizer, ["ab", "hello"], 20)
    assert [r.tokens for r in got] == [r.tokens for r in expected]
