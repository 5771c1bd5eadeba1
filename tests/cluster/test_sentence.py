"""Whatever Ray raises becomes one line with the cause and the node."""

import traceback

import pytest
from ray.core.generated.common_pb2 import ActorDiedErrorContext
from ray.exceptions import ActorDiedError, GetTimeoutError, RayActorError, RayTaskError

from stepladder.cluster.error_text import error_text

MISSING = "/models/m has no tensor lm_head.weight"
DEATH = "The actor is dead because its worker process has died. Worker exit type: SYSTEM_ERROR"


def failed(cause: Exception, ip: str = "10.0.0.7") -> RayTaskError:
    """As Ray stores it when a rank's `load` has raised `cause`."""
    try:
        raise cause
    except Exception:
        text = traceback.format_exc()
    return RayTaskError("load", text, cause, proctitle="ray::RankActor.load", pid=7, ip=ip)


def remote(cause: Exception) -> RayTaskError:
    """As `ray.get` raises it: an instance of the cause's class, too."""
    return failed(cause).as_instanceof_cause()


CONTEXT = ActorDiedErrorContext(
    error_message=f"{DEATH}\nmore", actor_id=bytes(16), pid=7, name="t/1/engine-0/0", node_ip_address="10.0.0.7"
)


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (remote(ValueError(MISSING)), f"{MISSING} (on node 10.0.0.7)"),
        (remote(RuntimeError("out of memory\nsecond line")), "RuntimeError: out of memory (on node 10.0.0.7)"),
        (remote(AssertionError()), "AssertionError (on node 10.0.0.7)"),
        (failed(remote(ValueError(MISSING)), "10.0.0.8"), f"{MISSING} (on node 10.0.0.7)"),
        (ActorDiedError(CONTEXT), f"{DEATH} (on node 10.0.0.7)"),
        (ActorDiedError(failed(ValueError(MISSING))), f"{MISSING} (on node 10.0.0.7)"),
        (RayActorError(error_msg="it died"), "it died"),
        (GetTimeoutError("Get timed out: some object(s) not ready."), "Get timed out: some object(s) not ready."),
        (GetTimeoutError(), "GetTimeoutError"),
        (TimeoutError("no answer within 3 s"), "no answer within 3 s"),
        (KeyError("x"), "KeyError: 'x'"),
    ],
)  # fmt: skip
def test_one_line_with_the_cause(error: Exception, said: str) -> None:
    assert error_text(error) == said


def test_without_it_there_would_be_a_traceback_in_colours() -> None:
    assert str(remote(ValueError(MISSING))).count("\n") > 1 and "\x1b[" in str(remote(ValueError(MISSING)))
