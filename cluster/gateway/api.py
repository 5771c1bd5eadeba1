"""The routes. All work is in `openai_service.py`."""

from functools import partial
from typing import Any

from fastapi import FastAPI, Request
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.middleware.cors import CORSMiddleware
from starlette.responses import JSONResponse, Response

from stepladder.cluster.gateway.api_keys import ApiKeys
from stepladder.cluster.gateway.errors import Unavailable, install_handlers
from stepladder.cluster.gateway.middleware import OPEN_PATHS, Gatekeeper
from stepladder.cluster.gateway.openai_service import OpenAIService
from stepladder.cluster.gateway.openapi import describe
from stepladder.cluster.gateway.protocol import ChatRequest, CompletionRequest, DetokenizeRequest, TokenizeRequest
from stepladder.cluster.gateway.reply import Reply
from stepladder.cluster.gateway.strict_json import Body
from stepladder.cluster.gateway.tracing import Traced, Traces

CHAT, COMPLETION = "/v1/chat/completions", "/v1/completions"
BODIES: dict[str, type[Body]] = {
    CHAT: ChatRequest,
    COMPLETION: CompletionRequest,
    "/tokenize": TokenizeRequest,
    "/detokenize": DetokenizeRequest,
}


def build_app(service: OpenAIService, traces: Traces | None = None) -> FastAPI:
    """The OpenAI-compatible server of one model, for any ASGI server; with `traces`, a span per request."""
    app = FastAPI(title="Stepladder", version=service.config.version, redirect_slashes=False)
    keys = ApiKeys(service.config.api_key, service.config.api_key_file)
    app.add_middleware(Gatekeeper, keys=keys, max_body_bytes=service.config.body_limit)
    if traces:
        app.add_middleware(Traced, traces=traces, untraced=OPEN_PATHS)  # sees what the other refuses
    if origins := service.config.cors_origins:  # outermost: a preflight has no key, and refusals must be readable
        headers = ["X-Request-Id", "Retry-After"]
        app.add_middleware(
            CORSMiddleware, allow_origins=origins, allow_methods=["*"], allow_headers=["*"], expose_headers=headers
        )
    install_handlers(app)
    _add_generating(app, service)
    _add_models(app, service)
    _add_tokenizer(app, service)
    _add_operations(app, service)
    describe(app, BODIES, streams={CHAT, COMPLETION}, texts={"/metrics": CONTENT_TYPE_LATEST})
    return app


def _add_generating(app: FastAPI, service: OpenAIService) -> None:
    @app.post(CHAT)
    async def chat(http: Request) -> Response:
        body = await service.read(http, ChatRequest)
        return Reply(service, http.state.request_id, http.state.owner, partial(service.chat, body))

    @app.post(COMPLETION)
    async def completion(http: Request) -> Response:
        body = await service.read(http, CompletionRequest)
        return Reply(service, http.state.request_id, http.state.owner, partial(service.completion, body))


def _add_models(app: FastAPI, service: OpenAIService) -> None:
    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        return {"object": "list", "data": [service.card()]}

    @app.get("/v1/models/{name:path}")
    async def model(name: str) -> dict[str, Any]:
        service.check_model(name)
        return service.card()


def _add_tokenizer(app: FastAPI, service: OpenAIService) -> None:
    @app.post("/tokenize")
    async def tokenize(http: Request) -> dict[str, Any]:
        return await service.tokenize(await service.read(http, TokenizeRequest))

    @app.post("/detokenize")
    async def detokenize(http: Request) -> dict[str, Any]:
        return await service.detokenize(await service.read(http, DetokenizeRequest))

    if service.config.tokenizer_info:
        info = service.tokenizer.info()

        @app.get("/tokenizer_info")
        async def tokenizer_info() -> Response:
            return JSONResponse(info)


def _add_operations(app: FastAPI, service: OpenAIService) -> None:
    @app.get("/health")
    async def health() -> dict[str, str]:
        """The process is alive."""
        return {"status": "alive"}

    @app.get("/ready")
    async def ready() -> dict[str, str]:
        """Requests are welcome."""
        if not service.ready:
            raise Unavailable("no engine is ready, or this server is draining", retry_after=2)
        return {"status": "ready"}

    @app.get("/metrics")
    async def metrics() -> Response:
        return Response(service.metrics.exposition(), media_type=CONTENT_TYPE_LATEST)

    @app.get("/version")
    async def version() -> dict[str, str]:
        return {"version": service.config.version}
