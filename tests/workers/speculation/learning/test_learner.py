"""A learner on one rank: from nothing, from a version's head, when there is work, and what candidates are worth."""

import math
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from stepladder.parallel.checkpoint import fingerprints
from stepladder.parallel.spec import ModelSpec
from stepladder.workers.speculation.head.files import Head, read_head, write_head
from stepladder.workers.speculation.head.net import RecurrentHead
from stepladder.workers.speculation.head.teach import Teacher
from stepladder.workers.speculation.head.vocabulary import TargetVocabulary
from stepladder.workers.speculation.learning.learner import Learner
from stepladder.workers.speculation.learning.learner_config import LearnerConfig
from stepladder.workers.speculation.learning.lessons import Lessons
from stepladder.workers.training.ranks import Ranks, training_ranks
from tests.workers.speculation.learning.texts import CONFIG, HIDDEN, VOCAB, captured, target_of


@pytest.fixture(scope="module")
def ranks() -> Iterator[Ranks]:
    with training_ranks() as ranks:
        yield ranks


@pytest.fixture(scope="module")
def target(directory: Path) -> TargetVocabulary:
    return target_of(directory)


@pytest.fixture
def make(target: TargetVocabulary, directory: Path, ranks: Ranks) -> Iterator[Any]:
    made = list[Learner]()

    def one(live: Head | None = None, **changes: Any) -> Learner:
        made.append(Learner(target, directory, ranks, replace(CONFIG, **changes), live))
        return made[-1]

    yield one
    for learner in made:
        learner.close()


def worked_off(learner: Learner) -> int:
    """Micro-batches until nothing is due."""
    before = learner.micro_batches
    while learner.due:
        learner.micro_batch()
    return learner.micro_batches - before


def test_it_starts_from_a_linear_fit_as_soon_as_there_are_enough_places(make: Any, target: TargetVocabulary) -> None:
    learner = make(drafted=VOCAB, rate=1e-9)
    requests = [each for each in captured(target, range(1, 20), way=1) if each.request % 4]
    learner.add(requests[:7])  # of 20 tokens, the last two of which nothing can be learnt from
    assert learner.replay.places == 126 < learner.places_to_fit == 4 * HIDDEN and not learner.due
    learner.add(requests[7:8])
    assert learner.due and not learner.begun
    learner.micro_batch()
    fitted = RecurrentHead(HIDDEN, 48)
    Teacher(fitted, target, torch.arange(VOCAB)).fit(Lessons.of([each.lesson for each in requests[:8]], 2))
    assert learner.begun and (learner.net.linear.weight - fitted.linear.weight).abs().max() < 1e-4
    assert learner.teacher.tokens.tolist() == list(range(VOCAB))


def test_so_many_steps_for_so_many_tokens_and_none_without(make: Any, target: TargetVocabulary) -> None:
    learner = make()  # 6 steps of 2 micro-batches for 160 tokens
    learner.add(captured(target, range(33), way=1))
    assert worked_off(learner) == 12 * 24 * 20 // 160 and learner.steps == 18
    assert not learner.due and worked_off(learner) == 0
    learner.add(captured(target, range(100, 104), way=1))
    assert worked_off(learner) == pytest.approx(12 * 3 * 20 / 160, abs=1), "of four requests one is held out"


def test_it_can_be_judged_by_requests_long_enough_for_the_drafts_that_are_judged(
    make: Any, target: TargetVocabulary
) -> None:
    learner = make(judged_depth=6)
    learner.add(captured(target, range(0, 40, 4), way=1, tokens=6))
    assert len(learner.replay.window(10)) == 10 and not learner.can_judge
    learner.add(captured(target, range(100, 112, 4), way=1))
    assert not learner.can_judge
    learner.add(captured(target, range(112, 116, 4), way=1))
    assert learner.can_judge


def test_what_is_owed_is_bounded_by_what_is_held(make: Any, target: TargetVocabulary) -> None:
    learner = make(max_tokens=320)
    for first in range(0, 400, 40):  # nobody let it learn meanwhile
        learner.add(captured(target, range(first, first + 40), way=1))
    assert worked_off(learner) == 24


