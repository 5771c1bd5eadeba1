"""A head on the model's last hidden state: what it is told, what it drafts, how it is taught, and its files."""

import json
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from stepladder import LLM
from stepladder.kernels.noise import gumbel
from stepladder.parallel.checkpoint import fingerprints
from stepladder.parallel.mesh import Mesh
from stepladder.parallel.spec import ModelSpec
from stepladder.workers.assembly import Target, whole_executor
from stepladder.workers.core import Request, SamplingParams, Sequence
from stepladder.workers.executor import Executor
from stepladder.workers.sampler import sample_among
from stepladder.workers.speculation.config import SpeculateConfig
from stepladder.workers.speculation.drafter import KNOWN, Verified, agreeing
from stepladder.workers.speculation.drafters.head import Cell, Foreseen, HeadDrafter
from stepladder.workers.speculation.drafters.hybrid import Hybrid
from stepladder.workers.speculation.drafters.lookup import Guess
from stepladder.workers.speculation.drafters.suffix import Suffix
from stepladder.workers.speculation.head.files import Head, Manifest, read_head, write_head
from stepladder.workers.speculation.head.net import RecurrentHead
from stepladder.workers.speculation.head.teach import Teacher
from stepladder.workers.speculation.head.vocabulary import TargetVocabulary, most_frequent
from stepladder.workers.speculation.learning.lessons import Lessons
from stepladder.workers.speculation.price import Terms
from tests.llama import write_llama
from tests.ranks import run_ranks
from tests.tokenizers_of import write_byte_level
from tests.workers.speculation.serving import LIMITS, Texts, requests, serve
from tests.workers.speculation.test_coupled import Fickle

VOCAB, HIDDEN, DRAFTED = 101, 32, 60


@pytest.fixture(scope="module")
def target(directory: Path) -> TargetVocabulary:
    return TargetVocabulary(ModelSpec.load(directory), directory)


def random_head(directory: Path, seed: int = 0) -> Head:
    torch.manual_seed(seed)
    net = RecurrentHead(HIDDEN, 24)
    torch.nn.init.normal_(net.down.weight, std=0.3)
    torch.nn.init.uniform_(net.scale, 0.5, 1.5)
    tokens = torch.randperm(VOCAB)[:DRAFTED].sort().values
    return Head(net.requires_grad_(False), tokens, Manifest(HIDDEN, 24, 1, fingerprints(directory), {}))


class Listener(Fickle):
    """Checks what it is told: the logits of each hidden state are those that its token was drawn from."""

    hidden = True

    def __init__(self, texts: Texts, target: TargetVocabulary) -> None:
        super().__init__(texts)
        self.target, self.heard, self.partly = target, 0, 0

    def observe(self, verified: list[Verified]) -> None:
        rows = self.target.rows(torch.arange(VOCAB))
        for each in verified:
            assert len(each.hidden) == 1 + len(each.drafted)
            params = each.sequence.request.params
            if params.temperature or params.repetition_penalty != 1:
                continue
            likeliest = (each.hidden.float() @ rows.T).argmax(-1).tolist()
            assert list(each.tokens) == likeliest[: len(each.tokens)]
            self.heard += len(each.tokens)
            self.partly += 0 < agreeing(each.drafted, each.tokens) < len(each.drafted)


@pytest.mark.parametrize("ranks", [1, 2])
def test_drafters_are_told_the_hidden_states_that_tokens_were_drawn_from(
    directory: Path, target: TargetVocabulary, ranks: int
) -> None:
    def rank_main(mesh: Mesh) -> tuple[bool, int, int] | None:
        executor = whole_executor(ModelSpec.load(directory), str(directory), mesh, LIMITS.num_blocks, LIMITS.block_size)
        if mesh.shard.rank:
            executor.follow()
            return None
        plain = serve(executor, requests())[0]
        listener = Listener(plain, target)
        texts, _ = serve(executor, requests(), listener, 5, num_blocks=24)
        executor.stop()
        return texts == plain, listener.heard, listener.partly

    same, heard, partly = run_ranks(ranks, rank_main)[0]  # type: ignore[misc]
    assert same and heard > 60 and partly > 3


