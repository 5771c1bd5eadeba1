"""Every family against `transformers`: logits of every position, greedy text, both precisions, any number of ranks."""

import json
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

from stepladder.parallel.checkpoint import load_weights, save_weights
from stepladder.parallel.context import WholeSequences
from stepladder.parallel.mesh import Mesh, SingleRank
from stepladder.parallel.model import Transformer
from stepladder.parallel.native import NATIVE, TORCH
from stepladder.parallel.spec import ModelSpec
from stepladder.workers.assembly import whole_executor
from stepladder.workers.config import EngineConfig
from stepladder.workers.core import Request, SamplingParams
from stepladder.workers.engine import Engine
from stepladder.workers.scheduler import SchedulerConfig
from tests.families import FAMILIES, read_oracle, write_family
from tests.llama import SMALL, oracle_greedy, oracle_logits
from tests.parallel.test_transformers import load, run_in_steps
from tests.ranks import run_ranks

COUNT = 64
EXPERTS = ("mixtral", "qwen2-moe", "qwen3-moe")
FEW = ("llama3", "cohere")  # on four ranks by default; four ranks share two cores here


def on_ranks(slow: Callable[[int, str], bool]) -> pytest.MarkDecorator:
    """All families on 1, 2 and 4 ranks."""
    pairs = [(tp, family) for tp in (1, 2, 4) for family in FAMILIES]
    params = [pytest.param(*pair, marks=[pytest.mark.slow] if slow(*pair) else []) for pair in pairs]
    return pytest.mark.parametrize(("tp", "family"), params)


@pytest.fixture(scope="module")
def some(prompts: list[list[int]]) -> list[list[int]]:
    """Lengths 17, 40 and 9: beyond and below every window."""
    return [prompts[1], prompts[3], prompts[6]]


@cache
def wanted_logits(path: Path, tokens: tuple[int, ...]) -> Tensor:
    return oracle_logits(read_oracle(path), list(tokens))


@cache
def wanted_text(path: Path, prompt: tuple[int, ...]) -> list[int]:
    return oracle_greedy(read_oracle(path), list(prompt), COUNT)


@on_ranks(slow=lambda tp, family: False)
def test_logits_equal_transformers(tp: int, family: str, families: dict[str, Path], some: list[list[int]]) -> None:
    """In one prefill, in chunks of several sizes mixed with decode, and token by token."""
    path = families[family]
    wanted = [wanted_logits(path, tuple(p)) for p in some]
    bound = 1e-4 * max(float(w.abs().max()) for w in wanted)
    chunks = {1: (64, 9, 3, 1), 2: (64, 5), 4: (9,)}[tp]

    def rank_main(mesh: Mesh) -> list[list[Tensor]]:
        model = load(path, mesh)
        return [run_in_steps(model, mesh, some, chunk) for chunk in chunks]

    for chunk, sequences in zip(chunks, run_ranks(tp, rank_main)[0], strict=True):
        for got, want in zip(sequences, wanted, strict=True):
            assert (got - want).abs().max() <= bound, f"chunks of {chunk}"


@on_ranks(slow=lambda tp, family: tp == 4 and family not in FEW)
def test_greedy_text_equals_generate(tp: int, family: str, families: dict[str, Path], some: list[list[int]]) -> None:
    path = families[family]
    mine = some[:2] if tp < 4 else some[:1]
    config = SchedulerConfig(max_sequences=3, max_step_tokens=11, max_model_len=128, num_blocks=64, block_size=4)

    def rank_main(mesh: Mesh) -> dict[str, list[int]]:
        executor = whole_executor(ModelSpec.load(path), str(path), mesh, config.num_blocks, config.block_size)
        if mesh.shard.rank:
            executor.follow()
            return {}
        engine, tokens = Engine(config, executor), {str(i): list[int]() for i in range(len(mine))}
        for index, prompt in enumerate(mine):
            params = SamplingParams(max_tokens=COUNT, temperature=0.0)
            engine.add(Request(id=str(index), prompt=tuple(prompt), params=params))
        while engine.has_work:
            for output in engine.step():
                tokens[output.id].extend(output.tokens)
        executor.stop()
        return tokens

    got = run_ranks(tp, rank_main)[0]
    for index, prompt in enumerate(mine):
        want = wanted_text(path, tuple(prompt))
        assert got[str(index)] == want
        assert len(set(want)) > 8, "the oracle's text is degenerate and proves little"


@pytest.mark.parametrize("family", FAMILIES)
@torch.inference_mode()
def test_whole_sequences_equal_transformers(family: str, families: dict[str, Path]) -> None:
    tokens = torch.randint(0, 101, (2, 20), generator=torch.Generator().manual_seed(3))
    model = load(families[family], SingleRank())
    got = model.logits(model(tokens.view(-1), WholeSequences(2, 20))).view(2, 20, -1)
    want = read_oracle(families[family])(tokens).logits
    torch.testing.assert_close(got, want, rtol=0, atol=1e-4 * float(want.abs().max()))


