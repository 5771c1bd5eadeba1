"""suite=hostile: the attack is the same each time and does what it says; the report sees every fault."""

import asyncio
import json
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from random import Random
from typing import Any

import psutil
import pytest

from stepladder.launch.bench.__main__ import suite_of
from stepladder.launch.bench.hostile import connections
from stepladder.launch.bench.hostile.attacker import Outcome, Plan, attack, send
from stepladder.launch.bench.hostile.fuzz import KINDS_OF_FORGERY, Forged, Target, forge
from stepladder.launch.bench.hostile.honest import HonestStreams, Phase
from stepladder.launch.bench.hostile.line import Door, statuses
from stepladder.launch.bench.hostile.memory import MemoryWatch
from stepladder.launch.bench.hostile.options import HostileBench
from stepladder.launch.bench.hostile.replay import door_of, target_of
from stepladder.launch.bench.hostile.starved import Starvation
from stepladder.launch.bench.hostile.suite import AFTER, ATTACKED, FIRST, SECOND, Seen, report
from tests.cluster.models import write_random
from tests.cluster.serving import Server, serve
from tests.composed import composed

ROOT = Path(__file__).parents[2]
TARGET = Target("org/tiny", 20_000)


def forged(count: int = 1500) -> list[Forged]:
    return [forge(7, number, TARGET) for number in range(count)]


def test_a_request_is_made_from_its_seed_and_number_alone() -> None:
    assert [one.raw() for one in forged(200)] == [one.raw() for one in forged(200)]
    assert forge(7, 0, TARGET) != forge(8, 0, TARGET)


def test_every_kind_of_wrong_occurs() -> None:
    """So do values of every type and range, nests, spellings and sizes around the limit."""
    all_of_them = forged()
    assert {one.what for one in all_of_them} == set(KINDS_OF_FORGERY)
    bodies = b"\n".join(one.body for one in all_of_them)
    for part in (b"NaN", b"-Infinity", b"18446744073709551616", b"1e+308", b"\\ud800", b"\xed\xa0\x80", b"[" * 5000,
                 b'{"a":' * 500, b": null", b"\x1f\x8b", b"\xff\xfe", b"1" + b"0" * 400):  # fmt: skip
        assert part in bodies, part
    sizes = {len(one.body) - TARGET.limit for one in all_of_them if one.what == "size"}
    assert sizes == {-1, 0, 1, 1000, 1 << 20}
    assert len({one.path for one in all_of_them}) > 25 and len({one.method for one in all_of_them}) > 10


def test_a_twice_given_name_and_a_cut_body_occur() -> None:
    spelled = [one.body for one in forged() if one.what == "spelling"]
    assert any(body.count(b'"prompt":') == 2 for body in spelled)
    assert any(body.startswith(b"{") and not body.rstrip().endswith(b"}") for body in spelled)


STREAM = b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n40\r\ndata: {}\n\n"


def event(**error: Any) -> bytes:
    return b'data: {"error":' + json.dumps(error).encode() + b"}\n\ndata: [DONE]\n\n"


def test_the_answers_in_what_came_back() -> None:
    answer = b"HTTP/1.1 404 Not Found\r\ncontent-length: 2\r\n\r\n{}"
    assert statuses(answer + answer.replace(b"404 Not Found", b"500 Internal Server Error")) == [404, 500]
    assert statuses(b"") == statuses(b'{"text": "HTTP/1.1 500 "}') == []
    internal = {"message": "internal error", "type": "server_error", "code": None}
    assert statuses(STREAM + event(**internal)) == [200, 500]
    assert statuses(STREAM + event(**internal | {"code": "service_unavailable"})) == [200]
    assert statuses(STREAM + event(**internal | {"type": "invalid_request_error"})) == [200]


def test_nobody_else_is_attacked() -> None:
    assert door_of("http://127.0.0.1:8000") == Door("127.0.0.1", 8000)
    for url in ("http://10.0.0.1:8000", "https://example.com", "http://127.0.0.1"):
        with pytest.raises(ValueError, match="only servers on this machine are attacked"):
            door_of(url)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Any:
    with serve(write_random(tmp_path_factory.mktemp("model")), header_seconds=0.5, body_seconds=0.5) as one:
        yield one


@pytest.mark.parametrize("name", connections.ATTACKS)
def test_a_misused_connection_harms_nobody(server: Server, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connections, "LONGEST", 1.5)
    received = asyncio.run(connections.ATTACKS[name](door_of(server.url), Random(1), target_of(server.url)))
    assert all(status < 500 or status == 503 for status in statuses(received))
    assert server.post("/v1/completions", {"model": "org/tiny", "prompt": "a", "max_tokens": 1}).status_code == 200


def test_a_forged_request_is_answered_and_can_be_sent_again(server: Server, capsys: pytest.CaptureFixture[str]) -> None:
    door, target = door_of(server.url), target_of(server.url)
    number = next(n for n in range(100) if forge(0, n, target).what == "size" and b"413" in first_line(door, target, n))
    from stepladder.launch.bench.hostile.replay import main

    main(server.url, "0", str(number))
    assert "request_too_large" in capsys.readouterr().out


def first_line(door: Door, target: Target, number: int) -> bytes:
    return asyncio.run(send(door, forge(0, number, target), 10.0)).partition(b"\r\n")[0]


