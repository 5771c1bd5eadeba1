"""Tiny checkpoints with a byte-level tokenizer and a chat template."""

import json
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from tests.llama import write_llama

SPECIAL = ("<|end|>", "<|system|>", "<|user|>", "<|assistant|>")
TEMPLATE = (
    "{% for m in messages %}{% if m.role == 'tool' %}{{ raise_exception('no tools here') }}{% endif %}"
    "<|{{ m.role }}|>{{ m.content }}<|end|>{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
CYCLE = "aé日🚀z. "  # every byte once, so that the next byte follows from the last one


def write_tokenizer(directory: Path) -> Tokenizer:
    """One token per byte."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={char: i for i, char in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(name, special=True) for name in SPECIAL])
    tokenizer.save(str(directory / "tokenizer.json"))
    (directory / "tokenizer_config.json").write_text(json.dumps({"chat_template": TEMPLATE, "eos_token": SPECIAL[0]}))
    return tokenizer


def write_random(directory: Path) -> Path:
    """Random weights: every token depends on all before it."""
    tokenizer = write_tokenizer(directory)
    eos = tokenizer.token_to_id(SPECIAL[0])
    return write_llama(directory, vocab_size=tokenizer.get_vocab_size(), eos_token_id=eos, max_position_embeddings=1024)


def write_cycle(directory: Path) -> Path:
    """Greedy decoding repeats CYCLE byte by byte: attention and FFN add nothing, the head maps a byte to the next."""
    tokenizer = write_tokenizer(directory)
    size = tokenizer.get_vocab_size()
    write_llama(directory, vocab_size=size, hidden_size=64, max_position_embeddings=8192)
    weights = load_file(directory / "model.safetensors")
    for name, tensor in weights.items():
        if "o_proj" in name or "down_proj" in name:
            tensor.zero_()
        elif name == "model.norm.weight":
            tensor.fill_(1.0)
    tokens = tokenizer.encode(CYCLE).ids
    embedding = torch.nn.functional.normalize(torch.randn(size, 64), dim=1)
    weights["model.embed_tokens.weight"], head = embedding, torch.zeros(size, 64)
    head[[*tokens[1:], tokens[0]]] = embedding[tokens]
    weights["lm_head.weight"] = head
    save_file(weights, directory / "model.safetensors", metadata={"format": "pt"})
    return directory
