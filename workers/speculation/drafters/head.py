"""A recurrent head on the target's last hidden state drafts, all sequences of a step together."""

from collections.abc import Callable
from collections.abc import Sequence as Seq
from time import perf_counter
from typing import NamedTuple

import torch
from torch import Tensor

from stepladder.kernels.cpu.native import Projection, computing
from stepladder.kernels.cpu.recurrent import RecurrentCell
from stepladder.kernels.transfer import upload
from stepladder.workers.core import Sample, Sequence
from stepladder.workers.speculation.drafter import KNOWN, Draft, Drafter, OpenDraft, Verified, agreeing
from stepladder.workers.speculation.drafters.calibration import Calibration
from stepladder.workers.speculation.head.files import Head
from stepladder.workers.speculation.head.vocabulary import TargetVocabulary
from stepladder.workers.speculation.price import Price

__all__ = ["Cell", "Foreseen", "HeadDrafter"]

KINDS = 20  # of guesses, by the head's own probability

Draw = Callable[[Tensor, list[Sample], Tensor, bool], tuple[Tensor, Tensor]]


class Cell:
    """The network of a head, laid out for inference: with native kernels in bf16, since a draft takes as long as its
    weights take to be read, and nothing that is drafted has to be exact.

    Args:
        head: its network and the tokens that it drafts. target: whose embedding and head it shares.
        native: whether the kernels of CPU ranks compute it.
        draw: draws one of some tokens, and tells how likely the likeliest is; `sampler.sample_among`.
    """

    def __init__(self, head: Head, target: TargetVocabulary, native: bool, draw: Draw) -> None:
        device, net = target.head.weight.device, head.net
        self.native, self.version = native, head.manifest.version
        self._embed, self._draw = target.embedding, draw
        self.tokens = head.tokens.to(device)
        self._cell: Callable[[Tensor, Tensor], Tensor] = net.to(device)
        if native:
            parts = (net.gate, net.up, net.linear, net.down)
            self._cell = RecurrentCell.of(*(part.weight.bfloat16() for part in parts))
        rows = target.rows(self.tokens) * net.scale.to(device)
        self._logits = Projection.of(rows.bfloat16(), dtype=torch.float32) if native else lambda x: x @ rows.T

    def __deepcopy__(self, memo: object) -> "Cell":
        return self  # copies of a drafter share its weights

    def step(self, state: Tensor, tokens: Tensor) -> Tensor:
        """As `RecurrentHead.forward`: fp32 [N, hidden] and int64 [N] -> [N, hidden]."""
        return self._cell(state, self._embed.embed(tokens).float())

    def logits(self, state: Tensor) -> Tensor:
        """Of `tokens`: [N, hidden] -> [N, tokens]."""
        return self._logits(state)

    def foresee(self, state: Tensor, samples: list[Sample]) -> tuple[list[int], list[float]]:
        """The token drawn for each row, and the probability of its likeliest one at temperature 1."""
        tokens, most = self._draw(self.logits(state), samples, self.tokens, self.native)
        return tokens.tolist(), most.tolist()


class Foreseen(NamedTuple):
    """A token that may come next, how likely it is right, and the kind of guess that this is known of."""

    token: int
    sure: float
    kind: int = 0


