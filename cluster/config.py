"""A deployment as frozen dataclasses. Hydra builds them once, in launch/; nothing below reads anything else."""

from collections.abc import Callable
from dataclasses import dataclass, field, fields
from typing import NamedTuple
from urllib.parse import urlsplit

from stepladder.kernels.once import CACHE
from stepladder.parallel.afd.control import MAX_MICRO_BATCHES
from stepladder.parallel.afd.wire import WIRES
from stepladder.workers.afd.micro_batches import SCHEDULES
from stepladder.workers.config import EngineConfig, KvConfig
from stepladder.workers.rank import ATTENTION, FFN, TRAINER, WHOLE
from stepladder.workers.speculation.config import SpeculateConfig
from stepladder.workers.speculation.kinds import WITH_HEAD
from stepladder.workers.speculation.learning.config import LearnConfig
from stepladder.workers.text.tool_calls import FORMATS

WANDB_MODES = ("online", "offline", "disabled")


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """What is served.

    Attributes:
        path: a Hugging Face directory or a GGUF file that every node can read, or the name of a packaged model.
        name: what clients call it.
        cache: folder on every node for packaged models, and for what GGUF files become.
    """

    path: str
    name: str
    cache: str = CACHE


@dataclass(frozen=True)
class Group:
    """Ranks that start, live and die together. Whoever places or keeps ranks knows nothing else of the layout.

    Attributes:
        role: what they are for; a key of `ROLES`.
        needed: whether serving needs it; the others may be away without anybody noticing, and run on the CPU time
            that is left over (Linux' idle class).
    """

    name: str
    role: str
    size: int
    needed: bool = True


@dataclass(frozen=True, kw_only=True)
class LayoutConfig:
    """Who holds what of the model.

    Attributes:
        kind: "tp": every rank has a slice of every layer. "afd": attention and FFNs lie on different ranks.
        tp: ranks of a tensor-parallel group. replicas: how many such groups serve the model side by side.
        balance: of "tp". "auto" has FFNs of ladder and parallel layers make up for heads that ranks
            cannot share evenly; "even" does not.
        experts: of a mixture of experts: "split" gives every rank a part of each, "whole" gives it some of them.
        attention: attention ranks of "afd", each with an engine, a KV cache and requests of its own.
        ffn: FFN ranks of "afd", tensor-parallel among themselves, for all attention ranks together.
        schedule: of "afd". "pingpong" splits a step into micro-batches that go to and fro; "ladder" has both sides work
            on one batch at once, which needs a ladder checkpoint; "auto" takes "ladder" wherever it can.
        micro_batches: of "pingpong"; None takes 2 (1 + tC/tF), rounded up, from measured times.
        dispatch: of "afd". "broadcast" sends every row to all FFN ranks, each of which computes its share of every FFN;
            "home" sends it to one, which has it computed whole: there are FFNs on all of them, and experts are asked
            for across them.
        wire: how rows travel from attention to FFN: "plain" (the model's dtype) or "fp8", for checkpoints without lag.
    """

    kind: str = "tp"
    tp: int = 1
    replicas: int = 1
    balance: str = "auto"
    experts: str = "split"
    attention: int = 1
    ffn: int = 1
    schedule: str = "auto"
    micro_batches: int | None = None
    dispatch: str = "broadcast"
    wire: str = "plain"

    def __post_init__(self) -> None:
        for name in ("tp", "replicas", "attention", "ffn", "micro_batches"):
            if (value := getattr(self, name)) is not None and value < 1:
                raise ValueError(f"layout.{name} is {value}; it must be at least 1")
        choices = {
            "kind": LAYOUTS,
            "balance": ("auto", "even"),
            "experts": ("split", "whole"),
            "schedule": SCHEDULES,
            "dispatch": ("broadcast", "home"),
            "wire": WIRES,
        }
        for name, allowed in choices.items():
            if getattr(self, name) not in allowed:
                raise ValueError(f"layout.{name} is {getattr(self, name)!r}; it must be one of {', '.join(allowed)}")
        if self.micro_batches is not None and self.micro_batches > MAX_MICRO_BATCHES:
            raise ValueError(f"layout.micro_batches is {self.micro_batches}; it must be at most {MAX_MICRO_BATCHES}")
        self._refuse_what_does_not_apply()

    def _refuse_what_does_not_apply(self) -> None:
        mine, hint, _ = LAYOUTS[self.kind]
        for option in fields(self):
            name, value = option.name, getattr(self, option.name)
            if name not in ("kind", *mine) and value != option.default:
                raise ValueError(f"layout.{name} is {value}, but layout.kind is {self.kind}; {hint}")
        if self.schedule == "ladder" and self.micro_batches not in (None, 1):
            raise ValueError(
                f"layout.micro_batches is {self.micro_batches}, but layout.schedule=ladder has one; use pingpong"
            )

    def groups(self) -> list[Group]:
        """All groups of ranks, engines first."""
        return LAYOUTS[self.kind].groups(self)

    @property
    def home(self) -> bool:
        """Whether a row goes to one FFN rank only."""
        return self.dispatch == "home"

    @property
    def whole_experts(self) -> bool:
        """Whether a rank has some experts, all of each."""
        return self.experts == "whole"

    @property
    def ranks(self) -> int:
        """Of the whole deployment."""
        return sum(group.size for group in self.groups())


