"""The training loop: the model's own attention, every token once per pass, and a resumed run is the same run."""

import itertools
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from threading import Event
from time import monotonic
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from stepladder.kernels.attention import causal_attention
from stepladder.parallel.checkpoint import sharded_parameters
from stepladder.parallel.experts import ExpertSpec
from stepladder.parallel.model import Transformer
from stepladder.parallel.modules import init_weights
from stepladder.parallel.moe import MixtureOfExperts, unevenness
from stepladder.parallel.spec import ModelSpec
from stepladder.workers.training.ranks import Ranks, training_ranks
from stepladder.workers.training.sharded import MODEL_STATES
from stepladder.workers.training.sliced_loss import LOSS_ROWS, sliced_cross_entropy
from stepladder.workers.training.text_windows import TextWindows
from stepladder.workers.training.train_config import TrainConfig
from stepladder.workers.training.trainer import Trainer
from stepladder.workers.training.training_context import TiledSequences

SPEC = ModelSpec(
    vocab_size=64,
    hidden_size=32,
    intermediate_size=48,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=8,
    max_position=64,
    tie_embeddings=True,
    residual="ladder",
)
CONFIG = TrainConfig(
    seed=5,
    tokens=24 * 128,
    batch_tokens=128,
    accumulate=1,
    contexts=(16, 32),
    muon_lr=0.02,
    adam_lr=0.01,
    weight_decay=0.1,
    warmup=0.1,
    decay=0.5,
    clip=None,
    balance=None,
    precision="fp32",
    log_every=4,
    checkpoint_every=5,
)
STREAM = (torch.arange(4000) ** 2 % 61).to(torch.int32)  # a rule that two layers can learn


ADAMW = replace(CONFIG, muon_lr=None, clip=1.0)
OPTIMIZERS = pytest.mark.parametrize("config", [CONFIG, ADAMW], ids=["muon", "adamw"])
ALONE: list[Ranks] = []


@pytest.fixture(scope="module", autouse=True)
def ranks() -> Iterator[None]:
    """DeepSpeed knows one group per process, so these tests take turns in it."""
    with training_ranks() as alone:
        ALONE.append(alone)
        yield
        ALONE.clear()


def new_trainer(
    directory: Path, config: TrainConfig = CONFIG, spec: ModelSpec = SPEC, stream: torch.Tensor = STREAM
) -> Trainer:
    model = Transformer(spec)
    init_weights(model, spec, config.seed)
    directory.mkdir(exist_ok=True)
    return Trainer(model, stream, config, directory, ALONE[0])


def finish(trainer: Trainer, until: int | None = None) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    for _ in trainer.run(rows.append, until):
        pass
    return rows


@pytest.mark.parametrize("length", [1, 100, 128, 300])
def test_tiled_attention_equals_the_fused_kernel_and_so_does_its_gradient(length: int) -> None:
    results = []
    for attend in (TiledSequences(2, length).attend, lambda layer, q, k, v: causal_attention(q, k, v, 2)):
        torch.manual_seed(1)
        shapes = [(2 * length, heads, 8) for heads in (4, 2, 2)]
        q, k, v = (torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in shapes)
        out = attend(0, q, k, v)
        (out * torch.randn_like(out)).sum().backward()
        results.append([out, q.grad, k.grad, v.grad])
    for mine, theirs in zip(*results, strict=True):
        torch.testing.assert_close(mine, theirs)


@given(tokens=st.integers(33, 700), length=st.integers(1, 16))
def test_a_pass_over_the_windows_repeats_no_target(tokens: int, length: int) -> None:
    windows = TextWindows(torch.arange(tokens), length, seed=3)
    targets = [int(t) for i in range(windows.per_pass) for t in windows[i][1:]]
    assert len(targets) == len(set(targets)) >= tokens - 1 - 2 * length
    assert all((w[1:] == w[:-1] + 1).all() for w in map(windows.__getitem__, range(windows.per_pass)))


def test_another_pass_has_another_order() -> None:
    windows = TextWindows(torch.arange(1000), 8, seed=3)
    first, second = ([int(windows[n * windows.per_pass + i][0]) for i in range(10)] for n in (0, 1))
    assert first != second
    assert first == [int(windows[i][0]) for i in range(10)]


