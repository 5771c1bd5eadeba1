"""Which request is the retry of which orphan."""

from typing import Any

import pytest

from stepladder.workers.core import Output, Request, SamplingParams
from stepladder.workers.server.orphans import Orphans


def request(
    request_id: str = "chat-0#1.7",
    prompt: tuple[int, ...] = (1, 2),
    owner: str = "me",
    domain: str = "",
    learn: bool = True,
    **params: Any,
) -> Request:
    sampling = SamplingParams(**{"seed": 5, "stop": ("x",), **params})
    return Request(id=request_id, prompt=prompt, params=sampling, owner=owner, domain=domain, learn=learn)


def test_a_retry_takes_over_what_went_on() -> None:
    orphans = Orphans(60.0)
    orphans.take_in(request(), [3])
    orphans.note(Output("chat-0#1.7", [4], "length"))
    assert orphans.names == ["chat-0"]
    orphan = orphans.give_out(request("chat-0#1", seed=6))
    assert orphan and (orphan.tokens, orphan.finish_reason) == ([3, 4], "length")
    assert not orphans.names and not orphans.give_out(request("chat-0#1"))


@pytest.mark.parametrize(
    "other",
    [
        {"prompt": (1, 3)},
        {"max_tokens": 17},
        {"prompt_logprobs": 1},
        {"logprobs": 0},
        {"temperature": 0.5},
        {"stop": ()},
        {"logit_bias": {1: 2.0}},
        {"request_id": "chat-1#1"},
        {"domain": "another"},
        {"learn": False},
        {"owner": "somebody else, or I with a seed of my own"},
    ],
)
def test_a_request_that_asks_otherwise_is_no_retry(other: dict[str, Any]) -> None:
    orphans = Orphans(60.0)
    orphans.take_in(request(), [3])
    assert orphans.give_out(request(**{"request_id": "chat-0#1", **other})) is None
    assert orphans.names == ["chat-0"]


def test_orphans_of_one_name_all_end() -> None:
    """A retry that began anew may lose its gateway as well."""
    orphans = Orphans(0.0)
    for number, tokens in ((7, [3]), (8, [3, 4]), (9, [3])):
        orphans.take_in(request(f"chat-0#1.{number}"), tokens)
    assert orphans.names == ["chat-0"]
    furthest = orphans.give_out(request("chat-0#2"))
    assert furthest and furthest.request.id == "chat-0#1.8"
    orphans.note(Output("chat-0#1.9", [4]))
    assert [gone.id for gone in orphans.expired()] == ["chat-0#1.7", "chat-0#1.9"] and not orphans.names
