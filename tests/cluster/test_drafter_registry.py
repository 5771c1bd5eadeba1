"""Which version of a drafter is live: published, watched, taken back, pinned; and after a restart the same."""

import json
import random
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from stepladder.cluster.drafter_evidence import ENOUGH, LEAST, Counts, Recent, is_worse
from stepladder.cluster.drafter_registry import KEPT_LINES, Registry, Told


class Engine:
    """Serves requests whose drafts are accepted with a rate of their version; tells its counts as an engine does."""

    def __init__(self, name: str, rates: dict[int, float], seed: int = 0) -> None:
        self.name, self.rates, self.dice = name, rates, random.Random(seed)
        self.told = Told(1, 0)

    def take(self, version: int) -> None:
        self.told = self.told._replace(version=version, guesses=0, right=0)

    def serve(self, requests: int = 1, tokens: int = 80) -> None:
        """A guess for every token; requests differ."""
        for _ in range(requests):
            rate = min(0.95, max(0.02, self.dice.gauss(self.rates[self.told.version], 0.12)))
            right = sum(self.dice.random() < rate for _ in range(tokens))
            told = self.told
            self.told = told._replace(
                guesses=told.guesses + tokens,
                right=told.right + right,
                drafts=told.drafts + tokens - right,
                accepted=told.accepted + right,
            )

    def tell(self, registry: Registry) -> str | None:
        if registry.live is not None and self.name in registry.behind():
            self.take(registry.live)
        return registry.observe(self.name, self.told, time=0.0)

    def until_told(self, registry: Registry, requests: int) -> tuple[int, str | None]:
        """Requests that it took until something changed."""
        for number in range(1, requests + 1):
            self.serve()
            if line := self.tell(registry):
                return number, line
        return requests, None


def served(rates: dict[int, float], requests: int = 60) -> tuple[Registry, Engine, list[Any]]:
    """A registry whose version 6 is live and known, an engine that has it, and what was saved."""
    saved: list[Any] = []
    registry, engine = Registry(save=lambda state: saved.append(json.loads(json.dumps(state)))), Engine("e", rates)
    registry.published(6, {"overlap": 0.61}, 1.0)
    engine.take(6)
    for _ in range(requests):
        engine.serve()
        engine.tell(registry)
    return registry, engine, saved


def test_a_published_version_is_live_and_told() -> None:
    registry = Registry()
    assert registry.live is None and registry.behind() == [] and registry.figures() == {}
    assert registry.published(6, {"overlap": 0.61}, 1.0) == "published 6: overlap 0.61; it is live"
    line = registry.published(7, {"overlap": 0.64, "before": 0.61, "loss": 1.5}, 2.0)
    assert line == "published 7: overlap 0.61 -> 0.64; it is live" and registry.live == 7
    assert registry.report()["lines"][-1] == (2.0, line)
    assert registry.published(7, {}, 3.0) is None and registry.published(5, {}, 3.0) is None, "known, and old"
    assert registry.figures() == {
        "drafter/version": 7.0, "drafter/overlap": 0.64, "drafter/before": 0.61, "drafter/loss": 1.5,
    }  # fmt: skip
    assert registry.published(8, {}, 4.0) == "published 8; it is live"


def test_engines_that_have_not_taken_it_are_told_again() -> None:
    registry = Registry()
    registry.published(7, {}, 1.0)
    for name, version in (("a", 7), ("b", 6), ("c", 0)):
        registry.observe(name, Told(1, version), 1.0)
    assert registry.behind() == ["b", "c"]
    registry.observe("b", Told(1, 7), 2.0)
    registry.gone("c")
    assert registry.behind() == []
    registry.observe("b", Told(2, 0), 3.0)
    registry.observe("c", Told(1, 0), 3.0)
    assert registry.behind() == ["b", "c"], "a new life begins with what it was started with"


