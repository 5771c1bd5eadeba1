"""Which version a trainer takes for the live one: what it has published itself is no news to it."""

__all__ = ["Following"]


class Following:
    """version: what candidates are compared with and training goes on from; 0, what serving began with, or nothing."""

    def __init__(self) -> None:
        self.version = 0
        self._told: int | None = None

    def published(self, number: int) -> None:
        """It is what to compare with from now on; that it is live will be told later, if it is."""
        self.version = number

    def news(self, live: int | None) -> bool:
        """Whether others have made a version live that is not the one that is followed: after a restart, a rollback or
        by order. live: as the controller has told last; None, it has not yet. To be told the same again is no news."""
        return live is not None and live != self._told and live != self.version

    def heed(self, live: int | None) -> None:
        """From now on that one, if it was news; what was told is known."""
        if self.news(live):
            assert live is not None
            self.version = live
        self._told = live

    def keep(self, version: int) -> None:
        """What is followed after all, since what was told cannot be read; to be told that again is no news either."""
        self.version = version
