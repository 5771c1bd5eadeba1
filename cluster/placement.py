"""Placement groups by name. All are detached: one owned by the controller would die with it, and its ranks too."""

from collections.abc import Callable, Collection
from contextlib import suppress

import ray
from ray.util.placement_group import PlacementGroup, placement_group_table

from stepladder.cluster.ray_wait import wait_for


def place(
    name: str, bundle: dict[str, float], count: int, strategy: str, seconds: float, go: Callable[[], bool]
) -> PlacementGroup:
    """Reserve `count` equal bundles under `name`.

    Raises:
        TimeoutError: the cluster had no room for that long; the group is gone again.
    """
    group = ray.util.placement_group([bundle] * count, strategy=strategy, name=name, lifetime="detached")
    try:
        wait_for([group.ready()], seconds, go)
    except BaseException as error:
        ray.util.remove_placement_group(group)
        if isinstance(error, TimeoutError):
            free = {key: value for key, value in ray.available_resources().items() if key in bundle}
            raise TimeoutError(
                f"the cluster had no room for {count} x {bundle} within {seconds:.0f} s (free now: {free}); add nodes "
                f"or ask for fewer ranks in layout"
            ) from None
        raise
    return group


def lacking(resource: str) -> str | None:
    """Why nothing that needs some of `resource` can be placed now; None if a node has it."""
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    if any(resource in node for node in nodes):
        return None
    names_of_nodes = resource.startswith("node:")
    there = ", ".join(sorted({n for node in nodes for n in node if names_of_nodes or not n.startswith("node:")}))
    return f"no node of the cluster has the resource {resource!r}; nodes have {there}"


def names(prefix: str) -> list[str]:
    """Names of the placement groups that still hold or want resources and begin with `prefix`."""
    return [
        group["name"]
        for group in placement_group_table().values()
        if group["name"].startswith(prefix) and group["state"] != "REMOVED"
    ]


def remove(name: str) -> None:
    """Give a group's resources back; whatever runs in it is killed. A group that is gone already is no error."""
    with suppress(ValueError):
        ray.util.remove_placement_group(ray.util.get_placement_group(name))


def remove_all(prefix: str, keep: Collection[str] = ()) -> None:
    """All whose names begin with `prefix`, but for those named."""
    for name in set(names(prefix)).difference(keep):
        remove(name)
