"""Look after a running deployment: `stepladder ctl status|logs|drain|resume|stop [name=...] [option=value]`, and
`stepladder ctl drafter list|pin|rollback|pause|resume [version=...]`.

It speaks to the Ray cluster of RAY_ADDRESS (host:port of its head; without it, the one on this machine). Exit codes:
0 done, and for `status` ready; 1 no such deployment or cluster; 2 wrong usage; 3 `status`: it is not ready; 4 `drain`
or `stop`: it was not done within `seconds`; 141 whoever read our output has stopped.
"""

import argparse
import json
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, fields
from time import monotonic
from typing import Any, TypeVar

import ray
from ray.actor import ActorHandle
from ray.exceptions import GetTimeoutError, RayActorError, RayTaskError

from stepladder.cluster.names import CONTROLLER, deployments, namespace
from stepladder.launch.ctl_drafter import DrafterOptions, in_short, told
from stepladder.launch.ctl_options import CtlOptions, ShowOptions
from stepladder.launch.logs import LogOptions, logs
from stepladder.launch.ray_cluster import ATTACH_SECONDS, Head, attach, within
from stepladder.launch.table import table
from stepladder.launch.typed_config import build

T = TypeVar("T")

OK, ABSENT, USAGE, NOT_READY, LATE = 0, 1, 2, 3, 4
CUT_OFF = 128 + signal.SIGPIPE
SHUTDOWN_SECONDS = 5.0
POLL_SECONDS = 0.2


@dataclass(frozen=True, kw_only=True)
class WaitOptions(CtlOptions):
    """The order stands even if `seconds` were too few."""

    seconds: float = 600.0


def main(words: Sequence[str] | None = None) -> int:
    """Run one command, by default the command line's, and return the exit code."""
    usage = "; ".join(f"{c}: {', '.join(f.name + '=' for f in fields(kind))}" for c, (kind, _) in COMMANDS.items())
    parser = argparse.ArgumentParser("stepladder ctl", description=__doc__, epilog=f"options of {usage}")
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("command", choices=COMMANDS)
    parser.add_argument("options", nargs="*", metavar="option=value")
    given = parser.parse_args(words)
    kind, run = COMMANDS[given.command]
    try:
        options: Any = build(kind, pairs(given.options, kind.bare), strict=False)
    except ValueError as error:
        print(f"stepladder: {given.command}: {error}", file=sys.stderr)
        return USAGE
    try:
        with connected(options.seconds):
            name, controller = find(options)
            code = run(options, name, controller)
            sys.stdout.flush()
            return code
    except BrokenPipeError:
        return cut_off()
    except (ValueError, ConnectionError) as error:
        print(f"stepladder: {error}", file=sys.stderr)
        return ABSENT
    except KeyboardInterrupt:
        return 130


