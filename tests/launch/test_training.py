"""Text becomes tokens in order, and takes no more memory than they need."""

import tracemalloc
from pathlib import Path

import torch
from tokenizers import Tokenizer

from stepladder.launch.recipes.corpus import Document
from stepladder.launch.recipes.training import Words
from tests.tokenizers_of import CORPUS, write_byte_level


def test_the_stream_is_every_document_in_order_and_never_a_list(tmp_path: Path) -> None:
    words = Words(Tokenizer.from_file(str(write_byte_level(tmp_path) / "tokenizer.json")), (1,), 0)
    documents = [Document(str(n), f"{n}\n" + "".join(CORPUS) * (n % 7)) for n in range(200)]
    wanted = torch.tensor([number for d in documents for number in words.encode(d)], dtype=torch.int32)
    tracemalloc.start()
    stream = words.stream(documents)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert stream.dtype == torch.int32 and torch.equal(stream, wanted)
    assert peak < 7 * len(stream) + 100_000  # bytes; a list needs 8 for each pointer alone
    assert len(words.stream([])) == 0