class Layout(NamedTuple):
    """A kind of layout.

    Attributes:
        options: of LayoutConfig, those that it has a use for. instead: what to do about another.
        groups: what it comes to.
    """

    options: tuple[str, ...]
    instead: str
    groups: Callable[[LayoutConfig], list[Group]]


def _tp(layout: LayoutConfig) -> list[Group]:
    return [Group(f"engine-{index}", WHOLE, layout.tp) for index in range(layout.replicas)]


def _afd(layout: LayoutConfig) -> list[Group]:
    engines = [Group(f"engine-{index}", ATTENTION, 1) for index in range(layout.attention)]
    return [*engines, Group(FFN, FFN, layout.ffn)]


LAYOUTS = {
    "tp": Layout(("tp", "replicas", "balance", "experts"), "choose layout=afd for it", _tp),
    "afd": Layout(
        ("attention", "ffn", "experts", "dispatch", "schedule", "micro_batches", "wire"),
        "use layout.attention and layout.ffn",
        _afd,
    ),
}


@dataclass(frozen=True, kw_only=True)
class GatewayConfig:
    """The HTTP side.

    Attributes:
        host: address to listen on; loopback unless told otherwise.
        port: 0 takes a free one, which then stays the same for the deployment's life.
        api_key: if set, requests need it as a bearer token; never empty.
        api_key_file: of hashed keys, any of which will do, on every node that may run the gateway (`ApiKeys`).
        drain_seconds: how long requests in flight may still run after SIGTERM.
        request_seconds: how long a request may take, queue included, before it is ended; None leaves it to clients.
        max_body_bytes: of a request; None takes what the context may need.
        resource: a Ray resource that the gateway's node must have, such as node:__internal_head__ for the head; None
            takes any node.
        otlp_traces_endpoint: an OpenTelemetry collector that gets a span per request, over HTTP; None sends none.
        tokenizer_info: serve /tokenizer_info, which shows the chat template.
        special_tokens_in_content: what spells a special token in a chat message is one; as text, it cannot forge turns.
            A request may say otherwise for itself.
        tool_parser: how the model writes calls of tools, hermes or llama3_json; None looks at its chat template.
        cors_origins: of web pages, such as https://chat.example, that browsers let ask this server; "*" is all.
    """

    host: str = "127.0.0.1"
    port: int = 0
    api_key: str | None = None
    api_key_file: str | None = None
    drain_seconds: float = 30.0
    request_seconds: float | None = None
    max_body_bytes: int | None = None
    resource: str | None = None
    otlp_traces_endpoint: str | None = None
    tokenizer_info: bool = False
    special_tokens_in_content: bool = False
    tool_parser: str | None = None
    cors_origins: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if not 0 <= self.port < 65536:
            raise ValueError(f"gateway.port is {self.port}; it must be between 0 and 65535")
        for name in ("request_seconds", "max_body_bytes"):
            if (value := getattr(self, name)) is not None and value <= 0:
                raise ValueError(f"gateway.{name} is {value}; it must be above 0, or null")
        if self.api_key is not None and not self.api_key.strip():
            raise ValueError("gateway.api_key is empty; give a key that clients can send, or null to let everybody in")
        if self.tool_parser not in (None, *FORMATS):
            raise ValueError(
                f"gateway.tool_parser is {self.tool_parser!r}; it must be one of {', '.join(FORMATS)}, or null"
            )
        for origin in self.cors_origins:
            if origin != "*" and (not _is_http(origin) or urlsplit(origin)._replace(scheme="", netloc="").geturl()):
                raise ValueError(
                    f"gateway.cors_origins holds {origin!r}; it must be an origin such as https://chat.example, "
                    'without a path, or "*" for all'
                )
        if self.otlp_traces_endpoint is not None:
            check_endpoint(self.otlp_traces_endpoint)


