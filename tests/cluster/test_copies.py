"""Nodes that have other files of the model."""

import pytest

from stepladder.cluster.checkpoint_agreement import CheckpointAgreement

FILES = {"config.json": "a", "model-1.safetensors": "b", "model-2.safetensors": "c"}


def test_equal_copies_pass() -> None:
    agreement = CheckpointAgreement("/models/m")
    for host in ("h0", "h1", "h0"):
        agreement.compare(host, dict(FILES))


@pytest.mark.parametrize(
    ("files", "named"),
    [
        ({**FILES, "model-2.safetensors": "x"}, "model-2.safetensors on h1"),
        ({"config.json": "a", "model-1.safetensors": "b"}, "model-2.safetensors on h1"),
        ({**FILES, "model-1.safetensors": "x", "z.safetensors": "y"}, "model-1.safetensors and 1 more on h1"),
    ],
)
def test_the_first_file_that_differs_is_named_with_both_hosts(files: dict[str, str], named: str) -> None:
    agreement = CheckpointAgreement("/models/m")
    agreement.compare("h0", FILES)
    with pytest.raises(ValueError, match=f"model.path /models/m .*: {named} is not what h0 has"):
        agreement.compare("h1", files)
    agreement.compare("h2", FILES)
