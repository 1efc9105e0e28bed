"""LDLQ: error feedback on grids that are known before the first row is rounded.

GPTQ with static groups under another name (QuIP, theorem 6), by default with scales of
least squared error; the natural partner of rotated weights and fixed codebooks.

Reference: Chee et al., QuIP: 2-Bit Quantization of Large Language Models With
Guarantees, arXiv 2307.13304, section 3.
"""

import dataclasses

from qjax.errors import SpecError
from qjax.methods.gptq import GPTQ, feedback_name


@dataclasses.dataclass(frozen=True)
class LDLQ(GPTQ):
    """Error feedback with scales chosen beforehand; fields as `GPTQ`.

    Raises:
      SpecError: a field is out of range, or `static_groups` is not True.
    """

    static_groups: bool | None = True
    range: str = "mse"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.static_groups is not True:
            raise SpecError(
                f"LDLQ: static_groups is {self.static_groups!r}, but LDLQ rounds to "
                "grids that are known; use GPTQ to choose scales on the way"
            )

    @property
    def name(self) -> str:
        """`ldlq`, or `ldlq-act-order` and so on."""
        return feedback_name("ldlq", self).replace("-static", "")