def test_a_shift_is_learnt_and_the_gate_opens_for_what_is_better_only(make: Any, target: TargetVocabulary) -> None:
    learner = make()
    learner.add(captured(target, range(160), way=1))
    worked_off(learner)
    first = learner.candidate()
    assert first.passes and len(first.scores) == 32 and first.live == [0.0] * 32, "there was none"
    assert first.head.manifest.target and first.head.manifest.hidden == HIDDEN
    window = first.head.manifest.window
    assert window.requests > 100 and window.domains == learner.replay.domains
    assert window.tokens == sum(window.domains.values()) > 0
    learner.compare_with(first.head)
    again = learner.candidate()
    assert again.scores == again.live == first.scores and not again.passes, "the same is not better"
    learner.add(captured(target, range(200, 360), way=2))
    stale = learner.candidate()
    assert not stale.passes and sum(stale.scores) < 0.8 * sum(first.scores), "nothing was learnt of the new kind yet"
    worked_off(learner)
    shifted = learner.candidate()
    assert shifted.passes and shifted.live == stale.live and shifted.overlap[0] > stale.overlap[0] + 0.05
    assert (
        shifted.verdict.difference == pytest.approx(sum(shifted.scores) / 32 - sum(shifted.live) / 32)
        and shifted.head.manifest.figures["difference"] == shifted.verdict.difference
    )
    with torch.no_grad():  # a planted worse one
        learner.compare_with(shifted.head)
        for weight in learner.net.parameters():
            weight.add_(0.3 * torch.randn_like(weight))
    assert not learner.candidate().passes


def test_scores_are_expected_accepted_tokens(make: Any, target: TargetVocabulary) -> None:
    """Against a loop over one held-out request, in fp64."""
    learner = make(judged=1, judged_depth=3)
    learner.add(captured(target, range(1, 30), way=1, tokens=90))
    worked_off(learner)
    found = learner.candidate()
    held = learner.replay.window(1)[0].lessons[0]
    net, tokens, everything = found.head.net.double(), found.head.tokens, target.rows(torch.arange(VOCAB)).double()
    lengths, overlaps = [], torch.zeros(3, dtype=torch.float64)
    for piece in (range(32), range(32, 64), range(64, 90)):
        for start in piece[:-3]:
            state, chance, length = held.states[start][None].double(), 1.0, 0.0
            for place in range(3):
                state = net(state, target.embed(held.tokens[start + place][None]).double())
                q = net.logits(state, everything[tokens]).softmax(-1)[0]
                p = (held.states[start + place + 1].double() @ everything.T).softmax(-1)
                overlap = float(torch.minimum(p[tokens], q).sum())
                overlaps[place] += overlap
                chance *= overlap
                length += chance
            lengths.append(length)
    assert found.scores == pytest.approx([sum(lengths) / len(lengths)], rel=1e-4)
    assert found.overlap == pytest.approx((overlaps / len(lengths)).tolist(), rel=1e-4)


def test_a_candidate_is_judged_piece_by_piece_as_it_was_when_considered(make: Any, target: TargetVocabulary) -> None:
    learner = make()
    learner.add(captured(target, range(60), way=1))
    worked_off(learner)
    learner.consider()
    weights, pieces = learner.weights(), 1
    while learner.judge():
        pieces += 1
        learner.add(captured(target, range(1000 + pieces, 1001 + pieces), way=3))
        if learner.due:
            learner.micro_batch()
    found = learner.candidate()
    assert pieces == 15 == len(found.scores)
    assert all(torch.equal(weight, weights[name]) for name, weight in found.head.net.state_dict().items())
    assert any(not torch.equal(weight, weights[name]) for name, weight in learner.weights().items())
    with pytest.raises(AssertionError, match="nothing is considered"):
        learner.judge()


def test_after_a_kill_it_goes_on_from_the_last_version(
    make: Any, target: TargetVocabulary, directory: Path, tmp_path: Path
) -> None:
    """A head that was written, in a process that knows nothing else: its cell is as large as it was."""
    before = make(inner=24, drafted=VOCAB)
    before.add(captured(target, range(160), way=1))
    worked_off(before)
    published = before.candidate()
    write_head(published.head, tmp_path)
    live = read_head(tmp_path, directory, ModelSpec.load(directory))
    after = make(live, drafted=VOCAB)
    assert after.inner == 24 and after.begun and not after.due
    assert after.teacher.tokens.tolist() == published.head.tokens.tolist()
    after.add(captured(target, range(4, 5), way=1))
    after.add(captured(target, range(200, 260), way=1))
    same = after.candidate()
    assert same.scores == pytest.approx(same.live, abs=1e-6) and min(same.scores) > 0 and not same.passes
    losses = [after.micro_batch() for _ in range(12)]
    fresh = make(inner=24, drafted=VOCAB)
    fresh.add(captured(target, range(200, 260), way=1))
    assert sum(losses) < sum(fresh.micro_batch() for _ in range(12))