def test_acceptance_is_counted_over_lives_of_engines() -> None:
    registry = Registry()
    registry.published(1, {}, 0.0)

    def tell(*told: int, engine: str = "a") -> float:
        registry.observe(engine, Told(*told), 0.0)
        return registry.figures()["drafter/acceptance"]

    assert tell(1, 1, 40, 20, 9, 18) == 0.5
    assert "drafter/accepted_length" not in registry.figures(), "what came before cannot be told apart"
    assert tell(1, 1, 40, 20, 9, 18) == 0.5, "nothing new"
    assert tell(1, 1, 80, 20, 19, 18) == 20 / 80
    assert tell(2, 1, 40, 40, 10, 30) == 60 / 120
    assert registry.figures()["drafter/accepted_length"] == 1 + 30 / 20
    assert tell(2, 0, 70, 0, 20, 30) == 60 / 120, "of another version"
    assert tell(2, 1, 20, 0, 20, 30) == 60 / 140, "taken anew"
    assert tell(2, 1, 10, 0, 20, 30) == 60 / 150, "and once more since then"
    registry.gone("a")
    assert tell(2, 1, 10, 0, 20, 30) == 60 / 150, "it was away for a moment"
    assert tell(7, 1, 50, 0, engine="b") == 60 / 200


def test_a_curve_over_versions_has_the_newest_guesses_of_any() -> None:
    """500 of them; batches are of 100 here. What was drafted before there were weights does not count."""
    registry = Registry()
    registry.observe("a", Told(1, 0, 0, 0, 50, 150), 0.0)
    registry.published(1, {}, 0.0)
    assert "spec/acceptance" not in registry.figures()
    for number in range(1, 11):
        registry.observe("a", Told(1, 1, 100 * number, 20 * number, 50 + 40 * number, 150 + 40 * number), 0.0)
    assert registry.figures()["spec/acceptance"] == 0.2 and registry.figures()["spec/accepted_length"] == 2.0
    registry.published(2, {}, 0.0)
    for number in range(1, 4):
        registry.observe("a", Told(1, 2, 100 * number, 70 * number, 450 + 40 * number, 550 + 80 * number), 0.0)
    found = registry.figures()
    assert found["drafter/version"] == 2 and found["drafter/acceptance"] == 0.7
    assert found["spec/acceptance"] == (2 * 20 + 3 * 70) / 500
    assert found["spec/accepted_length"] == 1 + (2 * 40 + 3 * 80) / (5 * 40)


@pytest.mark.parametrize(("old", "new"), [(0.6, 0.45), (0.55, 0.3), (0.8, 0.1)])
def test_a_worse_version_is_taken_back_within_200_requests(old: float, new: float) -> None:
    registry, engine, saved = served({6: old, 7: new})
    registry.published(7, {"overlap": 0.9}, 2.0)
    requests, line = engine.until_told(registry, 200)
    assert line and line.startswith("rolled back to 6: acceptance 0.") and line.endswith("tokens; 7 is rejected")
    assert registry.live == 6 and requests < 200 and registry.behind() == ["e"]
    assert saved[-1]["live"] == 6 and list(saved[-1]["rejected"]) == ["7"]
    assert registry.published(7, {"overlap": 0.9}, 3.0) is None and registry.live == 6
    registry.pause(4.0)
    registry.resume(4.0)
    assert registry.live == 6, "never again by itself"
    assert registry.published(8, {}, 5.0) and registry.live == 8


@pytest.mark.parametrize("rate", [0.3, 0.6, 0.8])
def test_an_equal_version_is_kept(rate: float) -> None:
    kept = 0
    for seed in range(12):
        registry, engine, _ = served({6: rate, 7: rate})
        engine.dice.seed(seed)
        registry.published(7, {}, 2.0)
        _, line = engine.until_told(registry, 600)
        kept += bool(line and line.startswith("kept 7: acceptance 0."))
        assert (registry.live == 7) == bool(line and "kept" in line)
    assert kept >= 11


def test_a_better_version_is_kept_though_traffic_gets_harder_later() -> None:
    registry, engine, _ = served({6: 0.4, 7: 0.6})
    registry.published(7, {}, 2.0)
    _, line = engine.until_told(registry, 1000)
    assert line and line.startswith("kept 7")
    engine.rates[7] = 0.1
    assert engine.until_told(registry, 300)[1] is None and registry.live == 7


