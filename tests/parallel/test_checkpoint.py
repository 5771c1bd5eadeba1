"""Checkpoints: what we write `transformers` reads, and a broken one is named in a sentence."""

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from time import perf_counter

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from stepladder.parallel.checkpoint import fingerprints, load_weights, save_weights, sharded_parameters
from stepladder.parallel.context import WholeSequences
from stepladder.parallel.mesh import Mesh, SingleRank
from stepladder.parallel.model import Transformer
from stepladder.parallel.modules import init_weights
from stepladder.parallel.shards import ALONE, Shard
from stepladder.parallel.spec import ModelSpec
from stepladder.workers.assembly import whole_executor
from tests.families import FAMILIES
from tests.llama import oracle_logits, read_llama
from tests.ranks import run_ranks


def load(path: Path) -> Transformer:
    model = Transformer(ModelSpec.load(path)).requires_grad_(False)
    load_weights(model, path)
    return model


def edit_tensors(path: Path, edit: Callable[[dict[str, Tensor]], object]) -> None:
    tensors = load_file(path / "model.safetensors")
    edit(tensors)
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})


def edit_config(path: Path, **fields: object) -> None:
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(config | fields))


@pytest.fixture
def copy(untied: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(untied, tmp_path / "copy"))


@pytest.mark.parametrize("shard", [ALONE, Shard(1, 2)])
def test_loading_tells_how_far_it_is(untied: Path, shard: Shard) -> None:
    """Of a rank's own weights, slice by slice up to all of them."""
    told: list[float] = []
    model = Transformer(ModelSpec.load(untied), shard).requires_grad_(False)
    load_weights(model, untied, told.append)
    assert len(told) > 20 and told == sorted(told) and 0 < told[0] < 0.5 and told[-1] == 1.0
    mesh = SingleRank()
    whole_executor(ModelSpec.load(untied), str(untied), mesh)
    assert mesh.loaded == 1.0


@pytest.mark.parametrize("checkpoint", ["untied", "tied"])
def test_save_inverts_load_and_transformers_reads_it(
    checkpoint: str, tmp_path: Path, prompts: list[list[int]], request: pytest.FixtureRequest
) -> None:
    source = request.getfixturevalue(checkpoint)
    model = load(source)
    save_weights(model, tmp_path, torch.float32)
    (tmp_path / "config.json").write_text(json.dumps(model.spec.to_config()))
    ours, theirs = load_file(tmp_path / "model.safetensors"), load_file(source / "model.safetensors")
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)
    want = oracle_logits(read_llama(source), prompts[3])
    assert torch.equal(oracle_logits(read_llama(tmp_path), prompts[3]), want)
    assert ModelSpec.load(tmp_path) == model.spec == ModelSpec.load(source)
    again = load(tmp_path)
    assert all(torch.equal(a, b) for a, b in zip(again.parameters(), model.parameters(), strict=True))


def test_a_model_of_ours_is_the_same_in_transformers(tmp_path: Path) -> None:
    """From our own initial weights; rope_theta, norm_eps and head_dim must arrive as well."""
    spec = ModelSpec(
        vocab_size=50,
        hidden_size=24,
        intermediate_size=40,
        num_layers=2,
        num_heads=4,
        num_kv_heads=2,
        head_dim=8,
        max_position=64,
        rope_theta=300.0,
        norm_eps=1e-2,
        eos_ids=(3, 4),
    )
    model = Transformer(spec).requires_grad_(False)
    init_weights(model, spec, seed=1)
    save_weights(model, tmp_path, torch.float32)
    (tmp_path / "config.json").write_text(json.dumps(spec.to_config()))
    tokens = list(range(30))
    want = oracle_logits(read_llama(tmp_path), tokens)
    got = model.logits(model(torch.tensor(tokens), WholeSequences(1, 30)))
    torch.testing.assert_close(got, want, rtol=0, atol=1e-5 * float(want.abs().max()))
    assert read_llama(tmp_path).config.eos_token_id == [3, 4]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("size", [1, 2, 4])