def test_an_attack_ends_by_number(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.nice", lambda _: None)
    plan = Plan(door_of(server.url), target_of(server.url), 1, 60.0, 60, clients=4, intruders=3, answer_seconds=20.0)
    outcome = attack(plan)
    answers = sum((outcome.answers[kind] for kind in KINDS_OF_FORGERY if kind in outcome.answers), Counter())
    assert answers.total() >= 60 and answers["400"] > 20 and outcome.began < outcome.ended < outcome.began + 60
    assert outcome.faults == []


def test_streams_compare_their_texts(server: Server) -> None:
    streams = HonestStreams(server.url, "org/tiny", streams=3, tokens=8, seconds=20.0)
    phases = []
    for name in ("one", "two"):
        with streams.phase(name) as phase:
            phases.append(phase)
        assert phase.ended >= 3 and not phase.changed and not phase.lost and min(phase.waits) > 0
    streams._texts[1] = "another"
    with streams.phase("three") as phase:
        pass
    assert phase.changed >= 1
    refused = HonestStreams(server.url, "nobody", streams=1, tokens=8, seconds=0.5)
    with pytest.raises(RuntimeError, match="did not begin"), refused.phase("four"):
        pass


def test_memory_over_time() -> None:
    with MemoryWatch({"me": psutil.Process()}) as memory:
        while len(memory.samples["me"]) < 2:
            asyncio.run(asyncio.sleep(0.05))
    (begin, size), *_ = memory.samples["me"]
    assert memory.median("me", begin, begin) == size > 10
    assert memory.median("me", 0.0, 1.0) is None


def test_time_without_a_processor() -> None:
    starvation = Starvation({}, [(1.0, {"a": 0.5, "b": 2.0}), (2.0, {"a": 0.9, "b": 2.1, "c": 9.0}), (3.0, {"a": 1.0})])
    assert starvation.longest(1.1, 1.9) == pytest.approx(0.4)
    assert starvation.longest(0.5, 1.9) is None and starvation.longest(2.5, 3.5) is None
    with Starvation({"me": psutil.Process()}) as mine:
        while len(mine.samples) < 2:
            asyncio.run(asyncio.sleep(0.05))
    (begin, _), (end, _) = mine.samples[:2]
    waited = mine.longest(begin, end)
    assert waited is None or 0 <= waited < 10


def options(*words: str) -> HostileBench:
    return suite_of(composed("bench", "suite=hostile", "run_dir=/tmp/none", *words))[0]


def seen() -> Seen:
    """Nothing amiss."""
    phases = {
        name: Phase(name, [(0.0, 0.1), (0.0, 0.2)], [0.3, 0.3], ended=8) for name in (FIRST, SECOND, ATTACKED, AFTER)
    }
    memory = MemoryWatch({}, {"gateway": [(t, 100.0) for t in (8.0, 13.0, 18.0, 29.0)]})
    outcome = Outcome({"values": Counter({"400": 9, "200": 1})}, [], [(11.0, 12.0, "values")], 10.0, 20.0)
    return Seen(phases, outcome, memory, Starvation({}), (10.0, 20.0, 30.0), [], 0, (50, 50))


def test_where_nothing_is_amiss_everything_holds() -> None:
    assert all(goal.holds for goal in report(options(), seen()).summary.values())


def _with(change: Callable[[Seen], Any]) -> Seen:
    made = seen()
    return change(made) or made


@pytest.mark.parametrize(
    ("goal", "change"),
    [
        ("answers above 499", lambda s: s.outcome.count("values", [503, 500])),
        ("forged requests or connections that got no answer", lambda s: s.outcome.fault(kind="values", answer="none")),
        ("crashes", lambda s: replace(s, crashes=["the process of gateway is gone"])),
        ("requests and connections left", lambda s: replace(s, left=2)),
        ("requests and connections left", lambda s: replace(s, left=-1)),
        ("pause beyond", lambda s: s.phases[ATTACKED].when.__setitem__(0, (0.0, 1.11))),
        ("changed texts", lambda s: setattr(s.phases[ATTACKED], "changed", 1)),
        ("lost honest", lambda s: s.phases[AFTER].lost.append("HTTP 500")),
        ("gateway: growth, MiB", lambda s: s.memory.samples["gateway"].extend([(30.0, 613.0)] * 2)),
        ("gateway: growth during the attack", lambda s: s.memory.samples["gateway"].extend([(19.0, 165.0)] * 2)),
        ("gateway: growth", lambda s: s.memory.samples["gateway"].clear()),
    ],
)
def test_what_is_amiss_does_not_hold(goal: str, change: Callable[[Seen], Any]) -> None:
    summary = report(options(), _with(change)).summary
    assert [name for name, one in summary.items() if not one.holds and name.startswith(goal)], summary


def test_a_pause_has_its_suspects() -> None:
    made = seen()
    made.phases[ATTACKED].when[1] = (11.5, 13.0)
    assert report(options(), made).details["faults"]["suspects"] == ["values"]


@pytest.mark.slow
@pytest.mark.ray
@pytest.mark.timeout(600)
def test_a_short_attack_on_a_deployment(tmp_path: Path) -> None:
    """In half a minute, memory is still being used for the first time."""
    words = ["suite=hostile", "seconds=30", "quiet_seconds=5", "leak_mib=512", f"run_dir={tmp_path}"]
    command = [sys.executable, "-m", "launch.bench", *words]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=580)
    assert done.returncode == 0, done.stderr[-3000:]
    faults = (tmp_path / "hostile-faults.json").read_text()
    for name, goal in json.loads((tmp_path / "hostile.json").read_text())["summary"].items():
        assert goal["holds"], f"{name}: {goal}\n{faults[:3000]}"
