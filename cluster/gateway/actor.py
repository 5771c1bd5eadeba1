"""The gateway actor: the HTTP app under uvicorn, with the router inside, in one event loop."""

import asyncio
import logging
import os
from contextlib import nullcontext
from dataclasses import asdict
from typing import Any

import uvicorn

from stepladder import __version__
from stepladder.cluster.config import Deployment
from stepladder.cluster.endpoint import Endpoint
from stepladder.cluster.gateway.api import build_app
from stepladder.cluster.gateway.http_limits import HttpLimits, http_config
from stepladder.cluster.gateway.listening import listen
from stepladder.cluster.gateway.openai_service import OpenAIService
from stepladder.cluster.gateway.router import Router
from stepladder.cluster.gateway.service_config import ServiceConfig
from stepladder.cluster.gateway.tracing import Traces
from stepladder.cluster.processes import kill_process
from stepladder.parallel.generation_defaults import GenerationDefaults
from stepladder.parallel.spec import ModelSpec
from stepladder.workers.actors import Place, configure_logging, settle_memory
from stepladder.workers.model_check import recommended_params
from stepladder.workers.silence import Silence
from stepladder.workers.source.resolve import resolve
from stepladder.workers.text.tokenizer import Tokenizer

log = logging.getLogger(__name__)


class _Server(uvicorn.Server):
    """uvicorn without its signal handlers: Ray and the controller decide when this process ends."""

    def capture_signals(self) -> Any:
        return nullcontext()


def service_config(deployment: Deployment, directory: str) -> ServiceConfig:
    """What the gateway of a deployment serves, whose model lies in `directory`.

    Raises:
        ValueError: the model's configuration or the limits are unusable.
    """
    spec = ModelSpec.load(directory)
    return ServiceConfig(
        model_name=deployment.model.name,
        max_model_len=deployment.engine.model_len(spec, deployment.kv, deployment.kv.tokens),
        vocab_size=spec.vocab_size,
        version=__version__,
        root=deployment.model.path,
        api_key=deployment.gateway.api_key,
        api_key_file=deployment.gateway.api_key_file,
        tokenizer_info=deployment.gateway.tokenizer_info,
        special_tokens_in_content=deployment.gateway.special_tokens_in_content,
        tool_parser=deployment.gateway.tool_parser,
        cors_origins=deployment.gateway.cors_origins,
        request_seconds=deployment.gateway.request_seconds,
        max_body_bytes=deployment.gateway.max_body_bytes,
        defaults=recommended_params(directory),
        chat_max_tokens=GenerationDefaults.load(directory).max_tokens,
    )


class GatewayActor:
    """One HTTP endpoint of a deployment, as an actor that the controller starts.

    It kills a controller that hangs, and ends itself when none comes back.
    """

    def __init__(self, deployment: Deployment, name: str) -> None:
        configure_logging()
        self._deployment, self._name = deployment, name
        self._tick = min(deployment.cluster.ping_seconds, deployment.cluster.orphan_seconds / 10)
        self._silence = Silence(self._tick)  # the controller's
        self._controller: Place | None = None

    async def where(self) -> Place:
        return Place.here()

    async def start(self, port: int) -> int:
        """Listen; returns the port, chosen by the system if `port` is 0.

        Raises:
            ValueError: the model's tokenizer or limits are unusable, the port is taken, or packages are missing here.
        """
        deployment = self._deployment
        directory = resolve(deployment.model.path, deployment.engine.dtype, deployment.model.cache)
        config = service_config(deployment, directory)
        self._router = Router.of(self._name, deployment)
        self._service = OpenAIService(self._router, Tokenizer(directory), config)
        endpoint = deployment.gateway.otlp_traces_endpoint
        self._traces = Traces(endpoint, config.version) if endpoint else None
        listener = listen(deployment.gateway.host, port)
        app = build_app(self._service, self._traces)
        self._server = _Server(http_config(app, HttpLimits(body_bytes=8 * config.body_limit)))
        settle_memory()
        self._serving = asyncio.create_task(self._server.serve(sockets=[listener]))
        self._watching = asyncio.create_task(self._watch())
        return listener.getsockname()[1]

    async def update(self, table: list[Endpoint], admit: bool) -> None:
        """The engines there are now, and whether new requests are welcome."""
        self._service.in_flight.draining = not admit
        await self._router.update(table)

    async def ping(self, controller: Place) -> dict[str, Any]:
        """A sign of life for both sides; `controller` is where the caller runs."""
        self._silence.broken()
        self._controller = controller
        engines = {engine: asdict(stats) for engine, stats in self._router.stats.items()}
        self._service.metrics.update_engines(engines)
        return {"ready": self._router.ready(), "in_flight": len(self._service.in_flight)}

    async def take_figures(self) -> dict[str, Any]:
        """Figures since the last call."""
        return {**self._service.snapshot(), "serve/replays": self._router.replays}

    async def drain(self, seconds: float) -> None:
        """Admit nothing more; return when all is answered or `seconds` are over, having closed what was left."""
        await self._service.drain(seconds)
        self._server.should_exit = True
        await self._serving
        if self._traces:
            await asyncio.to_thread(self._traces.close)
        await self._router.close()

    async def _watch(self) -> None:
        """Ray starts a dead controller again, but does not see one that hangs; we do, since its pings stop."""
        cluster = self._deployment.cluster
        while (silent := self._silence.seconds) < cluster.orphan_seconds:
            if self._controller and silent > cluster.ping_seconds + cluster.hang_seconds:
                log.error("no ping of the controller for %.1f s; killing it, Ray starts another", silent)
                kill_process(self._controller)
                self._controller = None
            await asyncio.sleep(self._tick)
        log.error("no controller for %.0f s; ending this gateway", cluster.orphan_seconds)
        os._exit(1)
