"""Small tokenizers, made on the spot."""

import json
from pathlib import Path

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

CORPUS = [
    "def main():\n    return 'hello, world'\n",
    "The quick brown fox jumps over the lazy dog. STOP here, stop there.",
    "naïve café, größer, Ελληνικά, русский, 日本語, 한국어, emoji 😀👍🏽, e\u0301",
] * 3


def write_byte_level(directory: Path, vocab_size: int = 320, **config: object) -> Path:
    """Byte-level BPE, as of GPT-2 and Llama 3: every character is one or several byte tokens."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=["<|end|>", "<|user|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    return _save(tokenizer, directory, config)


def write_byte_fallback(directory: Path) -> Path:
    """SentencePiece-like, as of Llama 2: words begin with ▁, unknown characters are <0xNN> tokens."""
    pieces = ["<unk>", "</s>", *(f"<0x{i:02X}>" for i in range(256)), "▁", *"abcdefghijklmnopqrstuvwxyzSTOP,.!é日"]
    merges = [("▁", "a"), ("t", "o"), ("S", "T"), ("O", "P"), ("ST", "OP"), ("▁", "STOP")]
    pieces += ["".join(pair) for pair in merges]
    model = models.BPE({p: i for i, p in enumerate(pieces)}, merges, unk_token="<unk>", byte_fallback=True)
    tokenizer = Tokenizer(model)
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.add_special_tokens([AddedToken("</s>", special=True)])
    return _save(tokenizer, directory, {})


def _save(tokenizer: Tokenizer, directory: Path, config: dict[str, object]) -> Path:
    tokenizer.save(str(directory / "tokenizer.json"))
    if config:
        (directory / "tokenizer_config.json").write_text(json.dumps(config))
    return directory