def test_nothing_is_said_of_a_few_guesses() -> None:
    one, other = Recent(), Recent()
    one.add(Counts(LEAST, LEAST))
    other.add(Counts(LEAST - 1, 0))
    assert not is_worse(other.evidence(), one.evidence()) and not is_worse(one.evidence(), other.evidence())
    other.add(Counts(1, 0))
    assert is_worse(other.evidence(), one.evidence()) and not is_worse(one.evidence(), other.evidence())


def test_requests_that_differ_say_less_than_coins() -> None:
    """The same share, once in equal batches and once all or nothing."""
    even, uneven = Recent(), Recent()
    for batch in range(40):
        even.add(Counts(100, 50))
        uneven.add(Counts(100, 100 * (batch % 2)))
    assert even.evidence().rate == uneven.evidence().rate == 0.5
    assert even.evidence().error * 4 < uneven.evidence().error


def test_only_the_newest_guesses_count() -> None:
    recent = Recent()
    for _ in range(200):
        recent.add(Counts(300, 300))
    for _ in range(10):
        recent.add(Counts(300, 0))
    assert recent.evidence(3000).rate == 0.0 and 0.7 < recent.evidence().rate < 0.8
    assert recent.total == 63_000 and len(recent._batches) < 50
    recent.add(Counts(10**6, 0))
    assert recent.evidence(1000).guesses == 1000, "one batch of all times is no more than the newest"


def test_what_was_live_for_a_moment_is_not_gone_back_to() -> None:
    """Nothing is known of 7 when 8 takes its place; 6 is what 8 is held against."""
    registry, engine, _ = served({6: 0.6, 7: 0.6, 8: 0.2})
    registry.published(7, {}, 2.0)
    registry.published(8, {}, 2.0)
    _, line = engine.until_told(registry, 200)
    assert line and line.startswith("rolled back to 6") and registry.live == 6


def test_orders() -> None:
    registry = Registry()
    with pytest.raises(ValueError, match="there is no earlier version of the drafter to go back to"):
        registry.rollback(0.0)
    for number in (1, 2, 3):
        registry.published(number, {}, 0.0)
    assert registry.rollback(1.0) == "rolled back to 1: by order; 3 is rejected"
    assert registry.pin(2, 2.0) == "pinned 2 by order; it stays live until learning is resumed"
    assert registry.named == {1, 2} and registry.live == 2
    with pytest.raises(ValueError, match="version 2 of the drafter is pinned; pin another one, or resume"):
        registry.rollback(2.0)
    assert registry.published(4, {}, 3.0) == "published 4; it waits, since 2 is pinned"
    assert registry.live == 2
    assert registry.resume(4.0) == "resumed by order; 4 is live"
    registry.pause(5.0)
    assert registry.paused and registry.published(5, {}, 5.0) == "published 5; it waits, since learning is paused"
    assert registry.live == 4
    assert registry.resume(6.0) == "resumed by order; 5 is live" and not registry.paused
    assert registry.resume(7.0) == "resumed by order"
    registry.pin(3, 8.0)
    assert registry.live == 3 and registry.report()["rejected"] == {}, "who pins it knows better"


def test_what_versions_are_called() -> None:
    """The newest one comes last, whatever it is called: W&B calls what it is given last the latest."""
    registry = Registry()
    assert registry.uses() == {}
    registry.published(1, {"overlap": 0.5}, 0.0)
    assert registry.uses() == {1: ["live"]} and registry.scores(1) == {"overlap": 0.5}
    registry.published(2, {}, 0.0)
    assert list(registry.uses().items()) == [(1, ["previous"]), (2, ["live"])]
    registry.rollback(0.0)
    assert list(registry.uses().items()) == [(1, ["live"]), (2, [])] and registry.scores(9) == {}


def test_a_pinned_version_is_not_judged() -> None:
    registry, engine, _ = served({6: 0.6, 7: 0.2, 8: 0.6})
    registry.pin(7, 2.0)
    assert engine.until_told(registry, 100)[1] is None and registry.live == 7


