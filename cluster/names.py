"""What things of a deployment are called in Ray. Imports nothing heavy: `launch/ctl.py` is to answer at once."""

from collections.abc import Iterable, Mapping

CONTROLLER = "controller"
_SPACE = "stepladder/"


def namespace(deployment_name: str) -> str:
    """The Ray namespace of a deployment; all its actors live there."""
    return _SPACE + deployment_name


def deployments(actors: Iterable[Mapping[str, str]]) -> list[str]:
    """Names of the deployments among `ray.util.list_named_actors(all_namespaces=True)`."""
    controllers = (actor["namespace"] for actor in actors if actor["name"] == CONTROLLER)
    return sorted(space.removeprefix(_SPACE) for space in controllers if space.startswith(_SPACE))
