"""What a server knows of the model's files and of its engines: how long a text may be, and what is left out."""

import json
import shutil
from pathlib import Path
from typing import Any

import httpx
import pytest

from stepladder.cluster.config import Deployment, GatewayConfig, ModelConfig
from stepladder.cluster.gateway.actor import service_config
from stepladder.cluster.gateway.service_config import ServiceConfig
from stepladder.cluster.supervisor import figures
from stepladder.workers.config import EngineConfig, KvConfig
from stepladder.workers.engine import EngineStats
from stepladder.workers.engine_rank import EngineFigures
from stepladder.workers.params import SamplingParams
from tests.cluster.engines import Served, routed, served, within
from tests.cluster.serving import serve

pytestmark = pytest.mark.timeout(60)
CHAT, COMPLETION = "/v1/chat/completions", "/v1/completions"
HELLO: dict[str, Any] = {"model": "org/tiny", "messages": [{"role": "user", "content": "hello"}], "ignore_eos": True}


def config_of(model: Path, **parts: Any) -> ServiceConfig:
    """What the gateway of a deployment with these parts makes of a model."""
    named = ModelConfig(path=str(model), name="org/tiny")
    return service_config(Deployment(name="d", run_dir="/r", secret="s", model=named, **parts), str(model))


def test_an_engine_with_less_room_bounds_what_is_left_open(random_model: Path) -> None:
    """As with a measured cache: the server believes in 1024 tokens until the engine says 96."""
    config = config_of(random_model)
    assert config.max_model_len == 1024
    with serve(random_model, {"kv_tokens": 100}, max_model_len=config.max_model_len) as server:
        assert server.post(CHAT, HELLO).json()["usage"]["total_tokens"] == 96
        assert httpx.get(server.url + "/v1/models").json()["data"][0]["max_model_len"] == 96
        assert httpx.get(server.url + "/v1/models/org/tiny").json()["max_model_len"] == 96
        assert server.post("/tokenize", {"prompt": "a"}).json()["max_model_len"] == 96
        error = server.post(CHAT, {**HELLO, "max_tokens": 96}).json()["error"]
        assert error["code"] == "context_length_exceeded" and "context is 96 tokens" in error["message"]


def test_the_smallest_engine_that_is_there_counts(random_model: Path) -> None:
    async def scene(first: Served, second: Served) -> None:
        second.engine.stats.max_model_len = 100
        router = await routed(first, second)
        assert router.max_model_len == 100
        await router.update([first.endpoint])
        assert router.max_model_len == 256
        await router.update([])
        assert router.max_model_len is None
        await router.close()

    with served(random_model, "engine-0", "engine-1") as engines:
        within(scene(*engines))


@pytest.mark.parametrize(
    ("engine", "kv", "length"),
    [
        (EngineConfig(), KvConfig(), 1024),
        (EngineConfig(), KvConfig(tokens=100), 96),
        (EngineConfig(), KvConfig(tokens=100, block_size=10), 100),
        (EngineConfig(max_model_len=50), KvConfig(tokens=100), 50),
        (EngineConfig(), KvConfig(tokens=4096), 1024),
    ],
)
def test_before_an_engine_is_heard_the_options_say_it(
    random_model: Path, engine: EngineConfig, kv: KvConfig, length: int
) -> None:
    assert config_of(random_model, engine=engine, kv=kv).max_model_len == length


def test_what_the_models_makers_recommend_is_the_default(random_model: Path, tmp_path: Path) -> None:
    model = Path(shutil.copytree(random_model, tmp_path / "model"))
    file = model / "generation_config.json"
    file.write_text(json.dumps({"temperature": 0, "repetition_penalty": 1.4, "max_new_tokens": 30}))
    config = config_of(model, gateway=GatewayConfig(api_key="k"))
    assert config.defaults == SamplingParams(temperature=0.0, repetition_penalty=1.4, max_tokens=30)
    assert config_of(random_model).chat_max_tokens is None and config.api_key == "k"
    options = {"defaults": config.defaults, "chat_max_tokens": config.chat_max_tokens}
    with serve(random_model, {"max_model_len": 60}, **options) as server:

        def generated(path: str = CHAT, **fields: Any) -> int:
            return server.post(path, {**HELLO, **fields}).json()["usage"]["completion_tokens"]

        assert generated() == 30 and generated(max_tokens=40) == 40 and generated(max_completion_tokens=5) == 5
        long = [{"role": "user", "content": "x" * 40}]
        assert generated(messages=long) == 60 - 43, "as far as the context goes"
        completion = server.post(COMPLETION, {"model": "org/tiny", "prompt": "a", "ignore_eos": True}).json()
        assert completion["usage"]["completion_tokens"] == 16, "OpenAI's default, as vLLM has it"
        answers = [server.post(CHAT, {**HELLO, "seed": seed}).json()["choices"][0]["message"] for seed in (1, 2)]
        assert answers[0] == answers[1], "greedy"


def test_figures_of_the_monitor_do_not_add_up_limits() -> None:
    stats = [EngineFigures(engine=EngineStats(max_model_len=100, steps=3))]
    numbers = figures({"engine-0": stats, "engine-1": stats}, {}, {})
    assert numbers["engine/steps"] == 6
    assert not {"engine/max_model_len", "engine/step_sizes"} & numbers.keys()
