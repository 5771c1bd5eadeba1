"""A deployment as frozen dataclasses. Hydra builds them once, in launch/; nothing below reads anything else."""

from dataclasses import dataclass, field

from cluster.tracing import check_endpoint
from workers.config import EngineConfig, KvConfig

WANDB_MODES = ("online", "offline", "disabled")


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """path: a Hugging Face directory that every node can read. name: what clients call it."""

    path: str
    name: str


@dataclass(frozen=True, kw_only=True)
class LayoutConfig:
    """tp: ranks of a tensor-parallel group. replicas: how many such groups serve the model side by side."""

    tp: int = 1
    replicas: int = 1

    def __post_init__(self) -> None:
        for name in ("tp", "replicas"):
            if getattr(self, name) < 1:
                raise ValueError(f"layout.{name} is {getattr(self, name)}; it must be at least 1")


@dataclass(frozen=True, kw_only=True)
class GatewayConfig:
    """The HTTP side.

    Attributes:
        host: address to listen on; loopback unless told otherwise.
        port: 0 takes a free one, which then stays the same for the deployment's life.
        api_key: if set, requests need it as a bearer token.
        drain_seconds: how long requests in flight may still run after SIGTERM.
        resource: a Ray resource that the gateway's node must have, such as node:__internal_head__ for the head; None
            takes any node.
        otlp_traces_endpoint: an OpenTelemetry collector that gets a span per request, over HTTP; None sends none.
        tokenizer_info: serve /tokenizer_info, which shows the chat template.
    """

    host: str = "127.0.0.1"
    port: int = 0
    api_key: str | None = None
    drain_seconds: float = 30.0
    resource: str | None = None
    otlp_traces_endpoint: str | None = None
    tokenizer_info: bool = False

    def __post_init__(self) -> None:
        if not 0 <= self.port < 65536:
            raise ValueError(f"gateway.port is {self.port}; it must be between 0 and 65535")
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
    """Where figures go, besides /metrics: a JSONL file always, Weights & Biases unless disabled."""

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
    gateway: GatewayConfig = field(default_factory=GatewayConfig)
    cluster: ClusterConfig = field(default_factory=ClusterConfig)
    monitor: MonitorConfig = field(default_factory=MonitorConfig)
    detach: bool = False
