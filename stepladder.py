"""Stepladder's public face: `LLM` generates text in one process, without Ray; `python -m launch.serve` serves it.

from stepladder import LLM, SamplingParams
llm = LLM("launch/demo_model")
print(llm.generate(["def main():"], SamplingParams(max_tokens=64, temperature=0.0))[0].text)
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from parallel.mesh import SingleRank
from parallel.spec import ModelSpec
from workers.core import FinishReason, Request, SamplingParams
from workers.engine import Engine
from workers.executor import Executor
from workers.scheduler import SchedulerConfig
from workers.text import TextStream, Tokenizer

__version__ = "0.1.0"
__all__ = ["LLM", "Completion", "SamplingParams", "__version__"]


@dataclass(frozen=True)
class Completion:
    """The continuation of one prompt. tokens include those of a stop string or end of sequence; text does not."""

    prompt: str
    text: str
    tokens: list[int]
    finish_reason: FinishReason


class LLM:
    """A model in this process, on one device.

    Args:
        path: a Hugging Face directory of the Llama family.
        device: "cuda" or "cpu"; CUDA where there is one.
        kv_tokens: how many tokens the KV cache holds.
        limits: fields of `SchedulerConfig`, such as max_sequences or max_step_tokens.
    """

    def __init__(self, path: str, device: str | None = None, kv_tokens: int = 16384, **limits: int) -> None:
        spec = ModelSpec.load(path)
        self.tokenizer = Tokenizer(path)
        limits = {"block_size": 16, "max_model_len": min(spec.max_position, kv_tokens), **limits}
        config = SchedulerConfig(num_blocks=kv_tokens // limits["block_size"], eos_ids=spec.eos_ids, **limits)
        mesh = SingleRank(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        self.engine = Engine(config, Executor(spec, str(path), mesh, config.num_blocks, config.block_size))

    def generate(self, prompts: list[str], params: SamplingParams | None = None) -> list[Completion]:
        """Continue every prompt, batched; results are in the prompts' order."""
        done = dict(self.stream(prompts, params or SamplingParams()))
        return [done[index] for index in range(len(prompts))]

    def stream(self, prompts: list[str], params: SamplingParams) -> Iterator[tuple[int, Completion]]:
        """Like `generate`, but yields (index of the prompt, completion) as each one ends."""
        texts = [TextStream(self.tokenizer, params.stop) for _ in prompts]
        tokens: list[list[int]] = [[] for _ in prompts]
        for index, prompt in enumerate(prompts):
            self.engine.add(Request(id=str(index), prompt=tuple(self.tokenizer.encode(prompt)), params=params))
        while self.engine.has_work:
            for output in self.engine.step():
                index = int(output.id)
                tokens[index].extend(output.tokens)
                texts[index].push(output.tokens, finished=output.finish_reason is not None)
                if texts[index].stopped and not output.finish_reason:
                    self.engine.abort(output.id)
                if reason := ("stop" if texts[index].stopped else output.finish_reason):
                    yield index, Completion(prompts[index], texts[index].text, tokens[index], reason)