@pytest.mark.parametrize("native", [False, True])
def test_the_cell_is_the_network(directory: Path, target: TargetVocabulary, native: bool) -> None:
    """With weights that bf16 holds."""
    head = random_head(directory)
    for parameter in head.net.parameters():
        parameter.data = parameter.bfloat16().float()
    cell = Cell(head, target, native, sample_among)
    state, tokens = torch.randn(5, HIDDEN), torch.randint(VOCAB, (5,))
    want = head.net(state, target.embed(tokens))
    torch.testing.assert_close(cell.step(state, tokens), want, rtol=1e-5, atol=1e-5)
    rows = target.rows(torch.arange(VOCAB)) * head.net.scale
    logits = want @ (rows.bfloat16().float() if native else rows).T
    torch.testing.assert_close(cell.logits(want), logits[:, head.tokens], rtol=1e-5, atol=1e-4)


def test_drafts_are_drawn_as_the_sampler_would(directory: Path, target: TargetVocabulary) -> None:
    """Greedy and sampled, together and alone, against a loop over the network."""
    head = random_head(directory)
    drafter, rows = HeadDrafter(Cell(head, target, False, sample_among), threshold=0.0), target.rows(head.tokens)
    sequences, states = [], torch.randn(4, HIDDEN)
    for index, temperature in enumerate((0.0, 1.0, 0.7, 1.3)):
        params = SamplingParams(temperature=temperature, seed=index)
        sequence = Sequence(Request(id=str(index), prompt=(1, 2, 3 + index), params=params))
        drafter.observe([Verified(sequence, (), [3 + index], (), states[index : index + 1])])
        sequences.append(sequence)
    most = [3, 5, 0, 4]
    drafts = drafter.propose(sequences, most)
    assert [len(draft.tokens) for draft in drafts] == most
    for index, draft in enumerate(drafts):
        state, token = states[index : index + 1], 3 + index
        for place, drafted in enumerate(draft.tokens):
            state = head.net(state, target.embed(torch.tensor([token])))
            logits = head.net.logits(state, rows)
            if temperature := sequences[index].request.params.temperature:
                noise = gumbel(torch.tensor([index]), torch.tensor([3 + place]), VOCAB)[:, head.tokens]
                token = int(head.tokens[(logits / temperature + noise).argmax()])
            else:
                token = int(head.tokens[logits.argmax()])
            assert drafted == token
            kind = int(float(logits.softmax(-1).max()) * 20)
            assert draft.confidence[place] == (kind + 0.5) / 20, "nothing has been learnt yet"
    (alone,) = drafter.propose([sequences[1]], [5])
    assert alone.tokens == drafts[1].tokens
    drafter.price.threshold = drafts[1].confidence[0] * drafts[1].confidence[1]
    assert len(drafter.propose([sequences[1]], [5])[0].tokens) == 2
    drafter.forget(sequences[1])
    assert drafter.propose([sequences[1]], [5])[0].tokens == []


def test_confidence_is_learnt_from_what_stood_behind_right_tokens(directory: Path, target: TargetVocabulary) -> None:
    drafter = HeadDrafter(Cell(random_head(directory), target, False, sample_among), threshold=0.0)
    sequence = Sequence(Request(id="a", prompt=(1, 2, 3), params=SamplingParams(temperature=0.0)))
    state = torch.randn(1, HIDDEN)
    drafter.observe([Verified(sequence, (), [3], (), state)])
    (draft,) = drafter.propose([sequence], [4])
    kinds = [kind for _, (_, _, kind) in drafter._guesses["a"]]
    before = list(drafter.calibration.rates)
    wrong = (draft.tokens[1] + 1) % VOCAB
    drafter.observe([Verified(sequence, draft.tokens[:3], [draft.tokens[0], wrong], (), torch.randn(4, HIDDEN))])
    expected = dict(enumerate(before))
    for nth, (kind, right) in enumerate(((kinds[0], True), (kinds[1], False))):
        seen = 8 + 1 + (nth if kinds[0] == kinds[1] else 0)
        expected[kind] += (right - expected[kind]) / seen
    assert drafter.calibration.rates == pytest.approx(list(expected.values()))
    drafter.observe([Verified(sequence, (), [3], (), state)])
    assert drafter.calibration.rates == pytest.approx(list(expected.values())), "guesses count once"


