"""Tiny checkpoints with a byte-level tokenizer and a chat template."""

import json
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors

from tests.llama import write_llama

SPECIAL = ("<|end|>", "<|system|>", "<|user|>", "<|assistant|>")
TEMPLATE = (
    "{% for m in messages %}{% if m.role == 'tool' %}{{ raise_exception('no tools here') }}{% endif %}"
    "<|{{ m.role }}|>{{ m.content }}<|end|>{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
WORDS = "The capital of France is Paris, and"
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


def write_words(directory: Path) -> Tokenizer:
    """SentencePiece-like: every word of WORDS is a token with the space before it."""
    words = [f"▁{word}" for word in WORDS.replace(",", " ,").split()]
    pieces = [word.replace("▁,", ",") for word in words]
    model = models.Unigram([(piece, -1.0) for piece in ("<unk>", "▁", *pieces)], unk_id=0)
    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    tokenizer.decoder = decoders.Metaspace(prepend_scheme="first")
    tokenizer.add_special_tokens([AddedToken(name, special=True) for name in ("<s>", "</s>")])
    tokenizer.post_processor = processors.TemplateProcessing("<s> $A", None, [("<s>", tokenizer.token_to_id("<s>"))])
    tokenizer.save(str(directory / "tokenizer.json"))
    template = "<s>{% for m in messages %}{{ m.content }}{% if not loop.last %}</s>{% endif %}{% endfor %}"
    (directory / "tokenizer_config.json").write_text(json.dumps({"chat_template": template, "eos_token": "</s>"}))
    return tokenizer


def write_cycle(directory: Path, cycle: str = CYCLE, writer: Callable[[Path], Tokenizer] = write_tokenizer) -> Path:
    """Greedy decoding repeats the cycle: attention and FFN add nothing, the head maps each token to the next."""
    tokenizer = writer(directory)
    size = tokenizer.get_vocab_size()
    write_llama(directory, vocab_size=size, hidden_size=64, max_position_embeddings=8192)
    weights = load_file(directory / "model.safetensors")
    for name, tensor in weights.items():
        if "o_proj" in name or "down_proj" in name:
            tensor.zero_()
        elif name == "model.norm.weight":
            tensor.fill_(1.0)
    tokens = tokenizer.encode(cycle, add_special_tokens=False).ids
    embedding = torch.nn.functional.normalize(torch.randn(size, 64), dim=1)
    weights["model.embed_tokens.weight"], head = embedding, torch.zeros(size, 64)
    head[[*tokens[1:], tokens[0]]] = embedding[tokens]
    weights["lm_head.weight"] = head
    save_file(weights, directory / "model.safetensors", metadata={"format": "pt"})
    return directory
