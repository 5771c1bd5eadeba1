"""Requests in, tokens out: one scheduler and one executor. It knows tokens, nothing of text, HTTP or Ray."""

from bisect import bisect_left
from collections import deque
from concurrent.futures import FIRST_COMPLETED, Future, wait
from dataclasses import dataclass, field
from time import perf_counter

from stepladder.workers.core import Constraint, Output, Request, Sequence, StepPlan
from stepladder.workers.executor import Executor
from stepladder.workers.expert_load import ExpertLoad
from stepladder.workers.figures import counter, gauge, limit
from stepladder.workers.grammar.compiler import Grammars
from stepladder.workers.sampler import Drawn
from stepladder.workers.scheduler import Scheduler, SchedulerConfig
from stepladder.workers.speculation.learning.capture import Capture
from stepladder.workers.speculation.speculator import SpeculationStats, Speculator

PREPARE_SECONDS = 0.01  # how long a step without other work waits for a constraint
STEP_TOKENS = (1, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384)  # vLLM's buckets


@dataclass
class EngineStats(ExpertLoad, SpeculationStats):
    """Counters since start, the present state of the queues, and a limit.

    Attributes:
        max_model_len: prompt and output together, in tokens; 0 of an engine that has not been heard yet.
        native_kernels: 1 if it computes with native CPU kernels, 0 if with plain torch.
        step_tokens: tokens of all steps together. step_sizes: steps by size; the one at i counts those of at most
            STEP_TOKENS[i] tokens that no earlier one counts, the last one all others.
    """

    max_model_len: int = limit()
    native_kernels: int = gauge("native_kernels", "1 with native CPU kernels, 0 with plain torch.", across="none")
    steps: int = counter("engine_steps", "Steps run.")
    prompt_tokens: int = counter()
    generation_tokens: int = counter()
    preemptions: int = counter("num_preemptions", "Sequences that gave their KV blocks back and were recomputed.")
    running: int = gauge("num_requests_running", "Sequences in the running batch.")
    waiting: int = gauge("num_requests_waiting", "Sequences that wait for a place.")
    kv_usage: float = gauge("kv_cache_usage_perc", "Share of the KV blocks in use, 0 to 1.", default=0.0, across="mean")
    prefix_cache_queries: int = counter("prefix_cache_queries", "Prompt tokens looked up in the prefix cache.")
    prefix_cache_hits: int = counter("prefix_cache_hits", "Prompt tokens found there.")
    step_tokens: int = counter()
    step_sizes: list[int] = field(default_factory=lambda: [0] * (len(STEP_TOKENS) + 1))

    def count_step(self, tokens: int) -> None:
        """A step of so many tokens has been queued."""
        self.step_tokens += tokens
        self.step_sizes[bisect_left(STEP_TOKENS, tokens)] += 1


@dataclass
class Engine:
    """Continuous batching over one group of ranks; `step` is the whole of it.

    `config.lookahead` steps stay queued behind the one that is read, so that the device has work while the host plans.

    Attributes:
        grammars: what requests with structured_outputs need; without it they are refused.
        speculator: drafts tokens; without it every step draws one token of a sequence.
        capture: is shown everything that is drawn, with hidden states. Set it between two steps.
    """

    config: SchedulerConfig
    executor: Executor
    grammars: Grammars | None = None
    stats: EngineStats = field(default_factory=EngineStats)
    speculator: Speculator | None = None
    capture: Capture | None = None

    def __post_init__(self) -> None:
        self.scheduler = Scheduler(self.config)
        self.stats.max_model_len = self.config.max_model_len
        self._under_way: deque[tuple[StepPlan, Drawn]] = deque()
        self._planned = self._read_last = 0.0  # when a step was last planned, and read

    def speculate(self, speculator: Speculator | None) -> None:
        """From now on it drafts; None: nobody does."""
        self.speculator = speculator

    @property
    def has_work(self) -> bool:
        return self.scheduler.has_work or bool(self._under_way)

    def add(self, request: Request) -> None:
        """Queue a request; ValueError if it can never be served."""
        self.config.check(request)
        self.scheduler.add(request, self._constraint_of(request))
        self.stats.prompt_tokens += len(request.prompt)

    def find(self, request_id: str) -> Sequence | None:
        """The sequence of a request that has not ended."""
        return self.scheduler.find(request_id)

    def abort(self, request_id: str) -> bool:
        """Forget a request, between steps; False if it is not here."""
        found = self.scheduler.abort(request_id)
        self._look()
        return found

    def step(self) -> list[Output]:
        """Read one step and return what it did for each sequence that got a token."""
        outputs = self.scheduler.take_prepared()
        while len(self._under_way) <= self.config.lookahead and (plan := self._plan()).tokens:
            self._under_way.append((plan, self.executor.submit(plan)))
            self.stats.count_step(len(plan.tokens))
        if self._under_way:
            outputs += self._read()
        elif self.scheduler.preparing:
            self.executor.submit(StepPlan())  # nobody should wait for this engine
            wait(self.scheduler.preparing.values(), PREPARE_SECONDS, FIRST_COMPLETED)
        self._count(outputs)
        return outputs

    def _plan(self) -> StepPlan:
        drafter = self.speculator.drafter if self.speculator else None
        self.executor.likely = drafter.likely if drafter else 0
        self.executor.hidden = self.capture is not None or (drafter is not None and drafter.hidden)
        if self.speculator:
            self.speculator.draft(self.scheduler.running)
        self._planned = perf_counter()
        return self.scheduler.schedule()

    def _read(self) -> list[Output]:
        """What the oldest step under way did."""
        plan, drawn = self._under_way.popleft()
        outputs = self.scheduler.commit(drawn.result())
        if self.speculator:
            seconds = perf_counter() - max(self._planned, self._read_last)
            self.speculator.observe(plan, self.scheduler.verified, seconds)
        if self.capture:
            self.capture.observe(self.scheduler.verified)
        self._read_last = perf_counter()
        return outputs

    def heartbeat(self) -> None:
        """When idle: tell the other ranks that this one is alive, check that nothing leaked, and do what waits for the
        end of a step."""
        self.executor.submit(StepPlan())
        self.scheduler.check_integrity()
        self._look()
        if self.speculator:
            self.speculator.settle()
        if self.capture:
            self.capture.settle()

    def _constraint_of(self, request: Request) -> Future[Constraint] | None:
        params, config = request.params, self.config
        if params.structured_outputs is None:
            return None
        if self.grammars is None:
            raise ValueError("this engine has no tokenizer, which structured_outputs need")
        ends, last_ends = config.ends(params), config.last_ends(params)
        return self.grammars.begin(params.structured_outputs, ends, last_ends, request.output)

    def _count(self, outputs: list[Output]) -> None:
        self.stats.steps += 1
        self.stats.generation_tokens += sum(len(o.tokens) for o in outputs)
        self._look()

    def _look(self) -> None:
        """The present state of the queues, and who has left them."""
        for sequence in self.scheduler.take_ended():
            if self.speculator:
                self.speculator.forget(sequence)
            if self.capture:
                self.capture.forget(sequence)
        s, stats = self.scheduler, self.stats
        stats.preemptions = s.num_preemptions
        stats.running, stats.waiting = len(s.running), len(s.waiting) + len(s.preparing)
        stats.prefix_cache_queries, stats.prefix_cache_hits = s.blocks.queries, s.blocks.hits
        stats.kv_usage = 1 - s.blocks.num_free / s.blocks.num_blocks