def test_what_a_token_takes_is_weighed_once_its_weights_are_known(directory: Path, target: TargetVocabulary) -> None:
    drafter = HeadDrafter(Cell(random_head(directory), target, False, sample_among))
    both = Hybrid(Suffix(0), drafter)
    sequence = Sequence(Request(id="a", prompt=(1, 2, 3), params=SamplingParams(temperature=0.0)))
    drafter.observe([Verified(sequence, (), [3], (), torch.randn(1, HIDDEN))])
    drafter.calibration.rates = [0.9] * len(drafter.calibration.rates)
    for asked in (drafter, both):
        asked.terms = Terms(1e-9)
        drafter.guesses = KNOWN - 1
        assert len(asked.propose([sequence], [4])[0].tokens) == 4, "new weights are asked whatever that takes"
        drafter.guesses = KNOWN
        assert not asked.propose([sequence], [4])[0].tokens
        asked.terms = Terms(1.0)
        assert len(asked.propose([sequence], [4])[0].tokens) == 4


def hybrid(cell: Cell) -> Hybrid:
    return Hybrid(Suffix(1 << 12, 0.0), HeadDrafter(cell, 0.0))


@pytest.mark.parametrize("make", [lambda cell: HeadDrafter(cell, 0.0), hybrid], ids=["head", "hybrid"])
def test_texts_are_plain_decodings(
    executor: Executor, directory: Path, target: TargetVocabulary, plain: Texts, make: Callable[[Cell], Any]
) -> None:
    for native in (False, True):
        for k, limits in ((1, {}), (5, {}), (None, {}), (4, {"num_blocks": 18, "prefix_caching": False})):
            drafter = make(Cell(random_head(directory), target, native, sample_among))
            texts, engine = serve(executor, requests(), drafter, k, **limits)
            assert texts == plain and engine.stats.draft_tokens > 20
            head = drafter.head if isinstance(drafter, Hybrid) else drafter
            assert not head._states, "whoever has left leaves nothing"


class Scripted(Suffix):
    """Finds what it is told to."""

    def __init__(self, found: dict[int, list[int]], sure: float) -> None:
        super().__init__(0, 0.05)
        self.found, self.asked = found, list[int]()
        self.calibration.rates = [sure] * len(self.calibration.rates)

    def guess(self, state: Any, context: list[int], most: int, ahead: int = 0) -> Any:
        self.asked.append(context[-1])
        return [Guess(token, 0) for token in self.found.get(context[-1], [])[:most]]


class Steady(HeadDrafter):
    """Foresees the number after the last one, and notes what it has read."""

    def __init__(self, target: TargetVocabulary, directory: Path, sure: float) -> None:
        super().__init__(Cell(random_head(directory), target, False, sample_among), 0.1)
        self.sure, self.read = sure, list[int]()
        step = self.cell.step
        self.cell.step = lambda state, tokens: (self.read.extend(tokens.tolist()), step(state, tokens))[1]  # type: ignore[method-assign, func-returns-value]

    def foresee(self, state: Tensor, ends: Any) -> list[Foreseen]:
        return [Foreseen((draft[-1] if draft else s.tokens[-1]) + 1, self.sure) for s, draft in ends]


@pytest.mark.parametrize(
    ("found", "sure", "head_sure", "draft", "read", "asked"),
    [
        ({3: [50, 51, 52]}, 0.9, 0.8, [50, 51, 52, 53], [3, 50, 51, 52], [3, 52]),
        ({3: [50, 51, 52, 53]}, 0.9, 0.8, [50, 51, 52, 53], [], [3]),
        ({3: [50], 6: [60]}, 0.6, 0.7, [4, 5, 6, 7], [3, 4, 5, 6], [3, 4, 5, 6]),
        ({3: [50], 4: [60, 61]}, 0.7, 0.6, [50, 51, 52, 53], [3, 50, 51, 52], [3, 50, 51, 52]),
        (
            {},
            0.9,
            0.4,
            [4, 5, 6],
            [3, 4, 5],
            [3, 4, 5, 6],
        ),  # a third is likely enough, to ask for a fourth is not
        ({3: [50]}, 0.04, 0.04, [], [3], [3]),
    ],
)
def test_at_each_place_the_more_confident_one(
    directory: Path,
    target: TargetVocabulary,
    found: dict[int, list[int]],
    sure: float,
    head_sure: float,
    draft: list[int],
    read: list[int],
    asked: list[int],
) -> None:
    """The head reads only as far as it is asked; what was looked up is not looked up again while it is followed."""
    lookup, head = Scripted(found, sure), Steady(target, directory, head_sure)
    sequence = Sequence(Request(id="a", prompt=(1, 2, 3), params=SamplingParams(temperature=0.0)))
    both = Hybrid(lookup, head)
    head.observe([Verified(sequence, (), [3], (), torch.randn(1, HIDDEN))])
    (made,) = both.propose([sequence], [4])
    assert (made.tokens, head.read, lookup.asked) == (draft, read, asked)
    both.forget(sequence)
    assert both.propose([sequence], [4])[0].tokens == found.get(3, [])[: 4 if sure > 0.1 else 0]


