"""What a deployment says while it works."""

from stepladder.cluster.spoken import Spoken


def row(**engine: float) -> dict[str, float]:
    return {"serve/seconds": 1.0} | {f"engine/{name}": value for name, value in engine.items()}


def test_a_sentence_is_of_the_time_since_the_last_one() -> None:
    spoken = Spoken()
    assert spoken.line(100.0, row(prompt_tokens=50, generation_tokens=20)) is None, "nobody knows since when"
    later = row(
        prompt_tokens=170, generation_tokens=104, running=3, waiting=1, kv_usage=0.125,
        prefix_cache_queries=120, prefix_cache_hits=30, draft_tokens=40, accepted_tokens=30,
        reduce_seconds=2.0, exposed_seconds=0.5,
    )  # fmt: skip
    assert spoken.line(105.0, later) is None, "it is too early"
    assert spoken.line(112.0, later) == (
        "10.0 tokens/s in, 7.0 out; 3 running, 1 waiting; KV cache 12% in use; 25% of prompt tokens from the prefix "
        "cache; 75% of drafted tokens accepted; 75% of time of all-reduces hidden"
    )


def test_nothing_is_said_of_nothing() -> None:
    spoken, idle = Spoken(), row(prompt_tokens=5, generation_tokens=5, draft_tokens=4, accepted_tokens=1)
    assert [spoken.line(10.0 * n, idle) for n in range(4)] == [None] * 4
    assert spoken.line(40.0, {}) is None
    assert spoken.line(50.0, row(waiting=1)) == "0.0 tokens/s in, 0.0 out; 0 running, 1 waiting; KV cache 0% in use"


def test_an_engine_that_began_anew_has_not_done_less_than_nothing() -> None:
    spoken = Spoken()
    spoken.line(0.0, row(prompt_tokens=500, generation_tokens=900))
    said = spoken.line(10.0, row(prompt_tokens=20, generation_tokens=30))
    assert said and said.startswith("2.0 tokens/s in, 3.0 out;")
