"""Whether a deployment is as it was: its processes, which life they are in, and what they are still busy with."""

import psutil
from ray.exceptions import RayError

from stepladder.launch.bench.failures.deployment_under_test import TITLES, DeploymentUnderTest, State, within

UNKNOWN = -1


class Vitals:
    """Of a deployment that is ready now. processes: its own, by name."""

    def __init__(self, victim: DeploymentUnderTest) -> None:
        self._victim = victim
        self.processes = _named(victim)
        self._state = victim.state()

    def crashes(self) -> list[str]:
        """What is not as it was, a sentence each."""
        found = [
            f"the process of {name} is gone" for name, process in self.processes.items() if not process.is_running()
        ]
        states: list[State] = []
        try:
            within(20.0, lambda: self._ask(states))
            now = states[-1]
        except IndexError:
            return [*found, "the controller does not answer"]
        if now != self._state:
            found.append(f"the controller tells of {now}, and told of {self._state}")
        return found

    def settle(self, seconds: float) -> int:
        """Wait until nothing is under way; how many requests and connections are, if that does not come true."""
        within(seconds, lambda: self._busy() == 0)
        return self._busy()

    def files(self) -> int:
        """That the gateway has open; UNKNOWN if it is gone."""
        try:
            return self.processes["gateway"].num_fds()
        except psutil.NoSuchProcess:
            return UNKNOWN

    def _ask(self, states: list[State]) -> bool:
        try:
            states.append(self._victim.state())
        except (RayError, ValueError, TimeoutError):
            return False
        return states[-1] == self._state

    def _busy(self) -> int:
        try:
            counters = self._victim.engines().values()
            requests = sum(of["running"] + of["waiting"] for of in counters)
            connections = self.processes["gateway"].net_connections("tcp")
        except (RayError, ValueError, TimeoutError, psutil.Error):
            return UNKNOWN
        port = int(self._victim.url.rpartition(":")[2])
        ours = [one for one in connections if one.laddr.port == port and one.status != psutil.CONN_LISTEN]
        return requests + len(ours)


def _named(victim: DeploymentUnderTest) -> dict[str, psutil.Process]:
    found: dict[str, psutil.Process] = {}
    for kind, title in TITLES.items():
        processes = victim.cluster.processes(title)
        for nth, process in enumerate(sorted(processes, key=lambda one: one.pid)):
            found[kind if len(processes) == 1 else f"{kind} {nth}"] = process
    return found