@pytest.mark.parametrize("family", FAMILIES)
@torch.inference_mode()
def test_what_we_write_transformers_reads(family: str, families: dict[str, Path], tmp_path: Path) -> None:
    """Its configuration and its tensors, under the family's own names; both models compute the same."""
    model = load(families[family], SingleRank())
    save_weights(model, tmp_path, torch.float32)
    (tmp_path / "config.json").write_text(json.dumps(model.spec.to_config()))
    tokens = torch.randint(0, 101, (1, 20), generator=torch.Generator().manual_seed(4))
    written, original = read_oracle(tmp_path), read_oracle(families[family])
    assert type(written) is type(original)
    torch.testing.assert_close(written(tokens).logits, original(tokens).logits, rtol=0, atol=0)


@pytest.mark.parametrize("tp", [1, 2])
@pytest.mark.parametrize("family", FAMILIES)
def test_bfloat16_is_as_close_to_fp32_as_in_transformers(
    tp: int, family: str, tmp_path: Path, some: list[list[int]]
) -> None:
    """Root-mean-square error of the logits over their root-mean-square in fp32: at most 2%, and at most 1.25 times what
    `transformers` itself loses. With weights of unit gain; larger ones amplify every rounding, theirs and ours."""
    path, tokens = write_family(tmp_path, family, gain=1.0), some[1]

    def rank_main(mesh: Mesh) -> list[Tensor]:
        model = Transformer(replace(ModelSpec.load(path), dtype=torch.bfloat16), mesh.shard, mesh.all_reduce)
        load_weights(model, path)
        return run_in_steps(model, mesh, [tokens], 9)

    want = oracle_logits(read_oracle(path), tokens)
    theirs = oracle_logits(read_oracle(path, torch.bfloat16), tokens).float()
    got = run_ranks(tp, rank_main)[0][0]
    assert got.dtype == torch.bfloat16
    ours, oracles = (float((x.float() - want).square().mean() / want.square().mean()) ** 0.5 for x in (got, theirs))
    assert ours <= 0.02 and ours <= 1.25 * oracles


@on_ranks(slow=lambda tp, family: tp == 4 and family not in FEW)
def test_native_kernels_compute_the_same(
    tp: int, family: str, families: dict[str, Path], some: list[list[int]]
) -> None:
    """As plain torch, to 1e-5, or where routers amplify every rounding 5e-5, in chunks mixed with decode; with the same
    bits in any company and behind any cut."""

    def rank_main(mesh: Mesh) -> list[list[Tensor]]:
        native, plain = (load(families[family], mesh, kernels) for kernels in (NATIVE, TORCH))
        alone = [row for one in some for row in run_in_steps(native, mesh, [one], 64)]
        return [
            run_in_steps(plain, mesh, some, 9),
            alone,
            *(run_in_steps(native, mesh, some, n) for n in (64, 9, 3, 1)),
        ]

    want, alone, *cut = run_ranks(tp, rank_main)[0]
    bound = (5e-5 if family in EXPERTS else 1e-5) * max(float(rows.abs().max()) for rows in want)
    for rows, wanted in zip(alone, want, strict=True):
        assert (rows - wanted).abs().max() <= bound
    for sequences in cut if tp < 4 else ():  # more than two ranks add up in rank order only if they are asked to
        assert all(torch.equal(rows, one) for rows, one in zip(sequences, alone, strict=True))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("family", FAMILIES)
def test_native_kernels_in_half_precision(
    family: str, dtype: torch.dtype, tmp_path: Path, some: list[list[int]]
) -> None:
    """With weights of unit gain, as above. Root mean square of the error, over plain torch in fp32: hardly more than
    plain torch loses in the same precision."""
    path, tokens = write_family(tmp_path, family, gain=1.0), some[1]
    want, plain, got = (
        run_in_steps(load(path, SingleRank(), *chosen), SingleRank(), [tokens], 9)[0].float()
        for chosen in ((TORCH,), (TORCH, dtype), (NATIVE, dtype))
    )
    theirs, ours = (float((x - want).square().mean() / want.square().mean()) ** 0.5 for x in (plain, got))
    assert ours <= {torch.bfloat16: 0.02, torch.float16: 0.0025}[dtype] and ours <= 1.1 * theirs
    alone = run_in_steps(load(path, SingleRank(), NATIVE, dtype), SingleRank(), [tokens], 64)[0]
    beside = run_in_steps(load(path, SingleRank(), NATIVE, dtype), SingleRank(), [some[0], tokens, some[2]], 5)[1]
    assert torch.equal(alone, beside)


