"""Where requests go: what the controller tells its gateways of each engine."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Endpoint:
    """An engine that takes requests. generation: which life of it; a restarted gang has a new one."""

    name: str
    generation: int
    address: str