@pytest.mark.parametrize("tied", [True, False])
def test_the_sliced_loss_and_its_gradients_are_those_of_all_logits_at_once(tied: bool) -> None:
    spec = replace(SPEC, tie_embeddings=tied, logit_scale=0.5)
    model = Transformer(spec)
    init_weights(model, spec, seed=1)
    model.head.weight.requires_grad_(True)
    targets = torch.arange(2 * LOSS_ROWS + 9) % 64
    results = []
    for sliced in (True, False):
        hidden = torch.randn(len(targets), 32, generator=torch.Generator().manual_seed(2), requires_grad=True)
        loss = (
            sliced_cross_entropy(model, hidden, targets) if sliced else F.cross_entropy(model.logits(hidden), targets)
        )
        results.append([loss, *torch.autograd.grad(3 * loss, (hidden, model.head.weight))])
    for mine, theirs in zip(*results, strict=True):
        torch.testing.assert_close(mine, theirs)


@OPTIMIZERS
def test_the_loss_falls_and_every_step_is_logged_once(tmp_path: Path, config: TrainConfig) -> None:
    rows = finish(new_trainer(tmp_path, config))
    assert [row["train/step"] for row in rows] == [4, 8, 12, 16, 20, 24]
    assert rows[0]["train/loss"] > 3.5
    assert rows[-1]["train/loss"] < 0.6 * rows[0]["train/loss"]


@OPTIMIZERS
def test_a_killed_run_continues_to_the_same_weights(tmp_path: Path, config: TrainConfig) -> None:
    """The kill comes at step 13, three steps after the last checkpoint: those are done again."""
    whole = new_trainer(tmp_path / "whole", config)
    finish(whole)
    killed = new_trainer(tmp_path / "killed", config)
    list(itertools.islice(killed.run(lambda row: None), 13))
    resumed = new_trainer(tmp_path / "killed", config)
    assert resumed.step == 10
    finish(resumed)
    for mine, theirs in zip(resumed.model.parameters(), whole.model.parameters(), strict=True):
        assert torch.equal(mine, theirs)


def test_a_kill_while_a_checkpoint_is_written_leaves_the_one_before(tmp_path: Path) -> None:
    trainer = new_trainer(tmp_path)
    finish(trainer, until=5)
    half = tmp_path / "checkpoint" / "step10"
    half.mkdir()
    (half / "mp_rank_00_model_states.pt").write_bytes(b"half a file")
    resumed = new_trainer(tmp_path)
    assert resumed.step == 5
    finish(resumed, until=10)
    assert new_trainer(tmp_path).step == 10
    assert [path.name for path in (tmp_path / "checkpoint").glob("step*")] == ["step10"]


