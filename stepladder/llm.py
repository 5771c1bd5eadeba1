"""`LLM`: generate text in one process, without Ray."""

from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import count
from operator import index as index_of
from typing import Any

import torch
from tqdm import tqdm

from stepladder.kernels.once import CACHE
from stepladder.parallel.mesh import SingleRank
from stepladder.parallel.typed_json import shown
from stepladder.workers import assembly
from stepladder.workers.config import FOR_SERVERS, EngineConfig, KvConfig
from stepladder.workers.core import FinishReason, Output, Request, SamplingParams, StructuredOutputs, TokenLogprob
from stepladder.workers.model_check import check_model
from stepladder.workers.sizing import check_kv, fitting, kv_size
from stepladder.workers.source.resolve import resolve
from stepladder.workers.speculation.config import OFF, SpeculateConfig
from stepladder.workers.text.chat import ChatOptions
from stepladder.workers.text.control_tokens import plain
from stepladder.workers.text.stream import TextStream

__all__ = ["LLM", "Completion", "SamplingParams", "StructuredOutputs", "TokenLogprob"]

Prompt = str | Sequence[int]
Message = Mapping[str, Any]
Params = SamplingParams | Sequence[SamplingParams] | None


@dataclass(frozen=True)
class Completion:
    """The continuation of one prompt. tokens include those of a stop string or end of sequence; text does not.

    Attributes:
        logprobs: one per token, if params.logprobs asked for them.
        prompt_logprobs: one per token of the prompt, None for the first, if params.prompt_logprobs asked for them.
    """

    prompt: str
    text: str
    tokens: list[int]
    finish_reason: FinishReason
    logprobs: list[TokenLogprob] | None = None
    prompt_logprobs: list[TokenLogprob | None] | None = None


Done = deque[tuple[Any, Completion]]  # what has ended, each behind its key


@dataclass(eq=False)
class _Growing:
    """A prompt's continuation under way; `done` gets it at the end."""

    key: Any
    prompt: str
    params: SamplingParams
    text: TextStream
    done: Done
    tokens: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprob] = field(default_factory=list)
    prompt_logprobs: list[TokenLogprob | None] | None = None

    def take(self, output: Output) -> FinishReason | None:
        """Append what a step brought; why it ended, if it did."""
        if output.prompt_logprobs is not None:
            self.prompt_logprobs = [None, *output.prompt_logprobs]
        self.tokens.extend(output.tokens)
        self.logprobs.extend(output.logprobs or ())
        self.text.push(output.tokens[: self.text.visible(output)], finished=output.finish_reason is not None)
        return "stop" if self.text.stopped else output.finish_reason

    def complete(self, reason: FinishReason) -> None:
        logprobs = self.logprobs if self.params.logprobs is not None else None
        completion = Completion(self.prompt, self.text.text, self.tokens, reason, logprobs, self.prompt_logprobs)
        self.done.append((self.key, completion))


