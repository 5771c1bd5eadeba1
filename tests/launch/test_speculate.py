"""suite=speculate: its traffic, its turns and its figures by hand, and a small run of the bundled model."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from stepladder.launch.bench.__main__ import suite_of
from stepladder.launch.bench.speculate.learning import Together
from stepladder.launch.bench.speculate.measures import Figures, differing, gain, step_errors
from stepladder.launch.bench.speculate.options import SpeculateBench
from stepladder.launch.bench.speculate.points import Case, Point, groups
from stepladder.launch.bench.speculate.suite import report, run
from stepladder.launch.bench.speculate.turns import Served, Side, serve, take_turns
from stepladder.launch.bench.speculate.watched import HeldOut, Step, Watched
from stepladder.launch.recipes.chat_material import Library
from stepladder.launch.recipes.chat_traffic import KINDS, messages
from stepladder.launch.report import publish
from stepladder.workers.core import Output, Request, SamplingParams, Sequence
from stepladder.workers.speculation.config import SpeculateConfig
from stepladder.workers.speculation.drafter import Verified
from stepladder.workers.speculation.drafters.ngram import NGram
from stepladder.workers.speculation.drafters.recycling import Recycling
from tests.composed import composed

SMALL = ["model=demo", "threads=1", "warm=8", "requests=2", "tokens=12", "kinds=[code]", "batches=[1,2]", "fixed=[2]"]


def options(run_dir: Path, *words: str) -> SpeculateBench:
    return suite_of(composed("bench", "suite=speculate", f"run_dir={run_dir}", *words))[0]


@pytest.fixture(scope="module")
def library() -> Library:
    return Library.read()


@pytest.mark.parametrize("kind", KINDS)
def test_the_traffic_is_the_same_for_the_same_seed_and_no_two_requests_are(kind: str, library: Library) -> None:
    asked = messages(kind, 300, 0, library)
    assert len({*asked}) == 300 and asked == messages(kind, 300, 0, library)
    assert asked[:50] == messages(kind, 50, 0, library), "what is asked first does not depend on how much is asked"
    assert len({*asked} & {*messages(kind, 300, 1, library)}) < 200
    assert all(len(message) < 600 and "{" + "name}" not in message for message in asked)


def test_the_library_is_the_same_each_time_it_is_read(library: Library) -> None:
    assert Library.read() == library
    assert len(library.functions) > 500 and len(library.paragraphs) > 300


def test_the_kinds_are_what_they_are_called(library: Library) -> None:
    prose, rewriting, code, tables = (messages(kind, 200, 0, library) for kind in KINDS)
    assert all(any(f"{f.name}" in message for f in library.functions) for message in prose[:20])
    assert all(any(message.endswith(text) for text in library.paragraphs) for message in rewriting)
    assert all("Python" in message and any(message.endswith(f.does) for f in library.functions) for message in code)
    assert all("table" in message or "JSON" in message for message in tables)
    for word in ("Markdown", "JSON", "Turn this JSON into"):
        assert 10 < sum(word in message for message in tables) < 190
    with pytest.raises(ValueError, match=r"only 3 different requests of rewriting here; 4 are wanted"):
        messages("rewriting", 4, 0, Library([], ["The only one."]))


def served(*batches: tuple[int, float]) -> list[Served]:
    return [Served(seconds, [[7] * tokens], [seconds / tokens]) for tokens, seconds in batches]


def test_a_gain_is_of_all_tokens_in_all_the_time() -> None:
    found = gain(served((10, 1.0), (10, 1.0), (40, 2.0)), served((10, 2.0), (10, 1.0), (40, 6.0)))
    assert found.value == pytest.approx(9 / 4) and found.median == pytest.approx(2)
    assert 1 <= found.low < found.value < found.high <= 3
    same = gain(served((10, 1.0), (30, 1.5)), served((10, 1.0), (30, 1.5)))
    assert same == (1.0, 1.0, 1.0, 1.0)


def test_texts_that_differ_are_counted() -> None:
    one, other = [Served(1.0, [[1, 2], [3]], [])], [Served(1.0, [[1, 2], [4]], [])]
    assert differing(one, one) == 0 and differing(one, other) == 1


def test_each_side_is_the_first_as_often_as_the_others() -> None:
    order: list[tuple[str, int]] = []

    class Noted(Side):
        def serve(self, engine: Any, requests: Any, at_once: int | None = None) -> Served:
            order.append((self.name, requests[0]))
            return Served(1.0, [], [])

    sides = [Noted("a"), Noted("b"), Noted("c")]
    take_turns(None, sides, [[0], [1], [2]])  # type: ignore[arg-type]
    assert order == [("a", 0), ("b", 0), ("c", 0), ("b", 1), ("c", 1), ("a", 1), ("c", 2), ("a", 2), ("b", 2)]
    assert all(len(side.served) == 3 for side in sides)


def test_a_stream_keeps_as_many_under_way() -> None:
    """Answers of 1, 2, 3, ... tokens: whoever ends makes room for the next one, until there are none left."""
    under_way, seen = dict[str, int](), list[int]()

    class OneTokenAStep:
        scheduler = SimpleNamespace(blocks=SimpleNamespace(forget=lambda: None))
        has_work = property(lambda _: bool(under_way))

        def add(self, request: Request) -> None:
            under_way[request.id] = len(request.prompt)

        def step(self) -> list[Output]:
            seen.append(len(under_way))
            outputs = []
            for name in list(under_way):
                under_way[name] -= 1
                if ended := not under_way[name]:
                    del under_way[name]
                outputs.append(Output(id=name, tokens=[5], finish_reason="length" if ended else None))
            return outputs

    requests = [Request(id=str(n), prompt=(1,) * n, params=SamplingParams()) for n in range(1, 6)]
    result = serve(OneTokenAStep(), requests, at_once=2)  # type: ignore[arg-type]
    assert [len(text) for text in result.texts] == [1, 2, 3, 4, 5]
    assert seen == [2] * 6 + [1] * 3, "fifteen tokens: the last one is alone at the end"
    seen.clear()
    serve(OneTokenAStep(), requests, at_once=5)  # type: ignore[arg-type]
    assert seen == [5, 4, 3, 2, 1]


def test_every_fifth_step_is_compared_and_not_learned() -> None:
    learned = HeldOut()
    for number in range(1, 101):
        learned.observe(1, 100, 3.0 if number % 5 == 0 else 2.0)
    learned.observe(7, 100, 1.0)
    assert learned(1, 100) == pytest.approx(2.0), "it has never learned from those that took 3 s"
    assert len(learned.compared) == 20
    speculator = Watched(NGram(), SpeculateConfig(kind="ngram"))
    speculator.held_out = learned
    errors = step_errors([speculator])
    assert list(errors) == ["1 token"]
    assert errors["1 token"].ratio == pytest.approx(2 / 3) and errors["1 token"].error == pytest.approx(100 / 3)


def verified(drafted: list[int], tokens: list[int]) -> Verified:
    sequence = Sequence(Request(id="a", prompt=(1, 2), params=SamplingParams()))
    sequence.tokens += tokens
    return Verified(sequence, drafted, tokens)


def test_acceptance_is_of_the_tokens_that_were_reached() -> None:
    speculator = Watched(NGram(), SpeculateConfig(kind="ngram"))
    speculator.watch.add([verified([5, 6, 7], [5, 6, 7, 8]), verified([5, 6, 7], [5, 9]), verified([], [4])])
    speculator.watch.add([verified([5, 6], [5])])  # it ended with that one: nobody knows of the other
    figures = Figures.of(Side("ngram", speculator, served((8, 2.0))))
    assert figures.accepted == pytest.approx([1.0, 1 / 2, 1.0]) and speculator.watch.reached == [3, 2, 1]
    assert figures.length == pytest.approx(1 + 5 / 3), "each draft's accepted tokens, and the one behind them"
    assert figures.per_second == 4.0 and figures.per_token == pytest.approx((250.0, 250.0))


def test_the_predicted_gain_is_of_learned_times_and_accepted_tokens() -> None:
    """A token takes 1 s, three take 1.5 s; three tokens a step are then twice as fast, less what drafting takes."""
    speculator = Watched(NGram(), SpeculateConfig(kind="ngram"))
    for tokens, seconds in ((1, 1.0), (3, 1.5)) * 20:
        speculator.step_time.observe(tokens, 0, seconds)
    speculator.begin()
    speculator.watch.steps += [Step(3, 0, 1, 2, 3)] * 10
    assert speculator.predicted_gain() == pytest.approx(2.0)
    speculator.watch.draft_seconds = 15.0
    assert speculator.predicted_gain() == pytest.approx(1.0)


def test_drafters_that_learn_together_learn_what_each_would_alone() -> None:
    alone, pair = Recycling(50), (Recycling(50), Recycling(50))
    together = Together(pair)
    for drafter in (alone, together):
        sequence = Sequence(Request(id="a", prompt=(1, 2), params=SamplingParams()))
        for token in (3, 4, 5, 3, 4, 5, 3):
            drafter.propose([sequence], [4])
            sequence.tokens.append(token)
            drafter.observe([Verified(sequence, [], [token], [[token]])])
        drafter.forget(sequence)
    assert together.likely == 1
    assert all(one.successors == alone.successors and one.successors[4] == 5 for one in pair)


def test_whole_batches() -> None:
    requests: Any = list(range(7))
    assert groups(requests, 3) == [[0, 1, 2], [3, 4, 5]] and groups(requests, 9) == [requests]


def test_a_small_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = options(tmp_path, *SMALL, "drafters=[suffix,recycling]")
    result = run(config)
    assert result.summary["texts that differ from plain decoding's"] == (0, "<= 0", True)
    publish(result, ["suite=speculate", *SMALL], tmp_path)
    assert "batch 2: least over none:" in capsys.readouterr().out and (tmp_path / "speculate.png").stat().st_size > 1e4
    cases = json.loads((tmp_path / "speculate-cases.json").read_text())["cases"]
    assert [(case["kind"], case["temperature"], case["batch"]) for case in cases] == [
        ("code", t, b) for t in (0.0, 1.0) for b in (1, 2)
    ]
    for case in cases:
        sides = ["none", *(["none again"] if not case["temperature"] else []), "suffix", "recycling", "suffix k=2"]
        assert list(case["figures"]) == sides and case["of_best_fixed"] > 0
        turns = case["tokens_and_seconds"]
        assert all([tokens for tokens, _ in turns[side]] == [tokens for tokens, _ in turns["none"]] for side in sides)
        assert all(figures["per_second"] > 0 for figures in case["figures"].values())
        assert case["figures"]["none"]["predicted"] is None and case["figures"]["suffix k=2"]["predicted"] > 0
    assert any(case["figures"]["suffix k=2"]["accepted"] for case in cases), "nobody has drafted"


def test_a_drafter_with_a_model_of_its_own(tmp_path: Path) -> None:
    """The bundled model drafts for itself: with the same noise it is always right."""
    words = ["drafters=[model]", "draft_model=launch/demo_model", "batches=[1]", "warm=1", "spread=none", "threshold=0"]
    (case,) = run(options(tmp_path, *SMALL, "temperatures=[1.0]", *words)).details["cases"]["cases"]
    assert {*case["figures"]["model k=2"]["accepted"]} == {1.0} and case["texts_that_differ"]["model k=2"] == 0
    assert case["figures"]["model k=2"]["length"] > 2 and [*case["figures"]] == ["none", "model", "model k=2"]


def test_the_summary_holds_what_is_wanted_of_smollm2_only(tmp_path: Path) -> None:
    fast = {"suffix": (60, 1.0), "ngram": (60, 1.9), "suffix k=4": (60, 0.9)}
    sides = [Side("none", None, served((60, 2.0))), Side("none again", None, served((60, 2.1)))]
    sides += [Side(name, Watched(NGram(), SpeculateConfig(kind="ngram")), served(took)) for name, took in fast.items()]
    point = Point.of(Case("tables", 0.0, 1), sides)
    words = ["kinds=[tables]", "drafters=[suffix,ngram]", "fixed=[4]", "batches=[1]", "temperatures=[0.0]"]
    goals = report(options(tmp_path, *words), [point], {}).summary
    assert goals["tables, greedy, batch 1: suffix / none, 1 pairs after 200 requests"] == (2.0, ">= 1.6", True)
    least = goals["batch 1: least over none: ngram, tables, greedy"]
    assert least.value == pytest.approx(2 / 1.9) and least.goal == ">= 0.952", "plain decoding lost so much to itself"
    regret = goals["batch 1: suffix over its best fixed length, mean over traffic"]
    assert regret.value == pytest.approx(0.9) and not regret.holds
    assert not goals["predicted step time, % off, worst: no size was met often enough"].holds
    others = report(options(tmp_path, *words, "model=demo"), [point], {}).summary
    assert not any("suffix / none" in name for name in others)


@pytest.mark.parametrize(
    ("word", "sentence"),
    [
        ("kinds=[poems]", "kinds is ['poems']; it must name one or more of prose, rewriting, code, tables, each once"),
        (
            "drafters=[]",
            "drafters is []; it must name one or more of ngram, suffix, recycling, model, head, hybrid, each once",
        ),
        ("drafters=[suffix,suffix]", "each once"),
        ("drafters=[model]", "speculate.kind is model, and speculate.model is None"),
        ("fixed=[0]", "speculate.k is 0; it must be from 1 to"),
        ("batches=[0]", "every batch must be at least 1"),
        ("batches=[]", "batches is []; it must hold one value or more"),
        ("temperatures=[-1.0]", "every temperature at least 0"),
        ("rule=auto", "rule is 'auto'; it must be coupled or rejection"),
        ("spread=some", "spread is 'some'; it must be first, all or none"),
        ("requests=0", "requests is 0"),
        ("threshold=2", "speculate.threshold is 2"),
    ],
)
def test_what_cannot_be_measured_is_one_sentence(word: str, sentence: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError) as error:
        options(tmp_path, word)
    assert sentence in str(error.value) and "\n" not in str(error.value)