def test_shards_cover_the_checkpoint(family: str, size: int, families: dict[str, Path]) -> None:
    """Every element of every tensor is on one rank (replicated KV heads, norms, routers: on several), only there."""
    path = families[family]
    theirs = load_file(path / "model.safetensors")
    seen = {name: torch.zeros(t.shape, dtype=torch.int64) for name, t in theirs.items()}
    for rank in range(size):
        model = Transformer(ModelSpec.load(path), Shard(rank, size)).requires_grad_(False)
        load_weights(model, path)
        for parameter in sharded_parameters(model):
            for piece in parameter.pieces:
                part = slice(piece.start, piece.stop)
                where = (part,) if piece.dim == 0 else (slice(None), part)
                assert torch.equal(parameter.view_of(piece), theirs[piece.name][where])
                seen[piece.name][where] += 1
    spec = ModelSpec.load(path)
    for name, count in seen.items():
        copies = 1
        if name.endswith(("k_proj.weight", "k_proj.bias", "v_proj.weight", "v_proj.bias")):
            copies = max(1, size // spec.num_kv_heads)
        elif "norm" in name and spec.qk_norm == "per-head" and "self_attn" in name:
            copies = max(1, size // spec.num_kv_heads) if "k_norm" in name else 1
        elif name.endswith((".gate.weight", "shared_expert_gate.weight")):  # routers
            copies = size
        elif "norm" in name:
            shared = spec.tensor("attention.norm") == spec.tensor("ffn.norm") and "input_layernorm" in name
            copies = size * (2 if shared else 1)
        assert bool((count == copies).all()), name


def test_weights_split_over_files_are_found_through_the_index(copy: Path, untied: Path) -> None:
    tensors = load_file(copy / "model.safetensors")
    names = sorted(tensors)
    files = {"a.safetensors": names[::2], "b.safetensors": names[1::2]}
    for file, part in files.items():
        save_file({name: tensors[name] for name in part}, copy / file)
    (copy / "model.safetensors").unlink()
    index = copy / "model.safetensors.index.json"
    weight_map = {name: file for file, part in files.items() for name in part}
    index.write_text(json.dumps({"weight_map": weight_map}))
    assert all(torch.equal(a, b) for a, b in zip(load(copy).parameters(), load(untied).parameters(), strict=True))

    index.write_text(json.dumps({"weight_map": weight_map | {"lm_head.weight": "b.safetensors"}}))
    if weight_map["lm_head.weight"] == "b.safetensors":
        index.write_text(json.dumps({"weight_map": weight_map | {"lm_head.weight": "a.safetensors"}}))
    with pytest.raises(ValueError, match=r"lm_head\.weight"):
        load(copy)
    (copy / "b.safetensors").unlink()
    with pytest.raises(ValueError, match=r"b\.safetensors cannot be read"):
        load(copy)
    for broken in ("{", "[]", "{}"):
        index.write_text(broken)
        with pytest.raises(ValueError, match=r"model\.safetensors\.index\.json"):
            load(copy)


def test_a_truncated_file_is_named(copy: Path) -> None:
    file = copy / "model.safetensors"
    whole = file.read_bytes()
    for size in (0, 5, 200, len(whole) // 2, len(whole) - 1):
        file.write_bytes(whole[:size])
        with pytest.raises(ValueError, match=r"model\.safetensors cannot be read.*copy the checkpoint again"):
            load(copy)


def test_a_missing_tensor_is_named(copy: Path) -> None:
    edit_tensors(copy, lambda tensors: tensors.pop("model.layers.1.mlp.up_proj.weight"))
    with pytest.raises(ValueError, match=r"has no tensor model\.layers\.1\.mlp\.up_proj\.weight"):
        load(copy)


def test_a_wrong_shape_is_named(copy: Path) -> None:
    edit_config(copy, intermediate_size=44)
    with pytest.raises(ValueError, match=r"gate_proj\.weight has shape \(48, 32\), but config\.json says \(44, 32\)"):
        load(copy)


def test_a_tensor_of_no_use_is_named(copy: Path) -> None:
    """A bias that is left out would silently be another model; what is computed anyway may lie there."""
    edit_tensors(copy, lambda tensors: tensors.update({"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(6)}))
    load(copy)
    edit_tensors(copy, lambda tensors: tensors.update({"model.layers.1.self_attn.q_proj.bias": torch.zeros(48)}))
    with pytest.raises(ValueError, match=r"copy has the tensor model\.layers\.1\.self_attn\.q_proj\.bias \(1 such"):
        load(copy)
    edit_tensors(copy, lambda tensors: tensors.pop("model.layers.1.self_attn.q_proj.bias"))
    edit_config(copy, num_hidden_layers=2)
    with pytest.raises(ValueError, match=r"has the tensor model\.layers\.2\."):
        load(copy)


def test_a_missing_bias_is_named(families: dict[str, Path], tmp_path: Path) -> None:
    path = Path(shutil.copytree(families["qwen2"], tmp_path / "copy"))
    edit_tensors(path, lambda tensors: tensors.pop("model.layers.1.self_attn.v_proj.bias"))
    with pytest.raises(ValueError, match=r"has no tensor model\.layers\.1\.self_attn\.v_proj\.bias"):
        load(path)


def test_a_second_copy_of_tied_weights_must_be_equal(tied: Path, tmp_path: Path) -> None:
    path = Path(shutil.copytree(tied, tmp_path / "copy"))
    edit_tensors(path, lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"].clone()}))
    assert all(torch.equal(a, b) for a, b in zip(load(path).parameters(), load(tied).parameters(), strict=True))
    edit_tensors(path, lambda tensors: tensors["lm_head.weight"].mul_(2))
    with pytest.raises(ValueError, match=r"lm_head\.weight differs from model\.embed_tokens\.weight"):
        load(path)


def test_quantised_weights_are_named(copy: Path) -> None:
    name = "model.layers.1.mlp.down_proj.weight"
    edit_tensors(copy, lambda tensors: tensors.update({name: tensors[name].to(torch.int8)}))
    with pytest.raises(ValueError, match=r"model\.safetensors: model\.layers\.1\.mlp\.down_proj\.weight has dtype I8"):
        load(copy)


def test_model_safetensors_is_read_alone_where_there_is_no_index(copy: Path, untied: Path) -> None:
    save_file({"output.weight": torch.ones(2)}, copy / "consolidated.safetensors")
    assert all(torch.equal(a, b) for a, b in zip(load(copy).parameters(), load(untied).parameters(), strict=True))


def test_bfloat16_checkpoints_load_in_any_dtype(copy: Path) -> None:
    edit_tensors(copy, lambda tensors: tensors.update({name: t.bfloat16() for name, t in tensors.items()}))
    edit_config(copy, dtype="bfloat16")
    half = load(copy)
    wide = Transformer(replace(ModelSpec.load(copy), dtype=torch.float32)).requires_grad_(False)
    load_weights(wide, copy)
    for a, b in zip(half.parameters(), wide.parameters(), strict=True):
        assert a.dtype == torch.bfloat16 and b.dtype == torch.float32 and torch.equal(a.float(), b)


def test_the_fingerprint_tells_checkpoints_apart(copy: Path, untied: Path, tied: Path) -> None:
    same = fingerprints(untied)
    assert fingerprints(copy) == same != fingerprints(tied)
    whole = (copy / "model.safetensors").read_bytes()
    differing = [
        whole[:-1] + bytes([whole[-1] ^ 1]),  # the last byte
        whole[:20] + whole[20:].replace(b"model.norm.weight", b"model.norn.weight", 1),  # the header
        whole[: len(whole) // 2] + bytes(len(whole) - len(whole) // 2),  # a copy that was never finished
    ]
    for content in differing:
        (copy / "model.safetensors").write_bytes(content)
        assert fingerprints(copy) != same
    (copy / "model.safetensors").write_bytes(whole)
    assert fingerprints(copy) == same
    edit_config(copy, rope_theta=4999.0)
    found = fingerprints(copy)
    assert {name for name in same if found[name] != same[name]} == {"config.json"}
    (copy / "model.safetensors").write_bytes(whole[:-1])
    with pytest.raises(ValueError, match=r"model\.safetensors cannot be read"):
        fingerprints(copy)
    (copy / "config.json").unlink()
    with pytest.raises(ValueError, match=r"config\.json cannot be read"):
        fingerprints(copy)


def test_the_fingerprint_reads_little_of_a_large_checkpoint(tmp_path: Path) -> None:
    """Its time does not grow with the file: a sparse one of 4 GiB."""
    header = json.dumps({"x": {"dtype": "U8", "shape": [1 << 32], "data_offsets": [0, 1 << 32]}}).encode()
    with (tmp_path / "model.safetensors").open("wb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        file.truncate(8 + len(header) + (1 << 32))
    (tmp_path / "config.json").write_text("{}")
    begun = perf_counter()
    fingerprints(tmp_path)
    assert perf_counter() - begun < 1.0


def test_missing_directories_and_weights_are_named(tmp_path: Path, copy: Path) -> None:
    with pytest.raises(ValueError, match=r"nowhere/config\.json does not exist"):
        ModelSpec.load(tmp_path / "nowhere")
    (copy / "model.safetensors").unlink()
    with pytest.raises(ValueError, match=r"copy has no \.safetensors file"):
        load(copy)


@pytest.mark.parametrize("text", ["", "{", '{"model_type": "llama"', "[]", '"llama"', "null"])
def test_a_broken_config_is_named(copy: Path, text: str) -> None:
    (copy / "config.json").write_text(text)
    with pytest.raises(ValueError, match=r"config\.json"):
        ModelSpec.load(copy)


@pytest.mark.parametrize("field", ["vocab_size", "hidden_size", "num_attention_heads", "num_hidden_layers"])
def test_a_missing_field_is_named(copy: Path, field: str) -> None:
    config = json.loads((copy / "config.json").read_text())
    del config[field]
    (copy / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=rf"config\.json lacks the field '{field}'"):
        ModelSpec.load(copy)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("model_type", "gpt2"),
        ("hidden_act", "gelu"),
        ("layer_types", ["full_attention"]),
        ("layer_types", ["full_attention", "sliding_attention", "full_attention"]),
        ("rope_parameters", {"rope_type": "su", "rope_theta": 1e4, "factor": 2.0}),
        ("rope_scaling", {"type": "mrope", "factor": 2.0}),
        ("rope_parameters", {"rope_type": "llama3", "rope_theta": 1e4, "factor": 8.0}),
        ("rope_parameters", {"rope_type": "default", "mrope_section": [2, 2, 2]}),
        ("partial_rotary_factor", 0.5),
        ("head_dim", 11),
        ("quantization_config", {"bits": 4}),
        ("residual", "desync"),
        ("ladder_layers", 2),
        ("dtype", "int8"),
        ("num_key_value_heads", 3),
    ],
)
def test_an_unsupported_field_is_named(copy: Path, field: str, value: object) -> None:
    if field == "rope_scaling":
        edit_config(copy, rope_parameters=None)
    edit_config(copy, **{field: value})
    named = "rope_" if field.startswith("rope") else field
    with pytest.raises(ValueError, match=rf"config\.json: .*{named}"):
        ModelSpec.load(copy)


@pytest.mark.parametrize("field", ["hidden_size", "num_hidden_layers", "num_key_value_heads"])
def test_a_field_of_the_wrong_type_is_a_sentence(copy: Path, field: str) -> None:
    edit_config(copy, head_dim=None, **{field: "many"})
    with pytest.raises(ValueError, match=r"config\.json: "):
        ModelSpec.load(copy)


@pytest.mark.parametrize("layers", [4, -1, [3], [-1], [0, 9]])
def test_ladder_layers_outside_the_model_are_refused(copy: Path, layers: int | list[int]) -> None:
    edit_config(copy, residual="ladder", ladder_layers=layers)
    with pytest.raises(ValueError, match="ladder_layers"):
        ModelSpec.load(copy)


def test_both_spellings_of_the_rope_fields(copy: Path) -> None:
    new = ModelSpec.load(copy)
    edit_config(copy, rope_parameters=None, rope_theta=5000.0)
    assert ModelSpec.load(copy) == new and new.rope_theta == 5000.0


@pytest.mark.parametrize("residual", ["standard", "ladder", "parallel", "ladder-parallel"])
def test_the_wiring_survives_the_config(copy: Path, residual: str) -> None:
    edit_config(copy, residual=residual)
    spec = ModelSpec.load(copy)
    assert spec.residual == residual and ModelSpec.from_config(spec.to_config()) == spec
    if residual.startswith("ladder"):
        edit_config(copy, ladder_layers=2)
        spec = ModelSpec.load(copy)
        assert spec.ladder_layers == (1, 2) and ModelSpec.from_config(spec.to_config()) == spec
        edit_config(copy, ladder_layers=[])
        assert (
            ModelSpec.load(copy).ladder_layers
            == ()
            == ModelSpec.from_config(ModelSpec.load(copy).to_config()).ladder_layers
        )


def test_a_broken_checkpoint_fails_on_every_rank_without_hanging(copy: Path) -> None:
    edit_tensors(copy, lambda tensors: tensors.pop("model.norm.weight"))

    def rank_main(mesh: Mesh) -> None:
        with pytest.raises(ValueError, match=r"model\.norm\.weight"):
            load_weights(Transformer(ModelSpec.load(copy), mesh.shard, mesh.all_reduce).requires_grad_(False), copy)

    run_ranks(2, rank_main)
