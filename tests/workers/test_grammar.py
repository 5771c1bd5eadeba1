"""Texts that must have a form: masks, states, engines of every kind; hostile grammars."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import jsonschema
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from stepladder import LLM, StructuredOutputs
from stepladder.parallel.mesh import Mesh, SingleRank
from stepladder.parallel.shards import Shard
from stepladder.parallel.spec import ModelSpec
from stepladder.workers import sampler
from stepladder.workers.assembly import whole_executor
from stepladder.workers.config import EngineConfig, KvConfig
from stepladder.workers.core import Output, Request, Sample, SamplingParams
from stepladder.workers.engine import Engine
from stepladder.workers.engine_rank import EngineRank
from stepladder.workers.grammar.compiler import Grammars
from stepladder.workers.grammar.constraint import GrammarConstraint, words
from stepladder.workers.limits import SchedulerConfig
from stepladder.workers.rank import RankConfig
from stepladder.workers.server.messages import Submit, Update, decode_to_engine, decode_update, encode
from stepladder.workers.text.token_bytes import _gpt2_alphabet
from stepladder.workers.text.tokenizer import Tokenizer
from tests.cluster.models import write_tokenizer
from tests.llama import write_llama
from tests.ranks import run_ranks
from tests.workers.test_afd import engine as attention_engine
from tests.workers.test_afd import membership, pool_of

SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 4},
        "age": {"type": "integer", "minimum": 0, "maximum": 150},
        "kinds": {"type": "array", "items": {"enum": ["é", "b"]}, "minItems": 1, "maxItems": 2},
        "inner": {"$ref": "#/$defs/inner"},
    },
    "required": ["name", "age", "kinds", "inner"],
    "additionalProperties": False,
    "$defs": {"inner": {"anyOf": [{"type": "null"}, {"const": {"deep": [True]}}]}},
}
JSON = StructuredOutputs(json=SCHEMA)
SIZE = 300  # of a vocabulary; the tokenizer's ids end at 259


BYTES = [_gpt2_alphabet()[char] for char in sorted(_gpt2_alphabet())]  # of the tokens
EOS = 256  # write_tokenizer's first special token
LIMITS = SchedulerConfig(
    max_sequences=4,
    max_step_tokens=16,
    max_model_len=600,
    num_blocks=160,
    block_size=4,
    eos_ids=(EOS,),
    vocab_size=SIZE,
)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Random weights over bytes, and 40 ids that are no tokens."""
    directory = tmp_path_factory.mktemp("bytes")
    assert write_tokenizer(directory).token_to_id("<|end|>") == EOS
    return write_llama(directory, vocab_size=SIZE, eos_token_id=EOS, max_position_embeddings=1024)


@pytest.fixture(scope="module")
def grammars(model: Path) -> Grammars:
    return Grammars(lambda: Tokenizer(model), SIZE)


def ids(text: bytes) -> tuple[int, ...]:
    return tuple(BYTES.index(byte) for byte in text)


def text(tokens: list[int]) -> str:
    return bytes(BYTES[token] for token in tokens if token < EOS).decode()


def state(grammars: Grammars, asked: StructuredOutputs, *ends: int, output: bytes = b"") -> GrammarConstraint:
    return grammars.begin(asked, ends or (EOS,), (*ends, EOS), ids(output)).result()


def allowed(constraint: GrammarConstraint, drafts: tuple[int, ...] = (), unending: int = 0) -> list[set[int]]:
    """What may follow now, and behind each draft."""
    mask = np.full((1 + len(drafts), words(SIZE)), -1, dtype=np.int32)
    constraint.mask_rows(mask, unending, drafts)
    bits = np.unpackbits(mask.view(np.uint8), axis=1, bitorder="little")
    return [set(np.flatnonzero(row[:SIZE]).tolist()) for row in bits]


def test_what_may_follow(grammars: Grammars) -> None:
    """Padding of the vocabulary and special tokens never; the end where the text is done, and only it where nothing
    else can follow."""
    one = state(grammars, StructuredOutputs(regex="ab*|cd"))
    assert allowed(one) == [{*ids(b"ac")}]
    one.advance(*ids(b"a"))
    assert allowed(one) == [{*ids(b"b"), EOS}] and allowed(one, unending=1) == [{*ids(b"b")}]
    one.advance(EOS)
    assert one.ended and not one.error
    other = state(grammars, StructuredOutputs(regex="ab*|cd"), output=b"cd")
    assert allowed(other) == allowed(other, unending=1) == [{EOS}], "even where it should go on"
    wrong = state(grammars, StructuredOutputs(regex="ab"), output=b"b")
    assert wrong.error and not wrong.ended
    assert allowed(wrong) == [{EOS}]


