"""What a deployment says while it works: a sentence every ten seconds, read off two rows of figures."""

from collections.abc import Mapping

__all__ = ["Spoken"]

EVERY = 10.0  # seconds


class Spoken:
    """Nothing is said of a time in which nothing was done."""

    def __init__(self) -> None:
        self._before: tuple[float, Mapping[str, float]] | None = None

    def line(self, now: float, row: Mapping[str, float]) -> str | None:
        """A sentence about the time since the last one, or None: it is too early, or there is nothing to say.

        Args:
            now: seconds of any clock. row: as `supervisor.figures` makes it. Counters of an engine that was restarted
                begin anew; what it did before is not said.
        """
        if self._before is None:
            self._before = now, row
            return None
        then, old = self._before
        if now - then < EVERY:
            return None
        self._before = now, row

        def since(name: str) -> float:
            value, was = row.get(f"engine/{name}", 0.0), old.get(f"engine/{name}", 0.0)
            return value - was if value >= was else value

        def share(part: str, of: str) -> float | None:
            return since(part) / whole if (whole := since(of)) > 0 else None

        running, waiting = row.get("engine/running", 0.0), row.get("engine/waiting", 0.0)
        tokens = [since("prompt_tokens"), since("generation_tokens")]
        if not any(tokens) and not running and not waiting:
            return None
        exposed = share("exposed_seconds", "reduce_seconds")
        shares = {
            "prompt tokens from the prefix cache": share("prefix_cache_hits", "prefix_cache_queries"),
            "drafted tokens accepted": share("accepted_tokens", "draft_tokens"),
            "time of all-reduces hidden": None if exposed is None else 1 - exposed,
        }
        rates = [number / (now - then) for number in tokens]
        said = f"{rates[0]:.1f} tokens/s in, {rates[1]:.1f} out; {running:.0f} running, {waiting:.0f} waiting; "
        said += f"KV cache {row.get('engine/kv_usage', 0.0):.0%} in use"
        return said + "".join(f"; {value:.0%} of {name}" for name, value in shares.items() if value is not None)
