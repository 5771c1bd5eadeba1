"""Suffix decoding with a memory of what others were told."""

import random

import torch

from stepladder.kernels.noise import gumbel
from stepladder.workers.speculation.drafters.suffix import PIECE, Suffix
from tests.workers.speculation.streams import Score, sequence, serve


def told(drafter: Suffix, output: list[int], name: str = "before") -> None:
    """Another request has had this output."""
    drafter.forget(sequence([90], output, name))


def test_it_goes_on_as_the_output_of_another_request() -> None:
    drafter = Suffix(threshold=0.0)
    asked = sequence([50, 1, 2])
    assert drafter.propose([asked], [4])[0].tokens == []
    told(drafter, [1, 2, 3, 4, 5])
    assert drafter.propose([asked], [4])[0].tokens == [3, 4, 5], "up to that output's end"
    assert Suffix(memory=0).memory is None


def test_prompts_of_others_are_only_context() -> None:
    drafter = Suffix(threshold=0.0)
    drafter.forget(sequence([1, 2, 3, 4], [5, 6], "before"))
    assert drafter.propose([sequence([9, 1, 2])], [4])[0].tokens == []
    assert drafter.propose([sequence([9, 3, 4], name="b")], [4])[0].tokens == [], "nor where the output begins"
    assert drafter.propose([sequence([9, 4, 5], name="c")], [4])[0].tokens == [6]


def test_what_must_not_be_learnt_from_is_not_remembered() -> None:
    """Its own text it may look up."""
    drafter = Suffix(threshold=0.0)
    secret = sequence([50, 1, 2, 3, 1], [2, 3] * PIECE, "secret", learn=False)
    assert drafter.propose([secret], [1])[0].tokens == [2]
    drafter.forget(secret)
    assert drafter.propose([sequence([50, 1, 2])], [4])[0].tokens == [] and not drafter._remembered
    assert drafter.memory and not drafter.memory.count


def test_most_places_decide_and_their_share_is_what_it_is_sure_of() -> None:
    drafter = Suffix(threshold=0.0)
    for token in (3, 4, 3, 3):
        told(drafter, [1, 2, token, 8])
    [mixed] = drafter.propose([sequence([50, 1, 2])], [2])
    assert mixed.tokens == [3, 8]
    told(drafter, [60, 1, 2, 7])
    [longer] = drafter.propose([sequence([60, 1, 2], name="b")], [2])
    assert longer.tokens[0] == 3, "three against one that matches a token more"
    for _ in range(8):
        told(drafter, [21, 22, 23])
    [agreed] = drafter.propose([sequence([50, 21, 22], name="c")], [1])
    assert mixed.confidence[0] < mixed.confidence[1] and mixed.confidence[0] < agreed.confidence[0] < 1


def test_one_of_one_is_not_certain() -> None:
    drafter = Suffix()
    told(drafter, [1, 2, 3])
    assert 0.3 < drafter.propose([sequence([50, 1, 2])], [1])[0].confidence[0] < 0.7


def test_its_own_text_and_the_others_vote_together() -> None:
    drafter = Suffix(threshold=0.0)
    told(drafter, [1, 2, 3])
    told(drafter, [1, 2, 3])
    assert drafter.propose([sequence([50, 1, 2, 4, 1, 2])], [1])[0].tokens == [3]
    assert drafter.propose([sequence([50, 1, 2, 4, 1, 2, 4, 1, 2], name="b")], [1])[0].tokens == [4]


def test_documents_that_come_again_are_foreseen() -> None:
    """Five documents of 60 tokens, one in twelve changed each time; prompts of six."""
    draw = random.Random(0)
    originals = [[draw.randrange(100) for _ in range(60)] for _ in range(5)]
    drafter = Suffix(memory=2000, threshold=0.3)
    rounds: list[Score] = []
    for number in range(6):
        scores = []
        for which, original in enumerate(originals):
            text = [draw.randrange(100) if draw.random() < 1 / 12 else token for token in original]
            running = sequence(text[:6], name=f"{number}.{which}")
            scores.append(serve(drafter, running, text, most=8))
            drafter.forget(running)
        rounds.append(Score(*(sum(column) for column in zip(*scores, strict=True))))
    assert rounds[0].accepted < 20 and rounds[5].accepted > 150
    assert rounds[5].steps < rounds[0].steps / 2
    assert rounds[5].accepted > 0.6 * rounds[5].drafted
    assert not drafter.states