def test_the_newest_checkpoint_is_not_written_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its files are the only ones there are; a kill while they are overwritten would leave none."""
    trainer = new_trainer(tmp_path)
    finish(trainer, until=5)
    for again in (trainer, new_trainer(tmp_path)):
        monkeypatch.setattr(again.engine, "save_checkpoint", lambda *_, **__: pytest.fail("written again"))
        again.save()


def test_only_steps_count_as_training_time(tmp_path: Path) -> None:
    """Not what the caller does between them, such as measuring."""
    trainer, rows, began, outside = new_trainer(tmp_path), list[dict[str, float]](), monotonic(), 0.0
    for _ in trainer.run(rows.append, until=8):
        outside -= monotonic()
        Event().wait(0.05)
        outside += monotonic()
    assert 0 < trainer.seconds <= monotonic() - began - outside
    logged = sum(4 * trainer.config.batch_tokens / row["train/tokens_per_s"] for row in rows)
    assert logged == pytest.approx(trainer.seconds)


def test_a_checkpoint_of_other_settings_is_refused(tmp_path: Path) -> None:
    """By name, and before the weights are loaded, which would not fit some of these."""
    new_trainer(tmp_path).save()
    others: dict[str, dict[str, Any]] = {
        "train.adam_lr": {"config": replace(CONFIG, adam_lr=0.1)},
        "model.residual": {"spec": replace(SPEC, residual="standard")},
        "model.intermediate_size, model.num_layers": {"spec": replace(SPEC, num_layers=3, intermediate_size=64)},
        "text": {"stream": STREAM.flip(0)},
    }
    for names, other in others.items():
        with pytest.raises(ValueError) as error:
            new_trainer(tmp_path, **other)
        assert str(error.value).endswith(
            f"checkpoint was written with other settings ({names}); remove it or choose another run_dir"
        )


def test_a_checkpoint_that_does_not_know_its_model_is_continued(tmp_path: Path) -> None:
    """As they were written before that was compared."""
    finish(new_trainer(tmp_path), until=5)
    path = tmp_path / "checkpoint" / "step5" / MODEL_STATES
    states = torch.load(path, weights_only=False)
    del states["training"]["model"], states["training"]["text"]
    torch.save(states, path)
    assert new_trainer(tmp_path).step == 5


@OPTIMIZERS
def test_micro_batches_add_up_to_the_step(tmp_path: Path, config: TrainConfig) -> None:
    losses = []
    for accumulate in (1, 4):
        rows = finish(new_trainer(tmp_path / str(accumulate), replace(config, accumulate=accumulate)))
        losses.append([row["train/loss"] for row in rows])
    assert losses[1] == pytest.approx(losses[0], rel=2e-3)


def test_a_closed_trainer_leaves_the_model_whole(tmp_path: Path) -> None:
    trainer = new_trainer(tmp_path)
    names = [name for name, _ in Transformer(SPEC).named_parameters()]
    finish(trainer, until=3)
    tokens, context = torch.arange(16), TiledSequences(1, 16)
    before = trainer.model.logits(trainer.model(tokens, context)).detach()
    trainer.close()
    assert sorted(name for name, _ in trainer.model.named_parameters()) == sorted(names)
    assert torch.equal(trainer.model.logits(trainer.model(tokens, context)), before)
    assert not any(parameter.requires_grad for parameter in trainer.model.parameters())
    assert len(sharded_parameters(trainer.model)) == len(names)


def test_the_matrices_of_the_checkpoint_are_orthogonalised_one_by_one(tmp_path: Path) -> None:
    trainer = new_trainer(tmp_path)
    matrices = [p for p in trainer.model.parameters() if p.use_muon]
    assert len(matrices) == 7 * SPEC.num_layers  # q, k, v, o, gate, up, down
    before = [matrix.detach().clone() for matrix in matrices]
    finish(trainer, until=1)
    assert CONFIG.muon_lr is not None
    lr = CONFIG.muon_lr * CONFIG.lr_scale(0)
    for matrix, old in zip(matrices, before, strict=True):
        rows, columns = matrix.shape
        update = (old * (1 - lr * CONFIG.weight_decay) - matrix) / (lr * max(1, rows / columns) ** 0.5)
        values = torch.linalg.svdvals(update)
        assert values.median() > 0.3 and values.max() < 1.4  # Newton-Schulz brings them near 1


def test_muon_is_for_the_matrices_inside_the_blocks_only(tmp_path: Path) -> None:
    """Not for an untied head, and not for norms that have a weight per head."""
    spec = replace(SPEC, tie_embeddings=False, qk_norm="per-head", norm="layer", qkv_bias=True)
    model = new_trainer(tmp_path, spec=spec).model
    adam = {name for name, p in model.named_parameters() if not p.use_muon}
    assert {"embedding.weight", "head.weight", "norm.weight", "modules_of_blocks.0.q_norm.weight"} <= adam
    assert sum(p.use_muon for p in model.parameters()) == 7 * SPEC.num_layers


def test_a_loss_that_is_no_number_ends_the_run(tmp_path: Path) -> None:
    trainer = new_trainer(tmp_path)
    trainer.model.norm.weight.data.fill_(float("nan"))
    with pytest.raises(RuntimeError, match="the loss is nan at step 0"):
        finish(trainer)


def test_bf16_trains_like_fp32(tmp_path: Path) -> None:
    losses = []
    for precision in ("fp32", "bf16"):
        losses.append(finish(new_trainer(tmp_path / precision, replace(CONFIG, precision=precision)))[-1]["train/loss"])
    assert losses[1] == pytest.approx(losses[0], rel=0.1)


def test_the_learning_rate_rises_stays_and_falls_to_almost_nothing() -> None:
    scales = [replace(CONFIG, tokens=100 * 128).lr_scale(step) for step in range(100)]
    assert scales[:10] == pytest.approx([0.1 * (i + 1) for i in range(10)])
    assert scales[10:50] == [1.0] * 40
    assert scales[-1] == pytest.approx(1 / 50)


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"clip": 1.0}, "train.clip works with AdamW only; set train.clip=null, or train.muon_lr=null"),
        ({"muon_lr": 0.0}, "train.muon_lr is 0.0; it must be above 0, or null"),
        ({"accumulate": 0}, "train.accumulate is 0; it must be above 0"),
        ({"tokens": 100}, "train.tokens is 100; every one of train.contexts needs at least one step"),
    ],
)
def test_settings_that_cannot_be_are_refused(changes: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ValueError) as error:
        replace(CONFIG, **changes)
    assert sentence in str(error.value)


def test_windows_that_cannot_be_dealt_out_are_refused() -> None:
    assert replace(CONFIG, accumulate=2).share(1, ranks=2) == 1
    with pytest.raises(
        ValueError, match=r"4 windows of 32 tokens, which 3 ranks with train\.accumulate=1 cannot share"
    ):
        CONFIG.share(1, ranks=3)


MOE = replace(
    SPEC,
    family="mixtral",
    intermediate_size=16,
    experts=ExpertSpec(layers=(0, 1), count=4, per_token=1, inner=16),
)


def test_the_balance_loss_evens_out_the_use_of_experts(tmp_path: Path) -> None:
    """From routers that are sure of themselves: with it and without."""
    ends = {}
    for balance in (None, 1.0):
        model = Transformer(MOE)
        init_weights(model, MOE, 5)
        for module in model.modules():
            if isinstance(module, MixtureOfExperts):
                module.router.data.mul_(30)
        config = replace(CONFIG, balance=balance, muon_lr=None)
        rows = finish(Trainer(model, STREAM, config, tmp_path / str(balance), ALONE[0]))
        ends[balance] = rows[0]["train/expert_unevenness"], rows[-1]["train/expert_unevenness"]
        assert rows[-1]["train/loss"] < rows[0]["train/loss"]
    (_, left), (before, evened) = ends[None], ends[1.0]
    assert evened < 1.05 < 1.1 < before and left > 1.1


def test_muon_sees_the_matrices_of_each_expert_by_themselves(tmp_path: Path) -> None:
    """A step of two experts that are one below the other is the step of each; the weights come back as they were."""
    trainer = new_trainer(tmp_path, replace(CONFIG, balance=0.01), MOE)
    shapes = [p.shape for name, p in trainer.model.named_parameters() if "gate_up" in name]
    assert len(shapes) == 2 * 2 * 4 and set(shapes) == {(16, 32)}
    finish(trainer, 2)
    trainer.close()
    for module in trainer.model.modules():
        if isinstance(module, MixtureOfExperts):
            assert module.gate_up.shape == (4 * 2 * 16, 32) and module.down.shape == (4 * 32, 16)
    assert len(sharded_parameters(trainer.model)) == len(list(Transformer(MOE).parameters()))


def test_unevenness_is_one_where_all_are_used_alike_and_the_number_of_experts_where_one_is() -> None:
    even = unevenness(torch.zeros(8, 4), torch.arange(8)[:, None] % 4)
    assert even == pytest.approx(1.0)
    sure = torch.tensor([[30.0, 0.0, 0.0, 0.0]]).expand(8, 4)
    assert unevenness(sure, torch.zeros(8, 1, dtype=torch.int64)) == pytest.approx(4.0)
    scores = torch.randn(6, 4, requires_grad=True)
    unevenness(scores, torch.tensor([[0, 1]] * 6)).backward()
    assert scores.grad is not None and (scores.grad[:, :2].sum(0) > 0).all(), "it is to go down for those that are used"


def test_a_dense_model_has_no_experts_to_balance(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"train\.balance is 0\.5, but the model has no experts"):
        new_trainer(tmp_path, replace(CONFIG, balance=0.5))


@pytest.mark.parametrize(("precision", "pays"), [("bf16", False), ("bf16", True), ("fp32", False)])
def test_who_asks_for_bf16_where_it_is_slow_is_told(
    precision: str, pays: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("stepladder.workers.training.trainer.bf16_pays", lambda device: pays)
    new_trainer(tmp_path, replace(ADAMW, precision=precision))
    assert ("no instructions for bf16" in caplog.text) == (precision == "bf16" and not pays)
