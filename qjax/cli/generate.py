"""`qjax generate MODEL --prompt TEXT`."""

import dataclasses
import sys
from typing import Annotated, Literal

import tyro

from qjax.checkpoint import load
from qjax.cli.output import Output
from qjax.generate import generate_detailed
from qjax.ops import prepack
from qjax.reports import peak_memory_bytes


@dataclasses.dataclass(frozen=True)
class Generate:
    """Continue a prompt."""

    model: tyro.conf.Positional[str]
    """qjax artifact, Hugging Face directory or Hub id."""
    prompt: str
    """Text to continue."""
    max_tokens: Annotated[int, tyro.conf.arg(metavar="N")] = 64
    """Most tokens to generate."""
    temperature: float = 0.0
    """Spread of the draw; 0 takes the most probable token."""
    top_k: int = 0
    """Draw from this many most probable tokens; 0 for all."""
    top_p: float = 1.0
    """Draw from the fewest tokens that reach this probability."""
    min_p: float = 0.0
    """Draw from tokens at least this times as probable as the first."""
    repetition_penalty: float = 1.0
    """Above 1, makes tokens that occurred less probable."""
    seed: int = 0
    """The same seed gives the same text."""
    stop: tuple[str, ...] = ()
    """Strings that end the text."""
    chat: bool = False
    """Send the prompt as a user message through the model's chat template."""
    dtype: str | None = None
    """Compute dtype; float32 on CPU and bfloat16 elsewhere by default."""
    cache_dtype: str | None = None
    """Keep keys and values as int8, fp8 or int4; the compute dtype by default."""
    cache_rotate: Literal["none", "keys", "both"] = "none"
    """Rotate keys, or keys and values, before a quantized cache rounds them."""
    revision: str | None = None
    """Branch, tag or commit of a Hub id."""
    adapter: str | None = None
    """PEFT adapter to put over the weights: directory or Hub id."""
    output: tyro.conf.OmitArgPrefixes[Output] = dataclasses.field(
        default_factory=Output
    )

    def run(self) -> None:
        """Loads, generates while printing, then prints speeds."""
        model, tokenizer = load(
            self.model, revision=self.revision, dtype=self.dtype, adapter=self.adapter
        )
        model = prepack(model)
        prompt: str | list[int] = self.prompt
        if self.chat:
            message = {"role": "user", "content": self.prompt}
            text = tokenizer.apply_chat_template([message])
            prompt = tokenizer.encode(text, add_special_tokens=False)
        console = self.output.console
        shown = not console.quiet

        def show(piece: str, _: int) -> None:
            sys.stdout.write(piece)
            sys.stdout.flush()

        if shown and not self.chat:
            show(self.prompt, 0)
        (result,) = generate_detailed(
            model,
            tokenizer,
            [prompt],
            self.max_tokens,
            temperature=self.temperature,
            top_k=self.top_k,
            top_p=self.top_p,
            min_p=self.min_p,
            repetition_penalty=self.repetition_penalty,
            seed=self.seed,
            stop=self.stop,
            cache_dtype=self.cache_dtype,
            cache_rotate=self.cache_rotate,
            callback=show if shown and sys.stdout.isatty() else None,
        )
        if shown and not sys.stdout.isatty():
            show(result.text, 0)
        console.print(
            f"\n\n{result.prompt_tokens} prompt tokens, {len(result.tokens)} new "
            f"({result.finish_reason}); prefill "
            f"{result.prefill_tokens_per_second:.0f} and decode "
            f"{result.decode_tokens_per_second:.0f} tokens/s"
        )
        fields = dataclasses.asdict(result)
        self.output.results({**fields, "peak_memory_bytes": peak_memory_bytes()})