def test_a_version_that_an_engine_cannot_take_is_nobodys() -> None:
    registry, _, _ = served({6: 0.6})
    registry.observe("f", Told(3, 6), 1.0)
    registry.published(7, {}, 2.0)
    line = registry.refused("f", 7, "it is damaged", 2.0)
    assert line == "rolled back to 6: f cannot take 7: it is damaged; 7 is rejected"
    assert registry.refused("e", 7, "it is damaged", 2.0) is None and registry.behind() == []
    registry.pin(7, 3.0)
    assert registry.behind() == ["e", "f"], "it is tried again by order"
    assert registry.refused("f", 7, "it is damaged", 3.0) == "f cannot take 7, which is pinned: it is damaged"
    assert registry.live == 7 and registry.behind() == ["e"], "and not over and over"


@pytest.mark.parametrize("instead", ["resume", "pin"])
def test_what_was_pinned_and_cannot_be_taken_is_not_gone_back_to(instead: str) -> None:
    """Nor does it stay live once it is not pinned any more: no engine would ever have the live version."""
    registry, _, saved = served({6: 0.6})
    registry.pin(7, 2.0)
    registry.refused("e", 7, "it is damaged", 2.0)
    if instead == "resume":
        line = registry.resume(3.0)
        assert line == "resumed by order; rolled back to 6: e cannot take 7: it is damaged; 7 is rejected"
        assert list(saved[-1]["rejected"]) == ["7"] and registry.live == 6
        return
    registry.pin(6, 3.0)
    assert registry.resume(4.0) == "resumed by order" and registry.live == 6
    with pytest.raises(ValueError, match="there is no earlier version"):
        registry.rollback(5.0)


def test_what_could_be_taken_after_all_stays() -> None:
    """Its file was mended."""
    registry, _, _ = served({6: 0.6})
    registry.pin(7, 2.0)
    registry.refused("e", 7, "it is damaged", 2.0)
    registry.observe("e", Told(1, 7), 3.0)
    assert registry.resume(4.0) == "resumed by order" and registry.live == 7


def test_a_waiting_version_takes_the_place_of_one_that_cannot_be_taken() -> None:
    registry, _, _ = served({6: 0.6})
    registry.pin(7, 2.0)
    registry.refused("e", 7, "it is damaged", 2.0)
    registry.published(8, {}, 3.0)
    line = registry.resume(4.0)
    assert line.startswith("resumed by order; rolled back to 6: e cannot take 7") and line.endswith("; 8 is live")
    assert registry.live == 8 and registry.report()["previous"] == 6


def test_the_first_version_that_nobody_can_take_leaves_what_there_was() -> None:
    registry = Registry()
    registry.published(1, {}, 0.0)
    registry.observe("e", Told(1, 0), 0.0)
    assert registry.refused("e", 1, "damaged", 0.0) == "no version is live: e cannot take 1: damaged; 1 is rejected"
    assert registry.live is None and registry.behind() == []


def test_a_controller_that_died_between_publish_and_swap_carries_on() -> None:
    """The engine has not been told; afterwards it is, and the new version is judged by what was known before."""
    registry, engine, saved = served({6: 0.6, 7: 0.2})
    registry.published(7, {"overlap": 0.7}, 2.0)
    again = Registry(saved[-1])
    assert again.live == 7 and again.report()["lines"] == registry.report()["lines"]
    again.observe("e", engine.told, 3.0)
    assert again.behind() == ["e"]
    assert again.published(7, {"overlap": 0.7}, 3.0) is None, "the trainer says so again"
    _, line = engine.until_told(again, 200)
    assert line and line.startswith("rolled back to 6: acceptance 0.")


def test_a_controller_that_died_while_watching_counts_what_engines_have_counted() -> None:
    registry, engine, saved = served({6: 0.6, 7: 0.2})
    registry.published(7, {}, 2.0)
    engine.tell(registry)
    engine.tell(registry)
    engine.serve(100)
    again = Registry(saved[-1])
    line = engine.tell(again)
    assert line and line.startswith("rolled back to 6"), "before it has served another request"


