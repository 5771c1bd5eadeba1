"""Step-3's language model in fp64, written from its report (2507.19427) and the equations of MFA (2412.19255), token by
token and head by head, with nothing of ours; and random checkpoints of it."""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

SMALL: dict[str, Any] = {
    "model_type": "step3_text",
    "architectures": ["Step3TextForCausalLM"],
    "vocab_size": 101,
    "hidden_size": 32,
    "intermediate_size": 40,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_attention_groups": 1,
    "head_dim": 12,
    "share_q_dim": 20,
    "moe_layers_enum": "1,2",
    "moe_num_experts": 7,
    "moe_top_k": 3,
    "moe_intermediate_size": 24,
    "share_expert_dim": 16,
    "norm_expert_weight": False,
    "max_position_embedding": 256,
    "rms_norm_eps": 1e-5,
    "rope_theta": 500000.0,
    "eos_token_id": None,
    "dtype": "float32",
}


def write_step3(folder: Path, seed: int = 5, gain: float = 1.5, **fields: Any) -> Path:
    """A checkpoint of random weights, its experts in one tensor a matrix, as theirs are."""
    c = SMALL | fields
    h, d, r, e = c["hidden_size"], c["head_dim"], c["share_q_dim"], c["moe_num_experts"]
    heads, inner = c["num_attention_heads"] * d, c["moe_intermediate_size"]
    dice = torch.Generator().manual_seed(seed)

    def matrix(*shape: int, scale: float = gain) -> Tensor:
        return torch.randn(*shape, generator=dice) * scale / shape[-1] ** 0.5

    def norm(size: int) -> Tensor:
        return torch.rand(size, generator=dice) + 0.5

    def ffn(size: int, where: str) -> dict[str, Tensor]:
        shapes = {"gate_proj": (size, h), "up_proj": (size, h), "down_proj": (h, size)}
        return {f"{where}.{name}.weight": matrix(*shape) for name, shape in shapes.items()}

    weights = {"model.embed_tokens.weight": torch.randn(c["vocab_size"], h, generator=dice)}
    weights |= {"model.norm.weight": norm(h), "lm_head.weight": matrix(c["vocab_size"], h)}
    for number in range(c["num_hidden_layers"]):
        layer, attention = f"model.layers.{number}", f"model.layers.{number}.self_attn"
        weights |= {f"{layer}.{name}_layernorm.weight": norm(h) for name in ("input", "post_attention")}
        shapes = {"q": (r, h), "k": (d, h), "v": (d, h), "o": (h, heads)}
        weights |= {f"{attention}.{name}_proj.weight": matrix(*shape) for name, shape in shapes.items()}
        weights |= {f"{attention}.inter_norm.weight": norm(r), f"{attention}.wq.weight": matrix(heads, r)}
        if number not in mixtures(c):
            weights |= ffn(c["intermediate_size"], f"{layer}.mlp")
            continue
        weights |= ffn(c["share_expert_dim"], f"{layer}.share_expert")
        weights[f"{layer}.moe.gate.weight"] = matrix(e, h, scale=4.0)
        for name, shape in {"gate": (e, inner, h), "up": (e, inner, h), "down": (e, h, inner)}.items():
            weights[f"{layer}.moe.{name}_proj.weight"] = matrix(*shape)
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(c))
    save_file(weights, folder / "model.safetensors")
    return folder


def mixtures(config: dict[str, Any]) -> list[int]:
    return [int(number) for number in config["moe_layers_enum"].split(",") if number]


class Step3:
    """The whole model, in fp64. lag: 1 for Ladder Residual (2501.06589)."""

    def __init__(self, folder: Path, lag: int = 0) -> None:
        self.config, self.lag = json.loads((folder / "config.json").read_text()), lag
        self.weights = {name: tensor.double() for name, tensor in load_file(folder / "model.safetensors").items()}

    def logits(self, tokens: list[int]) -> Tensor:
        """[T, vocabulary]."""
        points = [self.weights["model.embed_tokens.weight"][tokens]]
        for layer in range(self.config["num_hidden_layers"]):
            for part in (self._attention, self._ffn):
                seen = points[max(0, len(points) - 1 - self.lag)]
                points.append(points[-1] + part(layer, seen))
        return self._norm(points[-1], "model.norm") @ self.weights["lm_head.weight"].T

    def greedy(self, prompt: list[int], count: int) -> list[int]:
        tokens = list(prompt)
        for _ in range(count):
            tokens.append(int(self.logits(tokens)[-1].argmax()))
        return tokens[len(prompt) :]

    def _norm(self, x: Tensor, name: str) -> Tensor:
        mean = x.square().mean(-1, keepdim=True)
        return x / (mean + self.config["rms_norm_eps"]).sqrt() * self.weights[f"{name}.weight"]

    def _attention(self, layer: int, x: Tensor) -> Tensor:
        w, where, d = self.weights, f"model.layers.{layer}.self_attn", self.config["head_dim"]
        x = self._norm(x, f"model.layers.{layer}.input_layernorm")
        q, k, v = (x @ w[f"{where}.{name}_proj.weight"].T for name in "qkv")
        q = self._norm(q, f"{where}.inter_norm") @ w[f"{where}.wq.weight"].T
        k, result = self._turned(k), []
        for head in q.split(d, dim=1):
            turned = self._turned(head)
            for t in range(len(x)):
                weights = (k[: t + 1] @ turned[t] * d**-0.5).softmax(0)
                result.append(weights @ v[: t + 1])
        heads = torch.stack(result).view(-1, len(x), d).transpose(0, 1).flatten(1)
        return heads @ w[f"{where}.o_proj.weight"].T

    def _turned(self, x: Tensor) -> Tensor:
        half = x.shape[1] // 2
        angles = torch.arange(len(x)).double()[:, None] * self.config["rope_theta"] ** (
            -torch.arange(half).double() / half
        )
        a, b = x[:, :half], x[:, half:]
        return torch.cat((a * angles.cos() - b * angles.sin(), b * angles.cos() + a * angles.sin()), 1)

    def _ffn(self, layer: int, x: Tensor) -> Tensor:
        where = f"model.layers.{layer}"
        x = self._norm(x, f"{where}.post_attention_layernorm")
        if layer not in mixtures(self.config):
            return self._swiglu(x, f"{where}.mlp")
        shares = (x @ self.weights[f"{where}.moe.gate.weight"].T).softmax(-1)
        rows = []
        for row, share in zip(x, shares, strict=True):
            best = share.argsort(descending=True, stable=True)[: self.config["moe_top_k"]].tolist()
            total = share[best].sum() if self.config["norm_expert_weight"] else 1.0
            rows.append(sum(share[i] / total * self._swiglu(row, f"{where}.moe", i) for i in best))
        return torch.stack(rows) + self._swiglu(x, f"{where}.share_expert")

    def _swiglu(self, x: Tensor, where: str, expert: int | None = None) -> Tensor:
        gate, up, down = (self.weights[f"{where}.{name}_proj.weight"] for name in ("gate", "up", "down"))
        if expert is not None:
            gate, up, down = gate[expert], up[expert], down[expert]
        opened = x @ gate.T
        return opened * torch.sigmoid(opened) * (x @ up.T) @ down.T
