"""How large a measured KV cache becomes, and what a container's limits have to do with it."""

import re
import shutil
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch

from stepladder import LLM
from stepladder.parallel.afd.wire import PLAIN
from stepladder.parallel.mesh import Mesh, SingleRank
from stepladder.parallel.shards import Shard
from stepladder.parallel.spec import ModelSpec
from stepladder.workers import executor as executor_module
from stepladder.workers import sizing
from stepladder.workers.afd.membership import Membership
from stepladder.workers.afd.pool_forward import attention_executor
from stepladder.workers.assembly import whole_executor
from stepladder.workers.config import EngineConfig, KvConfig
from stepladder.workers.core import StepPlan
from stepladder.workers.memory import available, total
from stepladder.workers.sizing import check_kv, fitting, kv_size
from tests.ranks import run_ranks
from tests.tokenizers_of import write_byte_level

CPU = torch.device("cpu")
PER_TOKEN = 2 * 3 * 2 * 12 * 4  # keys and values, layers, KV heads, head_dim, bytes of fp32


@dataclass
class Model:
    spec: ModelSpec
    num_kv_heads: int


class Recording:
    """An executor as `kv_size` sees it; notes its warm-ups."""

    def __init__(self, path: Path) -> None:
        spec = ModelSpec.load(path)
        self.model, self.warm_ups = Model(spec, spec.num_kv_heads), list[tuple[int, ...]]()

    def warm_up(self, *sizes: int) -> None:
        self.warm_ups.append(sizes)