class LLM:
    """A model in this process, on one device.

    Args:
        path: a Hugging Face directory or a GGUF file; `parallel/families.py` lists what is served. "launch/demo_model"
            is the bundled model, wherever Stepladder is installed; "smollm2" is fetched on first use.
        device: "cuda" or "cpu"; CUDA where there is one.
        kv_tokens: how many tokens the KV cache holds.
        kv: the cache in full, in place of `kv_tokens`; without a number of tokens it is measured how many fit.
        cache: folder for what is fetched, and for what GGUF files become.
        speculate: who drafts tokens, such as "suffix"; or all options of that.
        options: fields of `EngineConfig`, such as max_sequences, dtype or batch_invariant.

    Attributes:
        defaults: sampling parameters that the model's generation_config.json recommends; the others as they are.

    Raises:
        ValueError: the model or an option is unusable.
    """

    def __init__(
        self,
        path: str,
        device: str | None = None,
        kv_tokens: int = 16384,
        kv: KvConfig | None = None,
        cache: str = CACHE,
        speculate: str | SpeculateConfig = OFF,
        **options: Any,
    ) -> None:
        if name := next((name for name in FOR_SERVERS if name in options), None):
            raise ValueError(f"{name} is for servers, which refuse requests; an LLM queues all it is given")
        engine, kv = EngineConfig(**options), kv or KvConfig(tokens=kv_tokens)
        drafting = SpeculateConfig(kind=speculate) if isinstance(speculate, str) else speculate
        if engine.threads:
            torch.set_num_threads(engine.threads)
        path = resolve(path, engine.dtype, cache, fetching=True, progress=True)
        mesh = SingleRank(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        spec, self.defaults, self.tokenizer = check_model(path, engine, str(mesh.device))
        check_kv(spec, kv, mesh.device)
        with fitting("the model with its KV cache"):
            executor = assembly.load(spec, path, mesh, engine)
            size = kv_size(executor, engine, kv, mesh.device)
            self.engine = assembly.begin(executor, engine, kv, size, lambda: self.tokenizer, drafting)
        self._ids = map(str, count())
        self._growing: dict[str, _Growing] = {}  # of all streams, by request id

    def generate(
        self, prompts: Prompt | Sequence[Prompt], params: Params = None, progress: bool = False
    ) -> list[Completion]:
        """Continue every prompt, batched; results are in the prompts' order.

        Args:
            prompts: texts, or token ids of texts; one of either is one prompt.
            params: of all prompts, or one for each; None takes the model's `defaults`, with max_tokens as far as the
                context goes.
            progress: show a bar on stderr.
        """
        asked = _several(prompts)
        done = dict(tqdm(self.stream(asked, params), total=len(asked), unit="prompt", disable=not progress))
        return [done[index] for index in range(len(asked))]

    def chat(
        self,
        conversations: Sequence[Message] | Sequence[Sequence[Message]],
        params: Params = None,
        progress: bool = False,
        tools: list[dict[str, Any]] | None = None,
        **options: Any,
    ) -> list[Completion]:
        """The model's next turn in one conversation or in several, batched, by its chat template.

        Args:
            conversations: messages {"role": ..., "content": ...}, or lists of such; else as `generate`.
            tools: what the model may call, as the template tells it: OpenAI's {"type": "function", ...}.
            options: fields of `ChatOptions`, such as continue_final_message, and add_special_tokens.

        Raises:
            ValueError: the model has no chat template, or the template refuses the messages.
        """
        special, chosen = options.pop("add_special_tokens", False), ChatOptions(**options)
        texts = [self.tokenizer.chat(list(one), tools, chosen) for one in _conversations(conversations)]
        tokens = [self.tokenizer.encode(text, add_special_tokens=special) for text in texts]
        completions = self.generate(tokens, params, progress)
        return [replace(one, prompt=plain(text)) for one, text in zip(completions, texts, strict=True)]

    def stream(self, prompts: Prompt | Sequence[Prompt], params: Params = None) -> Iterator[tuple[int, Completion]]:
        """Like `generate`, but yields (index of the prompt, completion) as each one ends.

        Several streams may be read in turn. One that is not read to its end takes its requests along when it is closed.

        Raises:
            ValueError: a prompt is empty or does not fit, or there are not as many params as prompts; then none of them
                is run.
        """
        done: deque[tuple[int, Completion]] = deque()
        own: list[str] = []
        asked = _several(prompts)
        each = [params] * len(asked) if params is None or isinstance(params, SamplingParams) else params
        if not isinstance(each, Sequence) or not all(isinstance(one, SamplingParams | None) for one in each):
            raise ValueError(f"params are {shown(params)}; give SamplingParams, or a list of them")
        if len(each) != len(asked):
            raise ValueError(f"there are {len(each)} params for {len(asked)} prompts; give one, or one for each")
        try:
            for index, (prompt, wanted) in enumerate(zip(asked, each, strict=True)):
                text = prompt if isinstance(prompt, str) else None
                tokens = tuple(self.tokenizer.encode(prompt)) if isinstance(prompt, str) else _ids(prompt)
                wanted = wanted or self.engine.config.fit(self.defaults, len(tokens))
                own.append(self.begin(index, text, tokens, wanted, done))
            for _ in asked:
                while not done:
                    self.step()
                yield done.popleft()
        finally:
            for request_id in own:
                if self._growing.pop(request_id, None):
                    self.engine.abort(request_id)

    def begin(self, key: Any, prompt: str | None, tokens: tuple[int, ...], params: SamplingParams, done: Done) -> str:
        """Queue one prompt, given as text, if there is one, and as tokens; `step` puts it in `done` at its end. Returns
        the request's id.

        Raises:
            ValueError: it is empty or does not fit, or its structured_outputs cannot be used.
        """
        if params.structured_outputs and self.engine.grammars:
            self.engine.grammars.check(params.structured_outputs).result()
        request = Request(id=next(self._ids), prompt=tokens, params=params)
        self.engine.add(request)
        text = self.tokenizer.decode(list(tokens)) if prompt is None else plain(prompt)  # of ids that the model has
        self._growing[request.id] = _Growing(key, text, params, TextStream.of(self.tokenizer, params, tokens), done)
        return request.id

    @property
    def under_way(self) -> int:
        """How many prompts have begun and not ended."""
        return len(self._growing)

    def step(self) -> None:
        """One step of all that is under way."""
        for output in self.engine.step():
            if reason := self._growing[output.id].take(output):
                self._growing.pop(output.id).complete(reason)
                if not output.finish_reason:  # a stop string, which the engine does not know
                    self.engine.abort(output.id)


def _several(prompts: Prompt | Sequence[Prompt]) -> list[Prompt]:
    """One text, or the ids of one, is one prompt and not one for each character or id."""
    if not isinstance(prompts, Sequence):
        raise ValueError(f"prompts are {shown(prompts)}; give texts or lists of token ids")
    if isinstance(prompts, str) or (prompts and isinstance(prompts[0], int)):
        return [prompts]  # type: ignore[list-item]
    return [*prompts]


def _conversations(given: Any) -> Sequence[Sequence[Message]]:
    """The messages of one are one conversation."""
    several = [given] if isinstance(given, Sequence) and given and isinstance(given[0], Mapping) else given
    listed = isinstance(several, Sequence) and all(isinstance(one, Sequence) for one in several)
    if listed and all(isinstance(message, Mapping) for one in several for message in one):
        return several
    raise ValueError(f"conversations are {shown(given)}; give messages, or lists of messages")


def _ids(prompt: Any) -> tuple[int, ...]:
    """Of a prompt that is no text; whether the model has them is the engine's to say."""
    ids = tuple(prompt) if isinstance(prompt, Iterable) else (True,)
    try:
        if not any(isinstance(one, bool) for one in ids):
            return tuple(map(index_of, ids))  # those of NumPy are good, too
    except TypeError:
        pass
    raise ValueError(f"the prompt is {shown(prompt)}; it must be a text or a list of token ids")
