"""From plain values to dataclasses."""

from dataclasses import dataclass, field

import pytest
from omegaconf import OmegaConf

from stepladder.launch.typed_config import build, plain


@dataclass(frozen=True, kw_only=True)
class Inner:
    size: int
    ratio: float = 0.5

    def __post_init__(self) -> None:
        if self.size < 1:
            raise ValueError(f"size is {self.size}; it must be at least 1")


@dataclass(frozen=True, kw_only=True)
class Outer:
    name: str
    inner: Inner
    several: dict[str, Inner] = field(default_factory=dict)
    numbers: list[int] = field(default_factory=list)
    row: list[Inner] = field(default_factory=list)
    maybe: int | None = None


WHOLE = {"name": "a", "inner": {"size": 2}}


def test_nested_values_become_nested_dataclasses() -> None:
    values = {
        **WHOLE,
        "several": {"x": {"size": 3, "ratio": 1}},
        "numbers": [1, 2],
        "row": [{"size": 4}],
        "maybe": None,
    }
    several, row = {"x": Inner(size=3, ratio=1.0)}, [Inner(size=4)]
    assert build(Outer, values) == Outer(name="a", inner=Inner(size=2), several=several, numbers=[1, 2], row=row)


@pytest.mark.parametrize(
    ("values", "sentence"),
    [
        ({"inner": {"size": 1}}, "name is missing; give name=..."),
        ({"name": "a", "inner": {}}, "inner.size is missing; give inner.size=..."),
        ({**WHOLE, "nmae": 1}, "nmae is not an option; the top level takes inner, maybe, name, numbers, row, several"),
        ({"name": "a", "inner": {"size": 1, "sise": 1}}, "inner.sise is not an option; inner takes ratio, size"),
        ({"name": "a", "inner": {"size": "1"}}, "inner.size is '1': expected `int`, got `str`"),
        ({"name": "a", "inner": {"size": 0}}, "size is 0; it must be at least 1"),
        ({**WHOLE, "name": 3}, "name is 3: expected `str`, got `int`"),
        ({**WHOLE, "numbers": [1, "b"]}, "numbers is [1, 'b']: expected `int`, got `str` - at `$[1]`"),
        ({**WHOLE, "several": {"x": {"size": 1, "sise": 2}}}, "several.x.sise is not an option"),
        ({**WHOLE, "row": [{"size": 1}, {"sise": 2}]}, "row[1].sise is not an option; row[1] takes ratio, size"),
        ({**WHOLE, "row": {"size": 1}}, "row is {'size': 1}: expected `array`, got `object`"),
        ({**WHOLE, "several": {"x": 7}}, "several.x is 7: expected `object`, got `int`"),
        ({"name": "a", "inner": None}, "inner is None: expected `object`, got `null`"),
    ],
)
def test_what_does_not_fit_is_one_sentence(values: dict[str, object], sentence: str) -> None:
    with pytest.raises(ValueError) as error:
        build(Outer, values)
    assert sentence in str(error.value) and "\n" not in str(error.value)


def test_words_of_a_command_line_may_be_numbers() -> None:
    assert build(Inner, {"size": "3", "ratio": "0.25"}, strict=False) == Inner(size=3, ratio=0.25)
    with pytest.raises(ValueError, match=r"size is 'three': expected `int`, got `str`"):
        build(Inner, {"size": "three"}, strict=False)


def test_plain_resolves_and_names_what_is_missing() -> None:
    assert plain(OmegaConf.create({"a": 1, "b": "${a}"})) == {"a": 1, "b": 1}
    for values, sentence in (
        ({"a": {"b": "???"}}, "a.b is missing; give a.b=..."),
        ({"a": "${c}"}, "a: Interpolation key 'c' not found"),
    ):
        with pytest.raises(ValueError) as error:
            plain(OmegaConf.create(values))
        assert sentence in str(error.value) and "\n" not in str(error.value)
