"""The coupled rule: whoever drafts, a text is plain decoding's, token for token, and its log-probabilities are."""

import json
import random
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from shutil import copytree

import pytest
import torch

from stepladder.parallel.mesh import Mesh
from stepladder.parallel.spec import ModelSpec
from stepladder.workers.afd.pool_forward import attention_executor
from stepladder.workers.assembly import whole_executor
from stepladder.workers.core import SamplingParams, Sequence
from stepladder.workers.executor import Executor
from stepladder.workers.speculation.drafter import Draft, Drafter, Verified
from tests.ranks import run_ranks
from tests.workers.speculation.serving import LIMITS, Texts, requests, serve
from tests.workers.test_afd import membership, pool_of


class Liar(Drafter):
    """Anything at all."""

    def __init__(self, vocab: int = 101) -> None:
        self.dice, self.vocab = random.Random(5), vocab

    def propose(self, sequences: list[Sequence], most: list[int]) -> list[Draft]:
        return [self.one(sequence, limit) for sequence, limit in zip(sequences, most, strict=True)]

    def one(self, sequence: Sequence, limit: int) -> Draft:
        tokens = [self.dice.randrange(self.vocab) for _ in range(limit)]
        return Draft(tokens, [0.5] * limit)

    def observe(self, verified: list[Verified]) -> None:
        pass

    def forget(self, sequence: Sequence) -> None:
        pass


class Oracle(Liar):
    """Always right, as far as it was told how the texts go on."""

    def __init__(self, texts: Texts) -> None:
        super().__init__()
        self.texts = texts

    def one(self, sequence: Sequence, limit: int) -> Draft:
        rest = self.texts[sequence.request.id][0][len(sequence.output) :][:limit]
        return Draft(rest, [1.0] * len(rest))


class Fickle(Oracle):
    """Another one every round: right, partly right, wrong, silent."""

    def one(self, sequence: Sequence, limit: int) -> Draft:
        right, wrong = super().one(sequence, limit).tokens, Liar.one(self, sequence, limit).tokens
        count = self.dice.choice((0, 1, 2, limit))
        tokens = [*right[:count], *wrong[: self.dice.randrange(3)]][:limit]
        return Draft(tokens, [self.dice.random() for _ in tokens])


DRAFTERS: dict[str, Callable[[Texts], Drafter]] = {"liar": lambda texts: Liar(), "oracle": Oracle, "fickle": Fickle}


@pytest.mark.parametrize("k", [None, 1, 3, 8])
@pytest.mark.parametrize("kind", DRAFTERS)
def test_the_text_is_plain_decodings_bit_for_bit(executor: Executor, plain: Texts, kind: str, k: int | None) -> None:
    """Greedy and seeded, with penalties, bias, minimum lengths, ends inside a draft, log-probabilities, known
    beginnings; nearly no text ends where its draft does."""
    texts, engine = serve(executor, requests(), DRAFTERS[kind](plain), k)
    assert texts == plain
    stats = engine.stats
    assert stats.drafts and stats.draft_tokens >= stats.accepted_tokens
    if kind == "oracle":
        assert stats.accepted_tokens == stats.draft_tokens
        assert k is None or stats.steps < 0.8 * serve(executor, requests())[1].stats.steps
    assert stats.accepted_tokens == sum(stats.accepted_at)


@pytest.mark.parametrize("kind", DRAFTERS)
def test_through_preemption_and_replay(executor: Executor, plain: Texts, kind: str) -> None:
    texts, engine = serve(executor, requests(), DRAFTERS[kind](plain), 4, num_blocks=18, prefix_caching=False)
    assert texts == plain and engine.stats.preemptions
    begun = [replace(one, output=tuple(plain[one.id][0][: len(plain[one.id][0]) // 2])) for one in requests()]
    found = serve(executor, begun, DRAFTERS[kind](plain), 4)[0]
    assert {name: text[:2] for name, text in found.items()} == {name: text[:2] for name, text in plain.items()}


@pytest.mark.parametrize("lookahead", [0, 1])
def test_with_steps_queued_ahead(executor: Executor, plain: Texts, lookahead: int) -> None:
    """Half of them do not want drafts, and go on at once."""
    made = [replace(r, params=replace(r.params, speculate=int(r.id) % 2 == 0)) for r in requests()]
    texts, engine = serve(executor, made, Fickle(plain), 5, lookahead=lookahead)
    assert texts == plain and engine.stats.drafts


def test_two_ranks(directory: Path) -> None:
    spec = ModelSpec.load(directory)

    def rank_main(mesh: Mesh) -> tuple[Texts, ...] | None:
        executor = whole_executor(spec, str(directory), mesh, LIMITS.num_blocks, LIMITS.block_size)
        if mesh.shard.rank:
            executor.follow()
            return None
        plain = serve(executor, requests())[0]
        found = tuple(serve(executor, requests(), make(plain), 4)[0] for make in DRAFTERS.values())
        executor.stop()
        return plain, *found

    texts = run_ranks(2, rank_main)[0]
    assert texts is not None and all(other == texts[0] for other in texts[1:])


@pytest.mark.parametrize("residual", ["standard", "ladder"])
def test_attention_ranks_with_a_pool_of_ffn_ranks(residual: str, directory: Path, tmp_path: Path) -> None:
    """2A2F at lag 0 and 1: the rows of a draft travel like those of a prefill."""
    path = Path(copytree(directory, tmp_path / residual))
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(config | {"residual": residual}))
    spec = ModelSpec.load(path)
    plain: list[Texts] = [{}, {}]
    found: list[Texts] = [{}, {}]
    with pool_of(path, 2) as pool:

        def one(index: int) -> None:
            executor = attention_executor(spec, str(path), membership(spec, pool), 1 + index, 8)
            executor.allocate(LIMITS.num_blocks, LIMITS.block_size)
            plain[index] = serve(executor, requests()[index::2])[0]
            found[index] = serve(executor, requests()[index::2], Fickle(plain[index]), 4)[0]
            executor.stop()

        threads = [threading.Thread(target=one, args=(index,), daemon=True) for index in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(120)
    assert found == plain and all(plain)


def test_a_planted_fault_is_found(executor: Executor, plain: Texts, monkeypatch: pytest.MonkeyPatch) -> None:
    """One token too many accepted: without this the tests above might prove nothing."""
    from stepladder.workers import sampler

    monkeypatch.setattr(
        sampler, "_kept", lambda draft, drawn, flags=None: [*draft[:1], *drawn[1:2]] if len(draft) > 1 else drawn[:1]
    )
    assert serve(executor, requests(), Fickle(plain), 5)[0] != plain


def test_nobody_is_told_of_tokens_behind_an_end(executor: Executor) -> None:
    """A constant text whose end token stands in the middle of every draft."""
    params = SamplingParams(max_tokens=20, temperature=0.0, logit_bias={5: 90.0})
    ending = [replace(requests()[0], params=replace(params, stop_token_ids=(5,), min_tokens=3))]

    class Fives(Liar):
        def one(self, sequence: Sequence, limit: int) -> Draft:
            return Draft([5] * limit, [1.0] * limit)

    texts, _ = serve(executor, ending, Fives(), 8)
    assert texts == serve(executor, ending)[0] and texts["0"][1] == "stop"
    torch.manual_seed(0)