@dataclass(frozen=True, kw_only=True)
class ClusterConfig:
    """Where ranks run, and how soon silence counts as death. All times in seconds.

    Attributes:
        device: "cpu" or "cuda".
        strategy: Ray's placement strategy for the ranks of a group.
        ping_seconds: how often the controller asks every process for a sign of life.
        hang_seconds: a process that has not answered for this long is killed.
        orphan_seconds: a process that has heard no controller for this long ends itself.
        driver_seconds: without a sign of life of the driver for this long, the deployment drains and ends.
        start_seconds: how long a group may take to be placed and to load.
        collective_seconds: how long a collective may take.
    """

    device: str = "cpu"
    strategy: str = "PACK"
    ping_seconds: float = 0.5
    hang_seconds: float = 10.0
    orphan_seconds: float = 60.0
    driver_seconds: float = 15.0
    start_seconds: float = 300.0
    collective_seconds: float = 30.0

    def __post_init__(self) -> None:
        if self.device not in ("cpu", "cuda"):
            raise ValueError(f"cluster.device is {self.device!r}; it must be 'cpu' or 'cuda'")
        if self.strategy not in ("PACK", "SPREAD", "STRICT_PACK", "STRICT_SPREAD"):
            raise ValueError(f"cluster.strategy is {self.strategy!r}; it must be one of Ray's placement strategies")


@dataclass(frozen=True, kw_only=True)
class MonitorConfig:
    """Where figures go, besides /metrics: a JSONL file always, Weights & Biases too.

    wandb: online, offline or disabled. project: of W&B. every_seconds: between two rows of figures.
    """

    wandb: str = "offline"
    project: str = "stepladder"
    every_seconds: float = 5.0

    def __post_init__(self) -> None:
        if self.wandb not in WANDB_MODES:
            raise ValueError(f"monitor.wandb is {self.wandb!r}; it must be one of {', '.join(WANDB_MODES)}")


@dataclass(frozen=True, kw_only=True)
class Deployment:
    """Everything the controller needs.

    Attributes:
        name: tells deployments of one Ray cluster apart.
        run_dir: absolute directory for the journal, logs and figures.
        secret: shared by this deployment's processes, made anew for each.
        detach: keep serving after the driver has gone.
    """

    name: str
    run_dir: str
    secret: str
    model: ModelConfig
    layout: LayoutConfig = field(default_factory=LayoutConfig)
    engine: EngineConfig = field(default_factory=EngineConfig)
    kv: KvConfig = field(default_factory=KvConfig)
    speculate: SpeculateConfig = field(default_factory=SpeculateConfig)
    train: LearnConfig = field(default_factory=LearnConfig)
    gateway: GatewayConfig = field(default_factory=GatewayConfig)
    cluster: ClusterConfig = field(default_factory=ClusterConfig)
    monitor: MonitorConfig = field(default_factory=MonitorConfig)
    detach: bool = False

    def __post_init__(self) -> None:
        if self.layout.kind == "afd" and self.cluster.device != "cpu":
            raise ValueError("layout=afd runs on cluster.device=cpu only so far; use layout=tp on GPUs")
        if self.layout.kind == "afd" and self.cluster.hang_seconds >= self.cluster.collective_seconds:
            raise ValueError(
                f"cluster.hang_seconds is {self.cluster.hang_seconds}, but with layout=afd it must be below "
                f"cluster.collective_seconds ({self.cluster.collective_seconds}), so that a rank that hangs is killed "
                "before those who wait for it give up"
            )
        if self.layout.kind == "afd" and self.engine.lookahead:
            raise ValueError("engine.lookahead is 1, but with layout=afd steps are not queued ahead; set it to null")
        self.speculate.check_taught(self.train.is_on)
        if self.train.is_on and self.speculate.kind not in WITH_HEAD:
            raise ValueError(
                f"train.kind is online, but speculate.kind is {self.speculate.kind}; what learns is the head of "
                f"{' or '.join(f'speculate={kind}' for kind in WITH_HEAD)}"
            )

    def groups(self) -> list[Group]:
        """All groups of ranks, engines first, those that serving does not need last."""
        trainers = [Group(TRAINER, TRAINER, self.train.ranks, needed=False)] if self.train.is_on else []
        return [*self.layout.groups(), *trainers]

    @property
    def drafters(self) -> str:
        """The folder of the drafter's versions; every node must see it."""
        return f"{self.run_dir}/drafter"


def check_endpoint(url: str) -> str:
    """The full URL that spans are posted to: a collector's, to which /v1/traces is added if it has no path.

    Raises:
        ValueError: it is no URL of HTTP, or the packages are not installed.
    """
    option = "gateway.otlp_traces_endpoint"
    if not _is_http(url):
        raise ValueError(f"{option} is {url!r}; it must be a URL of OTLP over HTTP, such as http://collector:4318")
    try:
        import opentelemetry.exporter.otlp.proto.http.trace_exporter
        import opentelemetry.sdk.trace  # noqa: F401
    except ImportError:
        raise ValueError(
            f"{option} needs packages that are not installed here; run pip install opentelemetry-sdk "
            f"opentelemetry-exporter-otlp-proto-http on every node, or set it to null"
        ) from None
    parts = urlsplit(url)
    return url if parts.path.strip("/") else parts._replace(path="/v1/traces").geturl()


def _is_http(url: str) -> bool:
    try:
        parts = urlsplit(url)
        return parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:  # an address or a port that cannot be
        return False