def reader() -> RecurrentHead:
    torch.manual_seed(7)
    net = RecurrentHead(HIDDEN, 16)
    for weight in (net.linear.weight, net.gate.weight, net.up.weight, net.down.weight):
        torch.nn.init.normal_(weight, std=0.25)
    return net


def made_up(target: TargetVocabulary, count: int, seed: int) -> Lessons:
    """Texts of a model whose next state is a function of the last one and of the token: half linear, half not."""
    net = reader()
    rows, dice = target.rows(torch.arange(VOCAB)), torch.Generator().manual_seed(seed)
    tokens, states, state = [], [], torch.randn(1, HIDDEN, generator=dice)
    with torch.no_grad():
        for _ in range(count):
            p = (state @ rows.T).softmax(-1)
            token = torch.multinomial(p, 1, generator=dice)[0]
            tokens.append(token)
            states.append(state)
            state = net(state, target.embed(token))
    return Lessons(torch.cat(tokens), torch.cat(states), torch.arange(count - 4), 4)


def test_a_head_learns(target: TargetVocabulary) -> None:
    """A linear fit is a beginning, steps make it better; both are judged on other texts."""
    torch.manual_seed(0)
    seen, other = made_up(target, 3000, 1), made_up(target, 600, 2)
    teacher = Teacher(RecurrentHead(HIDDEN, 64), target, torch.arange(VOCAB))
    untaught = teacher.judge(other)
    teacher.fit(seen)
    fit, losses = teacher.judge(other), list[float]()
    teacher.teach(seen, 300, 128, losses.append, rate=3e-3)
    taught = teacher.judge(other)
    assert untaught.overlap[0] + 0.1 < fit.overlap[0] < taught.overlap[0] - 0.1
    assert taught.same[0] > fit.same[0] and sum(losses[-20:]) < sum(losses[:20])


def test_what_is_not_drafted_counts_as_missed(target: TargetVocabulary) -> None:
    """A head that is its target: then all that is missed is what it cannot draft, and what it spreads instead."""
    lessons, tokens = made_up(target, 400, 3), torch.arange(0, VOCAB, 2)
    same = reader()
    rows, p = target.rows(torch.arange(VOCAB)), []
    for start in lessons.starts.tolist():
        p.append((lessons.states[start + 1] @ rows.T).softmax(-1))
    whole = torch.stack(p)
    assert Teacher(same, target, torch.arange(VOCAB)).judge(lessons).overlap[0] == pytest.approx(1.0, abs=1e-4)
    judged = Teacher(same, target, tokens).judge(lessons)
    assert judged.overlap[0] == pytest.approx(float(whole[:, tokens].sum(-1).mean()), abs=1e-4)
    even = (whole.argmax(-1) % 2 == 0).float().mean()
    assert judged.same[0] == pytest.approx(float(even), abs=1e-6)


def test_the_most_frequent_tokens() -> None:
    assert most_frequent([[5, 5, 9, 7], [9, 5]], 2, 20).tolist() == [5, 9]
    assert most_frequent([[5, 5, 9]], 4, 20).tolist() == [0, 1, 5, 9]


def test_files_come_back(directory: Path, tmp_path: Path) -> None:
    head = random_head(directory)
    write_head(head, tmp_path)
    found = read_head(tmp_path, directory, ModelSpec.load(directory))
    assert found.manifest == head.manifest and torch.equal(found.tokens, head.tokens)
    for name, tensor in head.net.state_dict().items():
        assert torch.equal(found.net.state_dict()[name], tensor)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["drafter.json", "drafter.safetensors"]