def test_a_stop_token_may_end_a_text_that_is_done_and_is_else_as_any_other(grammars: Grammars) -> None:
    one = state(grammars, StructuredOutputs(regex="x?yz|x"), *ids(b"z"))
    assert allowed(one) == [{*ids(b"xy")}]
    one.advance(*ids(b"x"))
    assert allowed(one) == [{*ids(b"y"), *ids(b"z")}], "ignore_eos: no EOS while something else may follow"
    one.advance(*ids(b"y"))
    assert allowed(one, unending=1) == [{*ids(b"z")}], "the text has no other way"
    one.advance(*ids(b"z"))
    assert not one.ended and allowed(one) == [{*ids(b"z")}], "now it would end the text"
    one.advance(*ids(b"z"))
    assert one.ended


def test_drafts_are_masked_in_a_row_and_leave_no_trace(grammars: Grammars) -> None:
    one = state(grammars, StructuredOutputs(choice=("abc", "abd", "xyz")))
    rows = allowed(one, ids(b"abxc"))
    assert rows[:3] == [{*ids(b"ax")}, {*ids(b"b")}, {*ids(b"cd")}] and len(rows[3]) == len(rows[4]) == SIZE
    assert allowed(one) == [{*ids(b"ax")}]
    for token in ids(b"abd"):
        one.advance(token)
    one.advance(EOS)
    assert one.ended
    one.rollback(2)
    assert not one.ended and allowed(one) == [{*ids(b"cd")}]
    one.rollback(2)
    assert allowed(one) == [{*ids(b"ax")}]
    assert allowed(one, ids(b"xyz"), unending=9)[3] == {EOS}


@settings(max_examples=30)
@given(seed=st.integers(0, 2**32), drafts=st.integers(0, 6))
def test_masks_of_drafts_are_those_of_going_on(grammars: Grammars, seed: int, drafts: int) -> None:
    draw, one = np.random.default_rng(seed), state(grammars, JSON)
    for _ in range(draw.integers(0, 20)):
        one.advance(int(draw.choice(sorted(allowed(one)[0]))))
        if one.ended:
            return
    tokens, wanted, twin = [], [], one
    for _ in range(drafts):
        (row,) = allowed(twin)
        wanted.append(row)
        if not (row := row - {EOS}):
            break
        tokens.append(int(draw.choice(sorted(row))))
        twin.advance(tokens[-1])
    assert not twin.error
    twin.rollback(len(tokens))
    assert allowed(one, tuple(tokens))[: len(wanted)] == wanted


def test_the_sampler_masks_behind_bias_and_penalties(grammars: Grammars) -> None:
    one = state(grammars, StructuredOutputs(choice=("a", "b")))
    logits = torch.full((3, SIZE), -5.0)
    logits[:, 7] = 50.0
    for temperature in (0.0, 1.0):
        params = SamplingParams(
            temperature=temperature,
            logit_bias={7: 100.0, ids(b"b")[0]: 3.0},
            repetition_penalty=1.5,
            top_k=5,
            top_p=0.99,
            min_p=0.01,
        )
        free = Sample(0, 2, params, [1, 2], 1)
        bound = free._replace(constraint=one)
        drawn = sampler.sample(logits, [bound, free, bound]).tolist()
        assert drawn[1] == 7 and {drawn[0], drawn[2]} <= {*ids(b"ab")} and (temperature or (drawn[0],) == ids(b"b"))
    assert logits[0, 7] == 50 and logits.shape == (3, SIZE)


def params(seed: int = 0, **fields: Any) -> SamplingParams:
    given = {"max_tokens": 400, "structured_outputs": JSON, "seed": seed, **fields}
    return SamplingParams(**given)


def requests(count: int, **fields: Any) -> list[Request]:
    """Constrained ones, and free ones between them."""
    free = SamplingParams(max_tokens=60, temperature=0.9, seed=4, ignore_eos=True)
    return [
        Request(id=str(i), prompt=tuple(range(i, i + 7)), params=params(i, **fields) if i % 3 else free)
        for i in range(count)
    ]