class HeadDrafter(Drafter):
    """Draws with the request's temperature, truncation and noise, as `ModelDrafter` does; penalties and biases are left
    to the target. Confidence is learnt, by the probability of the likeliest token: with the same noise, that says more
    of a draw than the probability of what was drawn.

    A sequence has no draft until its last token was drawn by a step of this engine that told its hidden state.

    Args:
        cell: None drafts nothing, until there is one.
        threshold: a draft ends where it would be right with less than this probability; None: where it does not pay.
    """

    hidden = True

    def __init__(self, cell: Cell | None, threshold: float | None = None) -> None:
        self._cell, self.price, self.version = cell, Price(threshold), cell.version if cell else 0
        self.calibration = Calibration([(kind + 0.5) / KINDS for kind in range(KINDS)])
        self._states: dict[str, tuple[int, Tensor]] = {}  # by request: its length, and the state its last token is from
        self._guesses: dict[str, list[tuple[int, Foreseen]]] = {}  # by request: with their places in the last draft

    @property
    def cell(self) -> Cell:
        assert self._cell, "nobody is known before there is one"
        return self._cell

    @property
    def native(self) -> bool:
        """Whether native kernels compute it."""
        return self._cell is not None and self._cell.native

    def swap(self, weights: Cell | None) -> None:
        """What is known of sequences stays, since it is the target's; how sure guesses are is learnt further."""
        self._cell, self.version = weights, weights.version if weights else 0
        self.guesses = self.right = 0
        self._guesses.clear()

    def propose(self, sequences: list[Sequence], most: list[int]) -> list[Draft]:
        drafts = [OpenDraft(limit, self.price.least, self.version) for limit in most]
        going = [(s, d) for s, d in zip(sequences, drafts, strict=True) if d.most > 0 and self.knows(s) and self.pays()]
        if not going:
            return [draft.made for draft in drafts]
        with computing(self.native):
            state = self.begin([sequence for sequence, _ in going])
            while going:
                began = perf_counter()
                last = [(draft.made.tokens or sequence.tokens)[-1] for sequence, draft in going]
                state = self.cell.step(state, upload(last, state.device))
                found = self.foresee(state, [(sequence, draft.made.tokens) for sequence, draft in going])
                self.price.paid(perf_counter() - began, (one.sure for one in found))
                kept = [
                    i
                    for i, (_, draft) in enumerate(going)
                    if draft.take(found[i].token, found[i].sure) and self.pays(draft.chance)
                ]
                going, state = [going[i] for i in kept], state[kept] if len(kept) < len(going) else state
        return [draft.made for draft in drafts]

    def pays(self, chance: float = 1.0, than: float = 0.0) -> bool:
        """See `Price`. Weights that are new are asked as if nothing were known of what they cost."""
        return self.price.pays(self.terms if self.guesses >= KNOWN else None, chance, than)

    def knows(self, sequence: Sequence) -> bool:
        """Whether there is a cell, and the hidden state that its last token was drawn from."""
        if self._cell is None:
            return False
        known, _ = self._states.get(sequence.request.id, (-1, None))
        return known == len(sequence.tokens) and not sequence.is_drawing

    def begin(self, sequences: list[Sequence]) -> Tensor:
        """The states that the last tokens of sequences were drawn from: fp32 [N, hidden]. New drafts begin."""
        for sequence in sequences:
            self._guesses.pop(sequence.request.id, None)
        return torch.stack([self._states[sequence.request.id][1] for sequence in sequences]).float()

    def foresee(self, state: Tensor, ends: list[tuple[Sequence, list[int]]]) -> list[Foreseen]:
        """The next token of sequences and what has been drafted of them, from states that have read all of it."""
        found = list[Foreseen]()
        samples = [
            Sample(row, len(sequence.tokens) + len(draft), sequence.request.params, [], 0)
            for row, (sequence, draft) in enumerate(ends)
        ]
        for (sequence, draft), token, p in zip(ends, *self.cell.foresee(state, samples), strict=True):
            kind = min(int(p * KINDS), KINDS - 1)
            found.append(Foreseen(token, self.calibration.rates[kind], kind))
            self._guesses.setdefault(sequence.request.id, []).append((len(draft), found[-1]))
        return found

    def observe(self, verified: list[Verified]) -> None:
        for each in verified:
            self._learn(self._guesses.pop(each.sequence.request.id, ()), each)
            state = each.hidden[len(each.tokens) - 1].clone()  # a view would keep the rows of the whole step
            self._states[each.sequence.request.id] = len(each.sequence.tokens), state

    def forget(self, sequence: Sequence) -> None:
        self._states.pop(sequence.request.id, None)
        self._guesses.pop(sequence.request.id, None)

    def _learn(self, guesses: Seq[tuple[int, Foreseen]], each: Verified) -> None:
        """From those that stood behind nothing but right tokens, drafted or not."""
        right = agreeing(each.drafted, each.tokens)
        for place, guess in guesses:
            if place <= right and place < len(each.tokens):
                came = guess.token == each.tokens[place]
                self.calibration.learn(guess.kind, came)
                self.guesses, self.right = self.guesses + 1, self.right + came