@pytest.mark.parametrize(
    ("spoil", "sentence"),
    [
        (lambda home: (home / "drafter.json").unlink(), "there is no drafter.json in it"),
        (lambda home: (home / "drafter.safetensors").unlink(), "there is no drafter.safetensors in it"),
        (lambda home: (home / "drafter.json").write_text("[1]"), "cannot be read as a drafter's head"),
        (lambda home: _change(home, inner=25), "cannot be read as a drafter's head"),
        (lambda home: _change(home, more=1), "cannot be read as a drafter's head"),
        (lambda home: _change(home, hidden="x"), "cannot be read as a drafter's head"),
        (lambda home: _change(home, kind="attention"), "was made for another model than"),
        (lambda home: _change(home, target={"config.json": "0"}), "was made for another model than"),
        (lambda home: os.truncate(home / "drafter.safetensors", 100), "cannot be read as a drafter's head"),
        (lambda home: _pipe(home / "drafter.safetensors"), "is not a regular file"),
    ],
)
def test_files_that_cannot_be_used(
    directory: Path, tmp_path: Path, spoil: Callable[[Path], Any], sentence: str
) -> None:
    write_head(random_head(directory), tmp_path)
    spoil(tmp_path)
    with pytest.raises(ValueError, match=sentence) as error:
        read_head(tmp_path, directory, ModelSpec.load(directory))
    assert str(tmp_path) in str(error.value)


def _change(home: Path, **fields: Any) -> None:
    manifest = json.loads((home / "drafter.json").read_text())
    (home / "drafter.json").write_text(json.dumps(manifest | fields))


def _pipe(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


def test_strange_weights_are_refused(directory: Path, tmp_path: Path) -> None:
    head = random_head(directory)
    write_head(replace(head, tokens=torch.tensor([3, VOCAB])), tmp_path)
    with pytest.raises(ValueError, match="drafts tokens that the model does not have"):
        read_head(tmp_path, directory, ModelSpec.load(directory))
    head.net.scale.data[3] = float("nan")
    write_head(head, tmp_path)
    with pytest.raises(ValueError, match="holds numbers that are not finite"):
        read_head(tmp_path, directory, ModelSpec.load(directory))


def test_served_by_llm(tmp_path: Path) -> None:
    model = write_byte_level(write_llama(tmp_path / "model", seed=3, vocab_size=320))
    write_head(random_head(model), tmp_path / "head")
    params = SamplingParams(max_tokens=40, temperature=0.0, ignore_eos=True)
    plain = LLM(str(model), "cpu", 2048).generate([[5, 6, 7], [9, 8]], params)
    for kind in ("head", "hybrid"):
        speculate = SpeculateConfig(kind=kind, model=str(tmp_path / "head"), k=3, threshold=0.0)
        llm = LLM(str(model), "cpu", 2048, speculate=speculate)
        found = llm.generate([[5, 6, 7], [9, 8]], params)
        assert [one.tokens for one in found] == [one.tokens for one in plain] and llm.engine.stats.drafts
    other = write_byte_level(write_llama(tmp_path / "other", seed=8, vocab_size=320))
    with pytest.raises(ValueError, match="was made for another model"):
        LLM(str(other), "cpu", 2048, speculate=speculate)


def test_other_weights_are_taken_between_steps_and_when_there_is_no_work(directory: Path, tmp_path: Path) -> None:
    """Whoever told of them hears that they are in use, though no request has come since."""
    model = write_byte_level(write_llama(tmp_path / "model", seed=3, vocab_size=320))
    for version in (1, 2, 3):
        head = random_head(model, seed=version)
        write_head(replace(head, manifest=replace(head.manifest, version=version)), tmp_path / str(version))
    params = SamplingParams(max_tokens=40, temperature=1.0, seed=5, ignore_eos=True)
    plain = LLM(str(model), "cpu", 2048).generate([[5, 6, 7], [9, 8]], params)
    speculate = SpeculateConfig(kind="head", model=str(tmp_path / "1"), k=3, threshold=0.0, rule="coupled")
    llm = LLM(str(model), "cpu", 2048, speculate=speculate)
    engine, target = llm.engine, Target(llm.engine.executor)
    assert engine.speculator
    engine.speculator.staged.append(target.head(str(tmp_path / "2")))
    engine.heartbeat()
    assert engine.stats.drafter_version == 2
    for number, prompt in enumerate([[5, 6, 7], [9, 8]]):
        engine.add(Request(id=str(number), prompt=tuple(prompt), params=params))
    texts: dict[str, list[int]] = {"0": [], "1": []}
    while engine.has_work:
        for output in engine.step():
            texts[output.id] += output.tokens
        if len(texts["0"]) > 10 and engine.stats.drafter_version == 2:
            engine.speculator.staged.append(target.head(str(tmp_path / "3")))
    assert engine.stats.drafter_version == 3 and engine.stats.drafts
    assert list(texts.values()) == [one.tokens for one in plain]
