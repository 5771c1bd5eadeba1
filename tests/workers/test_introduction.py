"""What ranks say of themselves, and that they say it."""

import logging
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from stepladder.parallel.layers import POOLS
from stepladder.parallel.model import Transformer
from stepladder.parallel.shards import ALONE, Placement, Shard
from stepladder.parallel.spec import ModelSpec
from stepladder.parallel.wiring import FFN
from stepladder.workers.config import EngineConfig, KvConfig
from stepladder.workers.introduction import of_cache, of_model
from stepladder.workers.rank import RankConfig
from stepladder.workers.roles import rank_of
from stepladder.workers.speculation.config import SpeculateConfig
from tests.families import write_family

DEMO = Path(__file__).parents[2] / "launch" / "demo_model"


def test_a_part_of_the_model() -> None:
    spec = replace(ModelSpec.load(DEMO), dtype=torch.float32)
    with torch.device("meta"):
        whole, half = Transformer(spec), Transformer(spec, Shard(1, 2))
    assert of_model(whole, POOLS, "cpu", 1.25) == (
        "rank 0 of 1, attention and ffn on cpu: llama of 6 layers, ladder wiring; "
        "5.5 million parameters as float32 here, 21.9 MB, read in 1.2 s"
    )
    half.native = True
    assert of_model(half, POOLS, "cpu", 0.0).startswith("rank 1 of 2, attention and ffn on cpu with native kernels: ")
    some = replace(spec, ladder_layers=(1, 2))
    with torch.device("meta"):
        assert "ladder wiring in 2 of 6 layers;" in of_model(Transformer(some), POOLS, "cpu", 0.0)


def test_experts_of_an_ffn_rank(tmp_path: Path) -> None:
    spec = ModelSpec.load(write_family(tmp_path, "qwen2-moe"))
    with torch.device("meta"):
        side = Transformer(spec, Placement(ALONE, ALONE, Shard(1, 3), home=True), pools=(FFN,))
    said = of_model(side, (FFN,), "cpu", 0.0)
    assert said.startswith(
        "rank 1 of 3, ffn on cpu: qwen2_moe of 3 layers, standard wiring, 3 of 6 experts for a token;"
    )


def test_the_cache() -> None:
    assert of_cache(16384, 1000) == "KV cache of 16384 tokens, 16.4 requests of full length (1000)"


def test_an_engine_introduces_itself_when_it_is_ready(caplog: pytest.LogCaptureFixture) -> None:
    config = RankConfig(
        model=str(DEMO), shard=ALONE, prefix="p", host="127.0.0.1", ranks_here=1, device="cpu", secret="s" * 64,
        collective_seconds=10.0, engine=EngineConfig(), kv=KvConfig(tokens=2048),
        speculate=SpeculateConfig(kind="suffix"),
    )  # fmt: skip
    rank = rank_of(config)
    with caplog.at_level(logging.INFO):
        rank.begin(rank.load("127.0.0.1", rank.open_store()))
    said = [record.message for record in caplog.records if record.name == "stepladder.workers.rank"]
    assert len(said) == 3 and said[0].startswith("rank 0 of 1, attention and ffn on cpu")
    assert "5.5 million parameters as float32 here, 21.9 MB, read in " in said[0]
    assert said[1:] == ["KV cache of 2048 tokens, 2.0 requests of full length (1024)", "drafts by suffix"]
