"""A tokenizer of bytes, for tests that read every token."""

import tokenizers
from tokenizers import decoders, models, pre_tokenizers, processors


def make_backend(bos: bool = False) -> tokenizers.Tokenizer:
    """Return a byte-level tokenizer: 256 byte tokens, then <s> and </s>."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {token: index for index, token in enumerate(alphabet)}
    backend = tokenizers.Tokenizer(models.BPE(vocab=vocab, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(["<s>", "</s>"])
    if bos:
        backend.post_processor = processors.TemplateProcessing(
            single="<s> $A </s>", special_tokens=[("<s>", 256), ("</s>", 257)]
        )
    return backend


CONFIG = {"bos_token": "<s>", "eos_token": {"content": "</s>"}}
