"""What a running rank is told from outside its loop. One message type per kind of news, one way for all of them."""

from typing import NamedTuple

from stepladder.workers.afd.membership import PoolAddress


class PoolNotice(NamedTuple):
    """To attention ranks: the FFN pool that there is now; None while there is none."""

    pool: PoolAddress | None


Notice = PoolNotice  # | the weights of a drafter, to come
