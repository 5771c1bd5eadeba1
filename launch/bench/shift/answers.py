"""What the target answers, recorded once for all who learn: coupled texts are the same whoever drafts."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

from stepladder import LLM
from stepladder.launch.bench.shift.options import CHAT, LIBRARY, ShiftBench
from stepladder.launch.bench.speculate.options import LONGEST
from stepladder.launch.bench.speculate.points import LEARNED, groups
from stepladder.launch.bench.speculate.turns import Side
from stepladder.launch.recipes import chat_traffic, library_traffic
from stepladder.launch.recipes.capturing import capturing
from stepladder.launch.recipes.chat_material import Library
from stepladder.workers.core import Request, SamplingParams
from stepladder.workers.speculation.learning.lessons import Captured, Lesson, number_of


class Answer(NamedTuple):
    """To one request. pieces: as an engine gives them to whoever learns."""

    kind: str
    pieces: list[Captured]

    @property
    def lessons(self) -> list[Lesson]:
        return [piece.lesson for piece in self.pieces]


def asked(llm: LLM, sizes: dict[str, int], temperature: float, config: ShiftBench) -> dict[str, list[Request]]:
    """Requests by kind of traffic, no two of a kind alike. Answers to chats end where the model ends them, texts go on.

    Args:
        sizes: by kind, how many.

    Raises:
        ValueError: there are not so many.
    """
    made: dict[str, list[Request]] = {}
    prompts_of, chat = _source(llm, config), config.traffic == CHAT
    for kind, count in sizes.items():
        made[kind] = []
        for number, prompt in enumerate(prompts_of(kind, count)):
            params = SamplingParams(max_tokens=config.tokens, temperature=temperature, seed=number, ignore_eos=not chat)
            request = Request(id=f"{kind}-{number}", prompt=prompt[-LONGEST:], params=params, domain=kind)
            made[kind].append(request)
    return made


def recorded(llm: LLM, requests: Sequence[Request], side: Side, told: Callable[[int], object]) -> list[Answer]:
    """Served by this side, some at once, which is told how many each time."""
    with capturing(llm.engine) as found:
        for batch in groups(requests, LEARNED):
            side.serve(llm.engine, batch)
            told(len(batch))
    return [Answer(request.domain, found.get(number_of(request), [])) for request in requests]


def _source(llm: LLM, config: ShiftBench) -> Callable[[str, int], Sequence[tuple[int, ...]]]:
    if config.traffic == LIBRARY:
        return lambda kind, count: library_traffic.beginnings(llm.tokenizer, kind, count, config.seed)
    library = Library.read()
    return lambda kind, count: [*chat_traffic.prompts(llm.tokenizer, kind, count, config.seed, library)]
