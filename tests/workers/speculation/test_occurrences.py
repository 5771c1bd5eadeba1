"""The index finds what a search of the whole text finds, and forgets the oldest first."""

from hypothesis import given, settings
from hypothesis import strategies as st

from stepladder.workers.speculation.drafters.occurrences import END, Occurrences

DEPTH, EVERY = 5, 10_000
texts = st.lists(st.integers(0, 2), min_size=1, max_size=30)


def common(one: list[int], other: list[int]) -> int:
    length = 0
    while length < min(len(one), len(other), DEPTH) and one[-1 - length] == other[-1 - length]:
        length += 1
    return length


@given(texts, st.lists(st.integers(1, 7), max_size=5), st.integers(1, 6))
@settings(deadline=None)
def test_a_text_is_searched_as_a_whole_however_it_came(text: list[int], cuts: list[int], most: int) -> None:
    index, start = Occurrences((1, 3), DEPTH), 0
    for cut in [*cuts, len(text)]:
        stop = max(start, min(start + cut, len(text)))
        index.extend(text, start, stop)
        start = stop
    places = [(common(text[:end], text), text[end:]) for end in range(len(text) - 1, 0, -1)]
    size = max((size for size in (1, 3) if any(length >= size for length, _ in places)), default=EVERY)
    found = [(length, list(following)) for length, following in index.find(text, most, EVERY)]
    assert found == [(n, (following * most)[:most]) for n, following in places if n >= size]
    assert index.find(text, most, 2) == index.find(text, most, EVERY)[:2]


@given(st.lists(st.tuples(texts, st.integers(0, 4)), max_size=8), texts, st.integers(1, 40))
@settings(deadline=None)
def test_a_bounded_memory_of_documents(
    documents: list[tuple[list[int], int]], context: list[int], capacity: int
) -> None:
    index = Occurrences((2,), DEPTH, capacity)
    stream: list[int] = []
    ends = []  # of all bigrams of all documents, those that end in a document's first `known` tokens left out
    for text, known in documents:
        index.add_document(text, known)
        ends += [len(stream) + end for end in range(max(known, 1), len(text))]
        stream += [*text, END]
    oldest = max(0, len(stream) - capacity)
    expected = []
    for end in reversed(ends):
        if end >= oldest and (length := common(stream[oldest : end + 1], context)) >= 2:
            stop = min(stream.index(END, end), end - end % capacity + capacity - 1)
            if stop > end and stream[end + 1] != END:
                expected.append((length, stream[end + 1 : stop + 1][:4]))
    found = [(length, list(following)) for length, following in index.find(context, 4, EVERY)]
    assert [length for length, _ in found] == [length for length, _ in expected]
    for (_, following), (_, right) in zip(found, expected, strict=True):
        assert [*following, END][: len(right)] == right
    assert len(index.tokens) <= capacity and index.count == len(stream)


def test_memory_never_grows_beyond_its_bound() -> None:
    index = Occurrences((4, 2), DEPTH, 100)
    sizes = []
    for number in range(60):
        index.add_document([number * 7 + at for at in range(11)], 3)
        parts = [index.tokens, *(part for chains in index._chains for part in (chains.heads, chains.earlier))]
        sizes.append([len(part) for part in parts])
    assert sizes[-1] == [100, 128, 100, 128, 100] and sizes[9:] == [sizes[-1]] * 51
    assert not index.find([3, 4], 1, EVERY), "the oldest are gone"
    assert index.find([59 * 7 + 3, 59 * 7 + 4], 1, EVERY)


def test_a_loop_goes_on_beyond_the_present() -> None:
    index = Occurrences((2,), DEPTH)
    index.extend([7, 1, 2, 1, 2], 0, 5)
    assert [list(match.following) for match in index.find([1, 2], 5, 1)] == [[1, 2, 1, 2, 1]]