def test_it_goes_back_to_the_live_head_with_a_fresh_optimizer(make: Any, target: TargetVocabulary) -> None:
    learner = make()
    learner.add(captured(target, range(160), way=1))
    worked_off(learner)
    live = learner.candidate().head
    learner.add(captured(target, range(200, 300), way=2))
    worked_off(learner)
    learner.begin_with(live)
    assert all(torch.equal(weight, live.net.state_dict()[name]) for name, weight in learner.weights().items())
    assert all(not value.any() for s in learner.engine.optimizer.state.values() for value in s.values())
    learner.micro_batch(), learner.micro_batch()
    moved = max(float((w - live.net.state_dict()[n]).abs().max()) for n, w in learner.weights().items())
    assert moved == pytest.approx(3e-3, rel=0.05), "Adam's first step is as long as its rate"


def test_a_candidate_is_the_average_of_its_last_steps(make: Any, target: TargetVocabulary) -> None:
    plain, averaged = make(average=0.0), make(average=0.75)
    expected: dict[str, torch.Tensor] = {}
    for learner in (plain, averaged):
        learner.add(captured(target, range(160), way=1))
    for _ in range(6):
        for learner in (plain, averaged):
            for _ in range(learner.config.accumulate):
                learner.micro_batch()
        now = plain.weights()
        expected = {name: 0.75 * expected[name] + 0.25 * now[name] for name in now} if expected else now
    found = averaged.candidate().head.net.state_dict()
    assert all(torch.allclose(found[name], expected[name], atol=1e-6) for name in expected)
    latest = plain.candidate().head.net.state_dict()
    assert all(torch.equal(latest[name], weight) for name, weight in plain.weights().items())
    assert any(not torch.allclose(latest[name], found[name], atol=1e-5) for name in expected)
    averaged.begin_with(plain.candidate().head)
    assert all(torch.equal(latest[name], weight) for name, weight in averaged.weights().items()), "nothing of before"


def test_the_draft_vocabulary_follows_the_traffic(make: Any, target: TargetVocabulary) -> None:
    learner = make(drafted=40)
    learner.add(captured(target, range(100), way=1))
    worked_off(learner)
    first = learner.candidate().head
    learner.add(captured(target, range(200, 500), way=2))
    worked_off(learner)
    second = learner.candidate().head
    assert first.tokens.tolist() != second.tokens.tolist() == learner.teacher.tokens.tolist()
    for head, way in ((first, range(100)), (second, range(200, 500))):
        texts = torch.cat([each.lesson.tokens for each in captured(target, way, 1 if head is first else 2)])
        assert len(head.tokens) == 40 and float(torch.isin(texts, head.tokens).float().mean()) > 0.42


@pytest.mark.parametrize("changes", [{"precision": "bf16"}, {"errors_only": True}, {"objective": "lk_hybrid"}])
def test_options_reach_what_they_are_for(make: Any, target: TargetVocabulary, changes: dict[str, Any]) -> None:
    requests = captured(target, range(80), way=1)
    for each in requests:
        each.lesson.wrong[5] = True
    losses = []
    for options in ({}, changes):
        learner = make(**options)
        learner.add(requests)
        losses.append([learner.micro_batch() for _ in range(16)])
        assert sum(losses[-1][-8:]) < sum(losses[-1][:8]) and all(map(math.isfinite, losses[-1]))
    assert losses[0] != losses[1]


def test_a_loss_that_is_no_number_ends_it_and_passes_no_gate(make: Any, target: TargetVocabulary) -> None:
    learner = make(average=0.0)
    learner.add(captured(target, range(80), way=1))
    worked_off(learner)
    with torch.no_grad():
        learner.net.down.weight[0, 0] = math.nan
    with pytest.raises(RuntimeError, match="the loss of a drafter's head is nan after 45 steps; lower its rate"):
        learner.micro_batch()
    assert not learner.candidate().passes


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"objective": "mse"}, "there is no objective 'mse'"),
        ({"rate": 0.0}, "rate is 0.0; it must be above 0, or null"),
        ({"rate": math.nan}, "rate is nan"),
        ({"average": 1.0}, "average is 1.0; it must be 0 or more, and below 1"),
        ({"held_out": 1}, "held_out is 1; it must be 2 or more"),
        ({"zero_stage": 0}, "zero_stage is 0; it must be 1, 2 or 3"),
        ({"precision": "fp16"}, "precision is 'fp16'"),
        ({"margin": -0.1}, "margin is -0.1"),
        ({"batch": 0}, "batch is 0; it must be 1 or more"),
        ({"judged_depth": 0}, "judged_depth is 0"),
    ],
)
def test_numbers_that_cannot_be(changes: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        LearnerConfig(**changes)


def test_a_head_of_another_size_is_refused(make: Any, directory: Path, target: TargetVocabulary) -> None:
    learner = make()
    learner.add(captured(target, range(80), way=1))
    worked_off(learner)
    head = learner.candidate().head
    assert head.manifest.target == fingerprints(directory)
    with pytest.raises(ValueError, match="reads 16 numbers, not 32"):
        make(replace(head, net=RecurrentHead(16, 8)))
