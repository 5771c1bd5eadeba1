"""Where prompts with a known beginning go."""

from stepladder.cluster.gateway.affinity import PrefixMemory


def test_the_longest_known_beginning_wins() -> None:
    memory = PrefixMemory(chunk=4)
    memory.remember(range(8), "a")
    memory.remember([*range(4), 9, 9, 9, 9], "b")
    assert memory.engine([*range(8), 1, 2, 3, 4], {"a", "b"}) == ("a", 8)
    assert memory.engine([*range(4), 9, 9, 9, 9], {"a", "b"}) == ("b", 8)
    assert memory.engine([*range(4), 7, 7, 7, 7], {"a", "b"}) == ("b", 4), "the last that saw it"
    assert memory.engine(range(3), {"a", "b"}) == (None, 0), "shorter than a chunk"
    assert memory.engine([5, 5, 5, 5], {"a", "b"}) == (None, 0)


def test_engines_that_are_gone_do_not_count() -> None:
    memory = PrefixMemory(chunk=4)
    memory.remember(range(4), "a")
    memory.remember(range(8), "b")
    assert memory.engine(range(8), {"b"}) == ("b", 8)
    assert memory.engine(range(8), {"a"}) == (None, 0), "its beginning was taken over by b"


def test_memory_is_bounded() -> None:
    memory = PrefixMemory(chunk=1, capacity=10)
    memory.remember(range(100, 110), "a")
    memory.remember(range(10), "a")
    assert memory.engine(range(10), {"a"}) == ("a", 10)
    assert memory.engine(range(100, 110), {"a"}) == (None, 0)