def cut_off() -> int:
    """Whoever read our output has seen enough. What is still in the buffer must not complain at the exit, whose code
    this is."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return CUT_OFF


def status(options: ShowOptions, name: str, controller: ActorHandle) -> int:
    report = answer(controller.report.remote(), name, options)
    print(json.dumps(report, indent=2) if options.format == "json" else describe(report))
    return OK if report["phase"] == "ready" else NOT_READY


def drain(options: WaitOptions, name: str, controller: ActorHandle) -> int:
    """Stop admitting requests and wait for those in flight; everything stays up."""
    answer(controller.drain.remote(True), name, options)

    def left() -> str | None:
        report = answer(controller.report.remote(), name, options)
        if report["phase"] == "draining" and not report["in_flight"]:
            return None
        return f"{report['in_flight']} requests in flight" if report["phase"] == "draining" else report["phase"]

    return _wait(left, options.seconds, f"{name} is drained; `stop` removes it, `resume` admits requests again")


def resume(options: CtlOptions, name: str, controller: ActorHandle) -> int:
    """Undo a drain."""
    answer(controller.drain.remote(False), name, options)
    print(f"{name} admits requests again")
    return OK


def stop(options: WaitOptions, name: str, controller: ActorHandle) -> int:
    """Drain, remove everything, and wait until it is gone."""
    controller.shut_down.remote()

    def left() -> str | None:
        try:
            return ray.get(controller.report.remote(), timeout=options.patience)["detail"]
        except GetTimeoutError:
            return "its controller is busy"
        except RayActorError:
            return "removing the controller" if name in deployments(_named(options)) else None

    return _wait(left, options.seconds, f"{name} is gone")


def drafter(options: DrafterOptions, name: str, controller: ActorHandle) -> int:
    """Show the versions of a drafter that is taught, or choose among them."""
    done = answer(controller.drafter.remote(options.order, options.version), name, options)
    print(json.dumps(done, indent=2) if options.format == "json" else told(done))
    return OK


COMMANDS: dict[str, tuple[type[CtlOptions], Callable[[Any, str, ActorHandle], int]]] = {
    "status": (ShowOptions, status),
    "logs": (LogOptions, logs),
    "drain": (WaitOptions, drain),
    "resume": (CtlOptions, resume),
    "stop": (WaitOptions, stop),
    "drafter": (DrafterOptions, drafter),
}


@contextmanager
def connected(seconds: float) -> Iterator[None]:
    """Attached to the running cluster; never starts one.

    Raises:
        ConnectionError: there is none, or it does not let us in.
    """
    if ray.is_initialized():
        yield
        return
    attach(seconds=min(seconds, ATTACH_SECONDS))
    try:
        yield
    finally:
        with suppress(TimeoutError):  # its head may be gone by now
            within(SHUTDOWN_SECONDS, ray.shutdown, TimeoutError())


def find(options: CtlOptions) -> tuple[str, ActorHandle]:
    """A deployment's name and controller.

    Raises:
        ValueError: it does not exist, or no name was given and there is not exactly one.
    """
    known, name = deployments(_named(options)), options.name
    if not known:
        raise ValueError("this Ray cluster has no deployment; `stepladder serve` makes one")
    if name is None and len(known) > 1:
        raise ValueError(f"this Ray cluster has several deployments; say which: name={' or name='.join(known)}")
    name = known[0] if name is None else name
    if name not in known:
        raise ValueError(f"there is no deployment named {name!r}; this Ray cluster has {', '.join(known)}")
    space = namespace(name)
    return name, _head_answers(options, lambda: ray.get_actor(CONTROLLER, namespace=space))


def answer(reference: Any, name: str, options: CtlOptions) -> Any:
    """The controller's answer.

    Raises:
        ConnectionError: it does not answer; Ray restarts it if it is dead. ValueError: it cannot do that.
    """
    try:
        return ray.get(reference, timeout=options.patience)
    except RayTaskError as error:
        if isinstance(error.cause, ValueError):
            raise ValueError(str(error.cause)) from None
        raise
    except (GetTimeoutError, RayActorError):
        raise ConnectionError(f"the controller of {name} does not answer; if it died, Ray restarts it soon") from None


def describe(report: dict[str, Any]) -> str:
    """A report for a person."""
    figures = report["figures"]
    shown = {"serve/tokens_per_s": "{:.1f} tokens/s", "serve/ttft_ms_p50": "TTFT {:.1f} ms"}
    shown |= {"serve/tpot_ms_p50": "TPOT {:.1f} ms"}
    recent = [text.format(figures[key]) for key, text in shown.items() if key in figures]
    tables = [_parts("engine", report["engines"], ENGINE_COLUMNS)]
    if pools := report.get("pools"):
        tables.append(_parts("pool", pools, POOL_COLUMNS))
    if clocks := _clocks(report["engines"] | report.get("pools", {})):
        tables.append(clocks)
    return "\n".join(
        [
            f"{report['name']}  {report['phase']}: {report['detail']}",
            f"url       {report['url'] or 'not yet'}",
            f"requests  {', '.join([str(report['in_flight']) + ' in flight', *recent])}",
            f"restarts  {report['restarts']}",
            *([f"drafter   {in_short(report['drafter'])}"] if "drafter" in report else []),
            *_experts(report["engines"] | report.get("pools", {})),
            *(f"\n{one}" for one in tables),
        ]
    )


SPLIT = ("busy", "waiting", "idle")
KERNELS = ("torch", "native")
Columns = dict[str, tuple[str, Callable[[Any], str]]]  # heading -> figure, and how to print it
ENGINE_COLUMNS: Columns = {
    "running": ("running", str),
    "waiting": ("waiting", str),
    "KV": ("kv_usage", "{:.0%}".format),
    "steps": ("steps", str),
    "kernels": ("native_kernels", KERNELS.__getitem__),
    "speculation": ("speculation", str),
}
POOL_COLUMNS: Columns = {
    "steps": ("steps", str),
    "resumed": ("resumed_steps", str),
    "busy s": ("busy_seconds", "{:.1f}".format),
    "kernels": ("native_kernels", KERNELS.__getitem__),
}


def _parts(kind: str, parts: dict[str, dict[str, Any]], columns: Columns) -> str:
    """A row for each engine or pool; a counter that it has not told yet is a dash."""
    rows: list[list[object]] = [[kind, "generation", "serves", "restarts", *columns]]
    for name, numbers in parts.items():
        life = [numbers["generation"], "yes" if numbers["serves"] else "no", numbers["restarts"]]
        told = (show(numbers[key]) if key in numbers else None for key, show in columns.values())
        rows.append([name, *life, *told])
    return table(rows)


def _experts(groups: dict[str, dict[str, Any]]) -> list[str]:
    """How evenly tokens were spread, of groups that route."""
    told = [
        f"{name}: the busiest expert had {numbers['expert_imbalance']:.2f} of the mean, the busiest rank "
        f"{numbers['expert_rank_imbalance']:.2f}, {numbers['expert_tokens_dropped']} tokens dropped"
        for name, numbers in groups.items()
        if sum(numbers.get("expert_tokens", ()))
    ]
    return [f"experts   {'; '.join(told)}"] if told else []


def _clocks(groups: dict[str, dict[str, Any]]) -> str:
    """How the time of every rank was spent, since its loop began; empty while none has told."""
    rows: list[list[object]] = []
    for name, numbers in groups.items():
        for index, rank in enumerate(numbers.get("ranks", ())):
            whole = sum(rank[key] for key in SPLIT) or 1.0
            rows.append([f"{name}/{index}", rank["host"], *(f"{rank[key] / whole:.0%}" for key in SPLIT)])
    return table([["rank", "host", "busy", "waiting for peers", "idle"], *rows]) if rows else ""


def _wait(left: Callable[[], str | None], seconds: float, done: str) -> int:
    """Until nothing is left, saying what is."""
    deadline, said = monotonic() + seconds, None
    while (now := left()) is not None:
        if now != said:
            print(now, flush=True)
            said = now
        if monotonic() > deadline:
            print(f"stepladder: not done within {seconds:.0f} s; it goes on", file=sys.stderr)
            return LATE
        threading.Event().wait(POLL_SECONDS)
    print(done)
    return OK


def _named(options: CtlOptions) -> list[dict[str, str]]:
    return _head_answers(options, lambda: ray.util.list_named_actors(all_namespaces=True))


def _head_answers(options: CtlOptions, call: Callable[[], T]) -> T:
    """What `call` asks the cluster's head.

    Raises:
        ConnectionError: it does not answer.
    """
    head = Head.of_environment()
    where = f" at {head.address}" if head else ""
    sentence = f"the head of the Ray cluster{where} does not answer within {options.patience:.0f} s; start it again"
    return within(options.patience, call, ConnectionError(sentence))


def pairs(words: Sequence[str], bare: str | None = None) -> dict[str, str]:
    """`option=value` words as a dictionary, the first one perhaps a value of the option `bare`; ValueError for any
    other."""
    words = [f"{bare}={word}" if bare and not at and "=" not in word else word for at, word in enumerate(words)]
    for word in words:
        if "=" not in word:
            raise ValueError(f"{word!r} is not of the form option=value")
    return dict(word.split("=", 1) for word in words)


if __name__ == "__main__":
    code = main()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)  # what Ray does at the exit of a process waits for a head that has died