def test_a_long_output_is_remembered_while_it_is_written() -> None:
    drafter = Suffix(threshold=0.0, memory=1000)
    text = [90, *(1000 + at for at in range(PIECE + 10))]
    running = sequence(text[:1], name="before")
    serve(drafter, running, text)
    assert drafter.memory
    assert drafter.propose([sequence([1, 1000, 1001])], [2])[0].tokens == [1002, 1003]
    stored = drafter.memory.count
    drafter.forget(running)
    assert drafter.memory.count == stored + drafter.depth + len(text) - 1 - PIECE + 1, "the rest, behind its context"
    again = Suffix(memory=1000)
    again.forget(running)
    for other in (drafter, again):
        assert other.propose([sequence([1, 1000 + PIECE, 1001 + PIECE], name="b")], [2])[0].tokens[:1] == [1002 + PIECE]


def test_the_oldest_outputs_are_forgotten_first() -> None:
    drafter = Suffix(memory=40, threshold=0.0)
    for first in range(0, 1000, 10):
        told(drafter, list(range(first, first + 10)))
    assert drafter.memory and len(drafter.memory.tokens) == 40
    old, new = drafter.propose([sequence([2, 0, 1]), sequence([1, 990, 991], name="b")], [3, 3])
    assert old.tokens == [] and new.tokens == [992, 993, 994]


def test_a_kind_of_guess_that_fails_is_no_longer_drafted_and_comes_back() -> None:
    drafter = Suffix(threshold=0.3)
    drafts: list[int] = []
    for number in range(120):
        told(drafter, [number * 3 + 100, number * 3 + 101, 7], f"before {number}")
        running = sequence([50, number * 3 + 100, number * 3 + 101], name=str(number))
        drafts.append(len(drafter.propose([running], [1])[0].tokens))
        running.tokens.append(7 if number >= 40 else 8)
        drafter.forget(running)
    assert drafts[0] == 1 and drafts[39] == 0 and drafts[119] == 1


def test_at_a_temperature_votes_are_drawn_with_the_noise_of_the_target() -> None:
    """The target holds 3 and 4 equally likely, and draws by Gumbel noise; whoever knows both draws the same."""
    drafter = Suffix(threshold=0.0)
    for token in (3, 4) * 4:
        told(drafter, [1, 2, token, 8])
    right, drawn = 0, set[int]()
    for seed in range(40):
        asked = sequence([50, 1, 2], name=str(seed), temperature=1.0, seed=seed)
        position = torch.tensor([len(asked.tokens)])
        noise = gumbel(torch.tensor([seed]), position, torch.tensor([3, 4]))[0]
        [draft] = drafter.propose([asked], [2])
        right += draft.tokens[0] == 3 + int(noise.argmax())
        drawn.add(draft.tokens[0])
        assert draft.tokens[1] == 8, "behind either"
    assert right == 40 and drawn == {3, 4}
    for likely in range(20):
        told(drafter, [1, 2, 3, 8], f"more {likely}")
    asked = [sequence([50, 1, 2], name=f"{seed} again", temperature=1.0, seed=seed) for seed in range(40)]
    tokens = [draft.tokens[0] for draft in drafter.propose(asked, [1] * 40)]
    assert tokens.count(3) > 30, "and keeps to what most places say"


def test_the_noise_of_a_draft_is_that_of_its_places() -> None:
    drafter = Suffix(threshold=0.0)
    for first, second in ((3, 5), (3, 6)) * 6:
        told(drafter, [1, 2, first, second])
    for seed in range(20):
        asked = sequence([50, 1, 2], name=str(seed), temperature=1.0, seed=seed)
        noise = gumbel(torch.tensor([seed]), torch.tensor([len(asked.tokens) + 1]), torch.tensor([5, 6]))[0]
        assert drafter.propose([asked], [2])[0].tokens == [3, 5 + int(noise.argmax())]


def test_where_only_the_law_of_texts_is_kept_the_likeliest_is_drafted() -> None:
    """Its noise is not the target's then."""
    drafter = Suffix(threshold=0.0)
    for token in (3, 4, 3):
        told(drafter, [1, 2, token, 8])
    for seed in range(20):
        asked = sequence([50, 1, 2], name=str(seed), temperature=1.0, seed=seed)
        asked.coupled = False
        assert drafter.propose([asked], [1])[0].tokens == [3]
