"""Stepladder's public face: `LLM` generates text in one process, without Ray; `stepladder serve` serves it.

from stepladder import LLM, SamplingParams
llm = LLM("launch/demo_model")
print(llm.generate(["def main():"], SamplingParams(max_tokens=64, temperature=0.0))[0].text)
"""

from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from stepladder.llm import LLM, Completion
    from stepladder.workers.core import SamplingParams, StructuredOutputs, TokenLogprob

__version__ = "0.1.0"
__all__ = ["LLM", "Completion", "SamplingParams", "StructuredOutputs", "TokenLogprob", "__version__"]

_HERE = Path(__file__).parent
if not (_HERE / "workers").is_dir():  # a checkout: the folders of this package lie beside this one, in a wheel below it
    __path__.append(str(_HERE.parent))


def __getattr__(name: str) -> Any:
    """What is public, once it is asked for: commands that only ask a cluster need no torch."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from stepladder import llm

    return getattr(llm, name)