HALF = 6  # frequencies of a head
ROPES: dict[str, tuple[str, dict[str, Any]]] = {
    "yarn": ("qwen3", {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}),
    "yarn, as DeepSeek has it": (
        "llama",
        {
            **{"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64, "beta_fast": 8},
            **{"beta_slow": 2, "mscale": 0.7, "mscale_all_dim": 0.5, "truncate": False},
        },
    ),
    "longrope": (
        "llama",
        {
            **{"rope_type": "longrope", "original_max_position_embeddings": 16, "factor": 8.0},
            **{"short_factor": [1.0 + 0.1 * i for i in range(HALF)], "long_factor": [1.0 + i for i in range(HALF)]},
        },
    ),
    "dynamic": ("llama", {"rope_type": "dynamic", "factor": 2.0}),
}


@pytest.mark.parametrize("name", ROPES)
@torch.inference_mode()
def test_stretched_contexts_equal_transformers(name: str, tmp_path: Path) -> None:
    """As read from its files, and as written by us."""
    family, rope = ROPES[name]
    fields = SMALL | {"layer_norm_eps": 1e-5, "pad_token_id": None, "model_type": family}
    del fields["rope_theta"]
    torch.manual_seed(4)
    made = AutoModelForCausalLM.from_config(AutoConfig.for_model(**fields, rope_parameters={**rope, "rope_theta": 1e4}))
    for parameter in made.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    made.save_pretrained(tmp_path)
    spec = ModelSpec.load(tmp_path)
    assert ModelSpec.from_config(json.loads(json.dumps(spec.to_config()))) == spec
    model = Transformer(spec)
    load_weights(model, tmp_path)
    tokens = torch.randint(0, 101, (1, 40), generator=torch.Generator().manual_seed(3))
    got = model.logits(model(tokens.view(-1), WholeSequences(1, 40)))
    want = read_oracle(tmp_path)(tokens).logits[0]
    torch.testing.assert_close(got, want, rtol=0, atol=1e-4 * float(want.abs().max()))


@torch.inference_mode()
def test_longrope_takes_the_short_factors_for_an_engine_of_short_contexts(tmp_path: Path) -> None:
    """All of its contexts then have them, as in vLLM; `transformers` decides for each."""
    test_stretched_contexts_equal_transformers("longrope", tmp_path)
    spec = EngineConfig(max_model_len=16).of(ModelSpec.load(tmp_path))
    model = Transformer(spec)
    load_weights(model, tmp_path)
    tokens = torch.randint(0, 101, (1, 16), generator=torch.Generator().manual_seed(5))
    want = read_oracle(tmp_path)(tokens).logits[0]
    got = model.logits(model(tokens.view(-1), WholeSequences(1, 16)))
    torch.testing.assert_close(got, want, rtol=0, atol=1e-4 * float(want.abs().max()))
    assert EngineConfig().of(ModelSpec.load(tmp_path)) == ModelSpec.load(tmp_path)


@pytest.mark.parametrize("family", EXPERTS)
@pytest.mark.parametrize("tp", [2, 4])
def test_whole_experts_are_split_experts(
    tp: int, family: str, families: dict[str, Path], some: list[list[int]]
) -> None:
    """Ranks that hold whole experts, unevenly many where they do not divide: logits, and greedy text behind them."""
    path, kernels = families[family], (TORCH, NATIVE)
    wanted = [wanted_logits(path, tuple(p)) for p in some]
    bound = 1e-4 * max(float(w.abs().max()) for w in wanted)
    config = SchedulerConfig(max_sequences=3, max_step_tokens=11, max_model_len=128, num_blocks=64, block_size=4)

    def rank_main(mesh: Mesh) -> tuple[list[list[Tensor]], list[int]]:
        logits = [run_in_steps(load(path, mesh, one, whole_experts=True), mesh, some, 9) for one in kernels]
        spec = ModelSpec.load(path)
        executor = whole_executor(spec, str(path), mesh, config.num_blocks, config.block_size, whole_experts=True)
        if mesh.shard.rank:
            executor.follow()
            return logits, []
        engine, tokens = Engine(config, executor), list[int]()
        params = SamplingParams(max_tokens=COUNT, temperature=0.0)
        engine.add(Request(id="0", prompt=tuple(some[0]), params=params))
        while engine.has_work:
            tokens += [token for output in engine.step() for token in output.tokens]
        executor.stop()
        return logits, tokens

    logits, text = run_ranks(tp, rank_main)[0]
    for sequences in logits:
        for got, want in zip(sequences, wanted, strict=True):
            assert (got - want).abs().max() <= bound
    assert text == wanted_text(path, tuple(some[0]))