def serve(engine: Engine, asked: list[Request]) -> dict[str, tuple[list[int], str]]:
    tokens: dict[str, list[int]] = {request.id: [] for request in asked}
    reasons: dict[str, str] = {}
    for request in asked:
        engine.add(request)
    while engine.has_work:
        for output in engine.step():
            tokens[output.id] += output.tokens
            reasons |= {output.id: output.finish_reason} if output.finish_reason else {}
    engine.heartbeat()
    return {key: (tokens[key], reasons[key]) for key in tokens}


def check_all(asked: list[Request], found: dict[str, tuple[list[int], str]]) -> None:
    for request in asked:
        tokens, reason = found[request.id]
        if request.params.structured_outputs:
            assert reason == "stop" and tokens[-1] == EOS
            jsonschema.validate(json.loads(text(tokens)), SCHEMA)
        else:
            assert reason == "length"


def on_one(model: Path, grammars: Grammars, limits: SchedulerConfig) -> Engine:
    executor = whole_executor(ModelSpec.load(model), str(model), SingleRank(), limits.num_blocks, limits.block_size)
    return Engine(limits, executor, grammars)


@pytest.fixture(scope="module")
def plain(model: Path, grammars: Grammars) -> dict[str, tuple[list[int], str]]:
    return serve(on_one(model, grammars, LIMITS), requests(7))


def test_every_text_has_its_form_beside_free_ones(plain: dict[str, tuple[list[int], str]]) -> None:
    check_all(requests(7), plain)
    assert len({text(plain[str(i)][0]) for i in (1, 2, 4, 5)}) == 4


@pytest.mark.parametrize("lookahead", [0, 1])
def test_preemption_changes_nothing(model: Path, grammars: Grammars, lookahead: int) -> None:
    asked = requests(7, max_tokens=100)
    roomy = serve(on_one(model, grammars, LIMITS), asked)
    tight = on_one(model, grammars, replace(LIMITS, max_model_len=120, num_blocks=32, lookahead=lookahead))
    assert serve(tight, asked) == roomy and tight.scheduler.num_preemptions > 0


def test_a_step_ahead_changes_nothing(model: Path, grammars: Grammars, plain: dict[str, tuple[list[int], str]]) -> None:
    assert serve(on_one(model, grammars, replace(LIMITS, lookahead=1)), requests(7)) == plain


def test_tensor_parallel_ranks(model: Path, grammars: Grammars, plain: dict[str, tuple[list[int], str]]) -> None:
    def rank_main(mesh: Mesh) -> dict[str, tuple[list[int], str]]:
        executor = whole_executor(ModelSpec.load(model), str(model), mesh, LIMITS.num_blocks, LIMITS.block_size)
        if mesh.shard.rank:
            executor.follow()
            return {}
        found = serve(Engine(replace(LIMITS, lookahead=1), executor, grammars), requests(7))
        executor.stop()
        return found

    found = run_ranks(2, rank_main)[0]
    check_all(requests(7), found)


def test_attention_and_ffns_apart(model: Path, grammars: Grammars) -> None:
    spec = ModelSpec.load(model)
    asked = [r for r in requests(5, max_tokens=80, stop_token_ids=(EOS,)) if r.params.structured_outputs]
    with pool_of(model, 1) as pool:
        engine = attention_engine(spec, model, membership(spec, pool), 1)
        engine.grammars = grammars
        found = serve(engine, asked)
        engine.executor.stop()
    ended = {r.id: found[r.id] for r in asked if found[r.id][1] == "stop"}
    assert ended
    check_all([r for r in asked if r.id in ended], ended)