def test_memory_and_journal_stay_small() -> None:
    saved: list[Any] = []
    registry = Registry(save=saved.append)
    for number in range(1, 400):
        registry.published(number, {"overlap": 0.5}, float(number))
        registry.observe("e", Told(1, number, LEAST, LEAST), float(number))
        if number % 3 == 0:
            registry.rollback(float(number))
    assert len(saved[-1]["lines"]) == KEPT_LINES and len(json.dumps(saved[-1])) < 20_000
    assert len(registry._recent) < 5


Event = Callable[[Registry, "Trainer"], Any]


class Trainer:
    """Gives numbers. engines: what each has told."""

    def __init__(self) -> None:
        self.number = 0
        self.engines: dict[str, Told] = {}

    def publish(self, registry: Registry) -> None:
        self.number += 1
        registry.published(self.number, {"overlap": 0.5}, 0.0)

    def serve(self, registry: Registry, engine: str, rate: float, takes: bool, dies: bool) -> None:
        told, version = self.engines.get(engine, Told(1, 0)), registry.live if takes else 0
        if dies:
            told = Told(told.life + 1, 0)
        if told.version != version:
            told = told._replace(version=version or 0, guesses=0, right=0)
        told = told._replace(guesses=told.guesses + 900, right=told.right + int(900 * rate))
        self.engines[engine] = told
        registry.observe(engine, told, 0.0)


def _order(name: str) -> Event:
    def give(registry: Registry, trainer: Trainer) -> None:
        try:
            getattr(registry, name)(0.0)
        except ValueError:
            assert name == "rollback"

    return give


def _refusal(engine: str) -> Event:
    return lambda registry, trainer: registry.live and registry.refused(engine, registry.live, "x", 0.0)


def _events() -> st.SearchStrategy[tuple[str, Event]]:
    serve = st.builds(
        lambda *how: ("serve", lambda registry, trainer: trainer.serve(registry, *how)),
        st.sampled_from("ab"), st.sampled_from((0.1, 0.5, 0.9)), st.booleans(), st.sampled_from((False,) * 7 + (True,)),
    )  # fmt: skip
    pin = st.builds(lambda n: ("pin", lambda r, t: t.number and r.pin(1 + n % t.number, 0.0)), st.integers(0, 9))
    refuse = st.builds(lambda name: ("refuse", _refusal(name)), st.sampled_from("ab"))
    publish = st.just(("publish", lambda registry, trainer: trainer.publish(registry)))
    orders = st.sampled_from([(name, _order(name)) for name in ("rollback", "pause", "resume")])
    return st.one_of(serve, serve, publish, pin, refuse, orders)


@given(st.lists(_events(), max_size=60))
def test_whatever_happens(events: list[tuple[str, Event]]) -> None:
    """No rejected version is live, numbers only go up, what is pinned stays; and a restart changes none of it."""
    saved: list[Any] = [{}]
    registry, trainer = Registry(save=lambda state: saved.append(json.loads(json.dumps(state)))), Trainer()
    for name, event in events:
        before = saved[-1]
        event(registry, trainer)
        after = saved[-1]
        report = registry.report()
        assert registry.live not in report["rejected"] and report["previous"] not in report["rejected"]
        assert registry.live is None or registry.live != report["previous"]
        assert after.get("highest", 0) >= before.get("highest", 0)
        if name not in ("pin", "resume"):
            assert after.get("pinned") == before.get("pinned")
            assert report["pinned"] is None or registry.live == report["pinned"]
            lost = set(before.get("rejected", {})) - set(after.get("rejected", {}))
            assert not lost, "a rejection stands"
        if name in ("serve", "refuse") and (live := registry.live) is not None:
            assert live <= (before.get("live") or 0), "nothing new becomes live but by publishing or by order"
        if report["paused"] and name == "publish":
            assert after.get("live") == before.get("live")
        if saved[-1]:
            again = Registry(json.loads(json.dumps(after)))
            keys = ("live", "previous", "pinned", "paused", "rejected", "lines")
            assert [again.report()[key] for key in keys] == [report[key] for key in keys]


def test_a_version_is_watched_for_more_than_two_hundred_requests() -> None:
    """Of 80 tokens."""
    assert ENOUGH > 200 * 80
