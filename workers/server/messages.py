"""What travels between gateways and engines, as msgpack; decoding checks every type, nothing is unpickled.

Every message carries a number that counts up by one per direction and peer, so that a lost one is noticed.
"""

from typing import NamedTuple

import msgspec

from stepladder.workers.core import Output, Request
from stepladder.workers.engine import EngineStats


class Hello(msgspec.Struct, tag="hello", array_like=True, frozen=True):
    """First message of a session of a gateway (number 0): send me updates from now on, under this session."""

    session: int
    number: int = 0


class Submit(msgspec.Struct, tag="submit", array_like=True, frozen=True):
    """request.id: the client's name for it, `#` and the number of the attempt, from 1. patience: seconds after which
    its client will be gone, None if it has not said."""

    number: int
    request: Request
    patience: float | None = None

    @property
    def is_replay(self) -> bool:
        """An attempt before this one was lost after it had been accepted, or before anybody could judge it."""
        return not self.request.id.endswith("#1")


class Abort(msgspec.Struct, tag="abort", array_like=True, frozen=True):
    number: int
    id: str


class Unreadable(NamedTuple):
    """A `Submit` whose request cannot be read, with its number and the name of the request, which is refused."""

    number: int
    id: str
    why: str


class Refusal(msgspec.Struct, array_like=True, frozen=True):
    """A request that this engine does not take. full: its queue is, and after `retry_after` seconds it may not be."""

    id: str
    message: str
    full: bool
    retry_after: float = 1.0


class Update(msgspec.Struct, array_like=True, frozen=True):
    """What one step did for one gateway's requests; at least one a second, so that silence means death.

    session: the gateway's, so that what was on its way when it began anew is not taken for an answer.
    orphans: names of the requests that lost their gateway here; a retry of one belongs here.
    """

    session: int
    number: int
    outputs: list[Output]
    refusals: list[Refusal]
    stats: EngineStats
    orphans: list[str]


ToEngine = Hello | Submit | Abort

encode = msgspec.msgpack.Encoder().encode
_decode_to_engine = msgspec.msgpack.Decoder(ToEngine).decode
decode_update = msgspec.msgpack.Decoder(Update).decode


def decode_to_engine(body: bytes) -> ToEngine | Unreadable:
    """Raises msgspec.DecodeError: it is not even a request that could be refused."""
    try:
        return _decode_to_engine(body)
    except (msgspec.DecodeError, RecursionError) as error:
        match msgspec.msgpack.decode(body):
            case ["submit", int(number), {"id": str(name)}, *_]:
                return Unreadable(number, name, f"the engine cannot read this request: {error}")
        raise