def test_a_replay_goes_on_in_the_form(model: Path, grammars: Grammars, plain: dict[str, tuple[list[int], str]]) -> None:
    """On another engine, from wherever the first one was lost."""
    [request], (tokens, reason) = [r for r in requests(2) if r.id == "1"], plain["1"]
    for cut in (1, len(tokens) // 2, len(tokens) - 1):
        engine = on_one(model, Grammars(lambda: Tokenizer(model), SIZE), LIMITS)
        assert serve(engine, [replace(request, output=tuple(tokens[:cut]))]) == {"1": (tokens[cut:], reason)}
    broken = serve(on_one(model, grammars, LIMITS), [replace(request, output=ids(b"no json"))])
    assert broken["1"][1] == "abort"


def test_min_tokens_ignore_eos_and_logprobs(model: Path, grammars: Grammars) -> None:
    form = StructuredOutputs(regex="[a-z]{1,30}")
    fields: dict[str, Any] = {"structured_outputs": form, "max_tokens": 50}
    several = {
        "least": params(3, min_tokens=20, **fields),
        "most": params(3, ignore_eos=True, **fields),
        "beyond": params(3, min_tokens=45, logprobs=2, **fields),
        "penalised": params(3, repetition_penalty=1.8, presence_penalty=1.0, **fields),
    }
    found = serve(on_one(model, grammars, LIMITS), [Request(id=k, prompt=(1, 2), params=p) for k, p in several.items()])
    lengths = {key: len(tokens) - 1 for key, (tokens, _) in found.items()}
    assert 20 <= lengths["least"] <= 30 and lengths["most"] == lengths["beyond"] == 30
    assert all(reason == "stop" and tokens[-1] == EOS for tokens, reason in found.values())
    assert all(text(tokens).isalpha() for tokens, _ in found.values())


def test_one_that_is_aborted_while_it_compiles_and_one_that_cannot_be_compiled(model: Path, grammars: Grammars) -> None:
    engine = on_one(model, Grammars(lambda: Tokenizer(model), SIZE), LIMITS)
    engine.add(Request(id="gone", prompt=(1,), params=params()))
    assert engine.has_work and engine.find("gone") and engine.abort("gone") and not engine.has_work
    bad = StructuredOutputs(json={"type": "strin"})
    engine.add(Request(id="bad", prompt=(1,), params=params(structured_outputs=bad)))
    outputs: list[Output] = []
    while engine.has_work:
        outputs += engine.step()
    assert [(o.id, o.finish_reason, o.error) for o in outputs] == [
        ("bad", "abort", "json cannot be used: Invalid type: strin")
    ]
    engine.heartbeat()


def test_an_engine_refuses_what_it_cannot_end_or_read(model: Path, grammars: Grammars) -> None:
    endless = on_one(model, grammars, replace(LIMITS, eos_ids=()))
    with pytest.raises(ValueError, match="no end-of-sequence token"):
        endless.add(Request(id="a", prompt=(1,), params=params()))
    endless.grammars = None
    with pytest.raises(ValueError, match="no tokenizer"):
        endless.add(Request(id="a", prompt=(1,), params=params(stop_token_ids=(EOS,))))
    assert not endless.has_work


def test_a_rank_reads_its_models_tokenizer_when_it_is_asked(model: Path) -> None:
    """And what it is asked travels there, and errors back."""
    rank = EngineRank(
        RankConfig(
            model=str(model), shard=Shard(), prefix="1", host="127.0.0.1", ranks_here=1, device="cpu", secret="s",
            collective_seconds=5.0, engine=EngineConfig(threads=1), kv=KvConfig(),
        )
    )  # fmt: skip
    rank.begin(rank.load("127.0.0.1", rank.open_store()))
    assert rank._engine and rank._channel
    submit = Submit(1, requests(2)[1])
    arrived = decode_to_engine(encode(submit))
    assert arrived == submit and isinstance(arrived, Submit)
    rank._engine.executor.mesh.clock.restart()
    check_all([submit.request], serve(rank._engine, [arrived.request]))
    rank._channel.close()
    update = Update(1, 1, [Output("1", [], "abort", error="why")], [], rank._engine.stats, [])
    assert decode_update(encode(update)).outputs == update.outputs


def test_in_one_process(model: Path) -> None:
    llm = LLM(str(model), device="cpu")
    several = [
        StructuredOutputs(json=json.dumps(SCHEMA)),
        StructuredOutputs(json_object=True),
        StructuredOutputs(choice=["yes", 'naïve\n"no"']),  # type: ignore[arg-type]
        StructuredOutputs(regex=r"\d{3}-[A-F]+"),
        StructuredOutputs(grammar='start: "<" start ">" | "x"'),
        StructuredOutputs(grammar='root ::= "a" root | "b"'),
    ]
    found = llm.generate(["hello"] * len(several), [params(1, structured_outputs=form) for form in several])
    ended = [one.text if one.finish_reason == "stop" else "" for one in found]
    jsonschema.validate(json.loads(ended[0]), SCHEMA)
    assert isinstance(json.loads(ended[1] or "{}"), dict)
    assert ended[2] in ("yes", 'naïve\n"no"')
    assert found[3].text[:3].isdigit() and set(found[3].text[4:]) <= set("ABCDEF")
    assert set(found[4].text) <= set("<x>") and set(found[5].text) <= set("ab")
    with pytest.raises(ValueError, match=r"json cannot be used: Unimplemented keys"):
        llm.generate("x", params(structured_outputs=StructuredOutputs(json={"not": {}})))
    assert not llm.under_way


@pytest.mark.parametrize(
    ("fields", "sentence"),
    [
        ({}, "there is none"),
        ({"regex": "a", "choice": ("b",)}, "there is regex, choice"),
        ({"regex": ""}, "regex is empty"),
        ({"json": "{"}, "json is not valid JSON"),
        ({"json": "[1]"}, "json must be a schema"),
        ({"json": {"a": object()}}, "json is not a JSON schema"),
        ({"json": {"const": float("nan")}}, "not JSON compliant"),
        ({"regex": "a" * 200_000}, "131072 is the most"),
        ({"grammar": 'start: "a"' + "\n" * 1000}, "more than 1000 lines"),
        ({"json": {"anyOf": [{"$ref": "#"}] * 1001}}, "more than 1000 references"),
    ],
)
def test_what_can_be_seen_at_once_is_refused_at_once(fields: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence.replace("(", r"\(")):
        StructuredOutputs(**fields)


def nested(depth: int) -> dict[str, Any]:
    return {"type": "array", "items": nested(depth - 1)} if depth else {"type": "string"}


def chain(length: int) -> dict[str, Any]:
    defs: dict[str, Any] = {f"d{i}": {"$ref": f"#/$defs/d{i + 1}"} for i in range(length)}
    return {"$defs": {**defs, f"d{length}": {"type": "string"}}, "$ref": "#/$defs/d0"}


HOSTILE: list[dict[str, Any]] = [
    {"json": nested(200)},
    {"json": {"$ref": "#"}},
    {"json": {"allOf": [{"type": "string"}, {"type": "integer"}]}},
    {"json": {"$ref": "http://169.254.169.254/latest"}},
    {"json": {"$ref": "file:///etc/passwd"}},
    {"json": {"type": "object", "properties": {f"k{i}": {"type": "string"} for i in range(3000)}}},
    {"json": {"type": "string", "minLength": 2**64}},
    {"json": {"x-guidance": {"lenient": True}, "not": {}}},
    {"json": {"oneOf": [{"type": "string"}, {"maxLength": 3}], "unevaluatedProperties": False}},
    {"json": {"type": "integer", "multipleOf": 982451653}},
    {"regex": "(" * 10_000 + "a" + ")" * 10_000},
    {"regex": "(((a{100}){100}){100}){100}"},
    {"regex": ".*" * 2000},
    {"regex": "(a"},
    {"grammar": "start: " + "(" * 20_000 + '"a"' + ")" * 20_000},
    {"grammar": "start: start"},
    {"grammar": "start: <|nobody|>"},
    {"grammar": "start: R0\n" + "\n".join(f"R{i}: R{i + 1} R{i + 1}" for i in range(40)) + '\nR40: "a"'},
]


@pytest.mark.parametrize("fields", HOSTILE, ids=lambda fields: str(fields)[:40])
def test_a_hostile_grammar_is_one_sentence(grammars: Grammars, fields: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"^\w+ cannot be used: .+") as found:
        grammars.check(StructuredOutputs(**fields)).result(10)
    assert "\n" not in str(found.value) and len(str(found.value)) < 400


CRASHING = """
import json, sys
from stepladder import StructuredOutputs
from stepladder.workers.grammar.compiler import Grammars
from stepladder.workers.text.tokenizer import Tokenizer
from tests.workers.test_grammar import SIZE, chain

grammars = Grammars(lambda: Tokenizer(sys.argv[1]), SIZE)
unseen = json.dumps(chain(3500)).replace("$ref", chr(92) + "u0024ref")  # past the bound on references
for asked in (
    {"json": chain(999)},
    {"grammar": "start: %json " + unseen},
    {"grammar": chr(10).join(["start: r0", *(f"r{i}: r{i + 1}" for i in range(990)), 'r990: "a"'])},
):
    try:
        grammars.check(StructuredOutputs(**asked)).result()
        print("compiled")
    except ValueError as error:
        print(error)
"""


def test_long_chains_of_rules_do_not_overflow_the_stack(model: Path) -> None:
    """In a process of its own, which would be gone. The library recurses along them."""
    command = [sys.executable, "-c", CRASHING, str(model)]
    done = subprocess.run(command, cwd=Path(__file__).parents[2], capture_output=True, text=True)
    assert done.returncode == 0 and len(done.stdout.splitlines()) == 3, done.stderr
