"""The five cases that every engine is given."""

import random
from dataclasses import dataclass

TITLES = {
    "A": "one, 64 + 128",
    "B": "16, 64 + 64",
    "C": "32 ragged",
    "D": "512 shared by 16, 32 + 32",
    "E": "prefill of 1,000",
}


@dataclass(frozen=True)
class Work:
    """prompts: token ids; lengths: tokens to generate, per prompt; shared: with how many equal tokens all begin."""

    prompts: list[list[int]]
    lengths: list[int]
    shared: int = 0

    @property
    def equal(self) -> tuple[int, int, int] | None:
        """Length of a prompt, of an output, and their number, where that says all; else None."""
        sizes = {*zip(map(len, self.prompts), self.lengths, strict=True)}
        return None if self.shared or len(sizes) > 1 else (*sizes.pop(), len(self.prompts))


def works(vocabulary: int, seed: int, scale: float = 1.0) -> dict[str, Work]:
    """By letter. Tokens depend on the seed, lengths do not; the lengths are multiplied by `scale`."""
    draw, ragged = random.Random(seed), random.Random(0)

    def size(tokens: int) -> int:
        return max(1, round(tokens * scale))

    def prompt(tokens: int) -> list[int]:
        return [draw.randrange(vocabulary // 2, vocabulary) for _ in range(size(tokens))]

    prefix = prompt(512)
    return {
        "A": Work([prompt(64)], [size(128)]),
        "B": Work([prompt(64) for _ in range(16)], [size(64)] * 16),
        "C": Work(
            [prompt(ragged.randint(16, 384)) for _ in range(32)], [size(ragged.randint(8, 128)) for _ in range(32)]
        ),
        "D": Work([prefix + prompt(32) for _ in range(16)], [size(32)] * 16, shared=len(prefix)),
        "E": Work([prompt(1000)], [1]),
    }
