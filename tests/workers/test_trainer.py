"""The training loop: the model's own attention, every token once per pass, and a resumed run is the same run."""

import itertools
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kernels.attention import causal_attention
from parallel.model import Transformer
from parallel.modules import init_weights
from parallel.spec import ModelSpec
from workers.trainer import TrainConfig, Trainer, Windows
from workers.training_context import TiledSequences

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
    contexts=(16, 32),
    muon_lr=0.02,
    adam_lr=0.01,
    weight_decay=0.1,
    warmup=0.1,
    decay=0.5,
    clip=1.0,
    precision="fp32",
    log_every=4,
    checkpoint_every=5,
)
STREAM = (torch.arange(4000) ** 2 % 61).to(torch.int32)  # a rule that two layers can learn


def new_trainer(directory: Path, config: TrainConfig = CONFIG) -> Trainer:
    model = Transformer(SPEC)
    init_weights(model, SPEC, config.seed)
    return Trainer(model, STREAM, config, directory)


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
    windows = Windows(torch.arange(tokens), length, seed=3)
    targets = [int(t) for i in range(windows.per_pass) for t in windows[i][1:]]
    assert len(targets) == len(set(targets)) >= tokens - 1 - 2 * length
    assert all((w[1:] == w[:-1] + 1).all() for w in map(windows.__getitem__, range(windows.per_pass)))


def test_another_pass_has_another_order() -> None:
    windows = Windows(torch.arange(1000), 8, seed=3)
    first, second = ([int(windows[n * windows.per_pass + i][0]) for i in range(10)] for n in (0, 1))
    assert first != second
    assert first == [int(windows[i][0]) for i in range(10)]


def test_the_loss_falls_and_every_step_is_logged_once(tmp_path: Path) -> None:
    rows = finish(new_trainer(tmp_path))
    assert [row["train/step"] for row in rows] == [4, 8, 12, 16, 20, 24]
    assert rows[0]["train/loss"] > 3.5
    assert rows[-1]["train/loss"] < 0.6 * rows[0]["train/loss"]


def test_a_killed_run_continues_to_the_same_weights(tmp_path: Path) -> None:
    """The kill comes at step 13, three steps after the last checkpoint: those are done again."""
    (tmp_path / "killed").mkdir()
    whole = new_trainer(tmp_path)
    finish(whole)
    killed = new_trainer(tmp_path / "killed")
    list(itertools.islice(killed.run(lambda row: None), 13))
    resumed = new_trainer(tmp_path / "killed")
    assert resumed.step == 10
    finish(resumed)
    for mine, theirs in zip(resumed.model.parameters(), whole.model.parameters(), strict=True):
        assert torch.equal(mine, theirs)


def test_a_checkpoint_of_other_settings_is_refused(tmp_path: Path) -> None:
    new_trainer(tmp_path).save()
    with pytest.raises(ValueError, match="written with other settings; remove it or choose another run_dir"):
        new_trainer(tmp_path, replace(CONFIG, adam_lr=0.1))


def test_merged_matrices_are_orthogonalised_one_by_one(tmp_path: Path) -> None:
    trainer = new_trainer(tmp_path)
    assert len(trainer.matrices) == 7 * SPEC.num_layers  # q, k, v, o, gate, up, down
    before = [matrix.detach().clone() for matrix in trainer.matrices]
    finish(trainer, until=1)
    lr = CONFIG.muon_lr * CONFIG.lr_scale(0)
    for matrix, old in zip(trainer.matrices, before, strict=True):
        rows, columns = matrix.shape
        update = (old * (1 - lr * CONFIG.weight_decay) - matrix) / (lr * max(1, rows / columns) ** 0.5)
        values = torch.linalg.svdvals(update)
        assert values.median() > 0.3 and values.max() < 1.4  # Newton-Schulz brings them near 1


def test_a_loss_that_is_no_number_ends_the_run(tmp_path: Path) -> None:
    trainer = new_trainer(tmp_path)
    trainer.model.norm.weight.data.fill_(float("nan"))
    with pytest.raises(RuntimeError, match="the loss is nan at step 0"):
        finish(trainer)


def test_bf16_trains_like_fp32(tmp_path: Path) -> None:
    losses = []
    for precision in ("fp32", "bf16"):
        (tmp_path / precision).mkdir()
        losses.append(finish(new_trainer(tmp_path / precision, replace(CONFIG, precision=precision)))[-1]["train/loss"])
    assert losses[1] == pytest.approx(losses[0], rel=0.1)


def test_the_learning_rate_rises_stays_and_falls_to_almost_nothing() -> None:
    scales = [replace(CONFIG, tokens=100 * 128).lr_scale(step) for step in range(100)]
    assert scales[:10] == pytest.approx([0.1 * (i + 1) for i in range(10)])
    assert scales[10:50] == [1.0] * 40
    assert scales[-1] == pytest.approx(1 / 50)