@pytest.fixture
def room(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Sets how many tokens' worth of memory is free."""
    return lambda tokens: monkeypatch.setattr(sizing, "available", lambda: tokens * PER_TOKEN)


def test_a_given_number_is_taken_in_whole_blocks(untied: Path) -> None:
    executor = Recording(untied)
    assert kv_size(executor, EngineConfig(), KvConfig(tokens=100), CPU) == 96
    assert not executor.warm_ups
    limits = EngineConfig().limits(executor.model.spec, KvConfig(tokens=100), 100, CPU)
    assert (limits.num_blocks, limits.max_model_len) == (6, 96)


def test_a_measured_one_takes_its_share_of_what_is_free(untied: Path, room: Any) -> None:
    executor, engine = Recording(untied), EngineConfig(max_sequences=9, max_step_tokens=50)
    room(1000)
    assert kv_size(executor, engine, KvConfig(), CPU) == 896, "nine tenths, in whole blocks of 16"
    assert executor.warm_ups == [(50, 9, 16)]
    assert kv_size(executor, engine, KvConfig(memory_fraction=0.5, block_size=10), CPU) == 500
    assert kv_size(executor, engine, KvConfig(), CPU, ranks_here=3) == 288
    assert engine.limits(executor.model.spec, KvConfig(), 96, CPU).max_model_len == 96


def test_no_more_is_taken_than_sequences_could_use_twice_over(untied: Path, room: Any) -> None:
    executor = Recording(untied)
    room(1_000_000)
    assert kv_size(executor, EngineConfig(max_sequences=2), KvConfig(), CPU) == 2 * 2 * 256
    few = EngineConfig(max_sequences=1, max_model_len=20)
    assert kv_size(executor, few, KvConfig(), CPU) == 48, "40, in whole blocks"
    assert kv_size(executor, few, KvConfig(block_size=64), CPU) == 64


def test_too_little_is_a_sentence(untied: Path, room: Any) -> None:
    room(100)
    with pytest.raises(ValueError, match=r"only 80 tokens of KV cache fit .* raise kv\.memory_fraction"):
        kv_size(Recording(untied), EngineConfig(max_model_len=90), KvConfig(), CPU)
    assert kv_size(Recording(untied), EngineConfig(), KvConfig(), CPU) == 80, "the model's length gives way"
    room(10)
    with pytest.raises(ValueError, match=r"only 0 tokens of KV cache fit"):
        kv_size(Recording(untied), EngineConfig(), KvConfig(), CPU)


def test_a_number_that_does_not_fit_is_refused(untied: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A third of what a machine of 3 GB has free: for one rank, for two that start together, for four in all."""
    monkeypatch.setattr(sizing, "available", lambda: 2_000_000_000)
    monkeypatch.setattr(sizing, "total", lambda: 3_000_000_000)
    spec, gigabyte = ModelSpec.load(untied), 10**9 // PER_TOKEN + 16

    def asked(tokens: int, ranks_here: int = 1, own_ranks_here: int = 1) -> int:
        kv, here = KvConfig(tokens=tokens), {"ranks_here": ranks_here, "own_ranks_here": own_ranks_here}
        check_kv(spec, kv, CPU, **here)
        return kv_size(Recording(untied), EngineConfig(), kv, CPU, **here)

    assert asked(gigabyte) > 0 and asked(gigabyte // 2, 4, 2) > 0
    for numbers, sentence in (
        ((2 * gigabyte,), "needs 2.0 GB, but there are 2.0 GB free on this machine; set fewer, or null, which takes"),
        ((gigabyte, 2, 2), "needs 1.0 GB on each of 2 ranks, but there are 2.0 GB free on this machine"),
        ((gigabyte, 3, 1), "needs 1.0 GB on each of 3 ranks, but there are 3.0 GB in this machine at all"),
    ):
        with pytest.raises(ValueError, match=rf"kv\.tokens is {numbers[0]}, whose KV cache {re.escape(sentence)}"):
            asked(*numbers)


def test_a_rank_that_is_started_again_needs_room_only_for_its_own_group(
    untied: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The other replica has taken its half of the memory already."""
    monkeypatch.setattr(sizing, "available", lambda: 1_200_000_000)
    monkeypatch.setattr(sizing, "total", lambda: 3_000_000_000)
    kv = KvConfig(tokens=10**9 // PER_TOKEN)
    assert kv_size(Recording(untied), EngineConfig(), kv, CPU, ranks_here=2, own_ranks_here=1) == kv.whole(kv.tokens)


def test_a_rank_needs_room_for_its_own_heads_only(untied: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spec = ModelSpec.load(untied)
    monkeypatch.setattr(sizing, "available", lambda: 100 * PER_TOKEN)
    kv = KvConfig(tokens=160)
    check_kv(spec, kv, CPU, Shard(0, 2))
    with pytest.raises(ValueError, match=r"kv\.tokens is 160"):
        check_kv(spec, kv, CPU)


def test_llm_refuses_what_does_not_fit_before_it_reads_weights(
    untied: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def load(*_: Any) -> None:
        raise AssertionError("weights were read")

    model = shutil.copytree(untied, tmp_path / "model")
    write_byte_level(model)
    monkeypatch.setattr("stepladder.workers.assembly.load", load)
    with pytest.raises(ValueError, match=r"kv\.tokens is \d+, whose KV cache needs \d+\.\d GB, .* or null, which"):
        LLM(str(model), device="cpu", kv_tokens=10**15 // PER_TOKEN)


def test_an_allocators_refusal_is_a_sentence() -> None:
    refusal = r"^the model does not fit into memory; use .* can't allocate memory"
    with pytest.raises(ValueError, match=refusal), fitting("the model"):
        torch.empty(1 << 60, dtype=torch.int8)
    with pytest.raises(RuntimeError, match=r"^something else$"), fitting("the model"):
        raise RuntimeError("something else")


@pytest.mark.parametrize(
    ("fields", "sentence"),
    [
        ({"memory_fraction": 0.0}, r"kv\.memory_fraction is 0\.0; it must be above 0"),
        ({"memory_fraction": 1.1}, r"kv\.memory_fraction is 1\.1; it must be above 0"),
        ({"memory_fraction": 0.5, "tokens": 64}, r"kv\.memory_fraction is 0\.5, but kv\.tokens is 64, so that nothing"),
        ({"tokens": 15}, r"kv\.tokens is 15; it must be at least kv\.block_size \(16\)"),
        ({"block_size": 0, "tokens": 64}, r"kv\.block_size is 0; it must be at least 1"),
    ],
)
def test_options_that_cannot_be_are_refused(fields: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        KvConfig(**fields)


def test_the_warm_up_has_a_prefill_and_the_largest_decode_and_samples(
    untied: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    executor, draw = whole_executor(ModelSpec.load(untied), str(untied), SingleRank()), executor_module.draw
    steps, drawn = list[tuple[int, int]](), list[int]()

    def noted(logits: torch.Tensor, plan: StepPlan) -> Any:
        drawn.append(len(draw(logits, plan).result().tokens))

    monkeypatch.setattr(executor_module, "draw", noted)
    executor.model.register_forward_hook(
        lambda _, inputs, __: steps.append((len(inputs[0]), int(inputs[1].positions.max())))
    )
    executor.warm_up(50, 9, 16)
    assert steps == [(50, 49), (9, 49)] and drawn == [9, 9]
    executor.warm_up(4, 9, 16)
    assert steps[2:] == [(4, 3), (4, 3)], "no step is larger"


def test_an_attention_rank_warms_up_alike(untied: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a pool, but with all that is drawn, so that its cache is not measured too large."""
    spec, drawn, draw = ModelSpec.load(untied), list[int](), executor_module.draw
    member = Membership(spec, "127.0.0.1", "secret", timedelta(seconds=1), 1.0, PLAIN)
    executor = attention_executor(spec, str(untied), member, 2, 4)

    def noted(logits: torch.Tensor, plan: StepPlan) -> Any:
        assert logits.shape == (9, spec.vocab_size)
        drawn.append(len(draw(logits, plan).result().tokens))

    monkeypatch.setattr(executor_module, "draw", noted)
    executor.warm_up(50, 9, 16)
    assert drawn == [9, 9] and executor.forward.waited == 0  # type: ignore[attr-defined]


def test_all_ranks_warm_up_together(untied: Path) -> None:
    def rank_main(mesh: Mesh) -> int:
        executor = whole_executor(ModelSpec.load(untied), str(untied), mesh)
        return kv_size(executor, EngineConfig(max_sequences=3, max_step_tokens=20), KvConfig(), CPU, ranks_here=2)

    assert run_ranks(2, rank_main) == [2 * 3 * 256] * 2


def group(folder: Path, limit: int | str, used: int, cache: int = 0, v1: bool = False) -> None:
    """The kernel's files of one control group."""
    names = ("memory.limit_in_bytes", "memory.usage_in_bytes") if v1 else ("memory.max", "memory.current")
    folder.mkdir(parents=True, exist_ok=True)
    for name, value in zip(names, (limit, used), strict=True):
        (folder / name).write_text(f"{value}\n")
    stat = f"anon 5\nactive_file {0 if v1 else cache - 7}\ninactive_file {0 if v1 else 7}\n"
    stat += f"total_active_file {cache - 7}\ntotal_inactive_file 7\n" if v1 else ""
    (folder / "memory.stat").write_text(stat)


def member(tmp_path: Path, text: str) -> Path:
    (tmp_path / "own").write_text(text)
    return tmp_path / "own"


def test_a_containers_limit_counts(tmp_path: Path) -> None:
    """Control groups v2, where the tightest of the groups around a process decides; the page cache can be dropped."""
    own = member(tmp_path, "0::/pod/container\n")
    group(tmp_path / "pod", 5000, 1000)
    group(tmp_path / "pod" / "container", 4000, 3000, cache=500)
    assert available(tmp_path, own) == 1500 and total(tmp_path, own) == 4000
    group(tmp_path / "pod", 5000, 4000)
    assert available(tmp_path, own) == 1000
    group(tmp_path / "pod", 5000, 6000)
    assert available(tmp_path, own) == 0
    group(tmp_path / "pod", "max", 6000)
    assert available(tmp_path, own) == 1500


def test_a_containers_own_root(tmp_path: Path) -> None:
    """Its path may be one of the host's, which the container does not see."""
    group(tmp_path, 4000, 3000)
    for path in ("/", "/kubepods/pod1/c1", "/../.."):
        assert available(tmp_path, member(tmp_path, f"0::{path}\n")) == 1000


def test_control_groups_v1(tmp_path: Path) -> None:
    own = member(tmp_path, "5:cpu,cpuacct:/docker/c1\n4:memory:/docker/c1\n0::/\n")
    group(tmp_path / "memory", 9223372036854771712, 9000, v1=True)
    group(tmp_path / "memory" / "docker" / "c1", 4000, 3000, cache=100, v1=True)
    assert available(tmp_path, own) == 1100


def test_without_a_limit_the_machines_memory_counts(tmp_path: Path) -> None:
    machine = psutil.virtual_memory().total
    for own in (tmp_path / "nothing", member(tmp_path, ""), member(tmp_path, "0::/\n1:name=systemd:/x\n")):
        assert 2**20 < available(tmp_path, own) <= machine == total(tmp_path, own)
    assert 0 < available() <= total()
