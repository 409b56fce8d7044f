"""Declarations and who wins, the frame law, the grammar of symbolic dimensions."""

from __future__ import annotations

import json
import math
import random
import re
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import assume, example, given
from hypothesis import strategies as st

from xares_onnx.encoder.contract import contract
from xares_onnx.encoder.contract.contract import Contract
from xares_onnx.encoder.contract.declarations import (
    Declaration,
    Declarations,
    declared_by_preprocessor,
    declared_in_metadata,
    declared_in_sidecar,
    declared_on_command_line,
    merge,
)
from xares_onnx.encoder.contract.frame_law import FrameLaw, fit_frame_law, frames_of_dimension, law_holds
from xares_onnx.errors import ContractError, UsageError


def values(declarations: Declarations) -> dict[str, object]:
    return {key: declaration.value for key, declaration in declarations.items()}


def written(path: Path, text: str) -> Path:
    path.write_text(text)
    return path


# ---------------------------------------------------------------- declarations


def test_the_first_declaration_wins() -> None:
    first, second, third = ({"sample_rate": Declaration(rate, str(rate))} for rate in (8_000, 16_000, 44_100))
    second["amplitude"] = Declaration("int16", "second")
    assert merge(first, second, third) == {"sample_rate": first["sample_rate"], "amplitude": second["amplitude"]}
    assert merge({}, third, first)["sample_rate"].source == "44100"
    assert merge() == {}


def test_command_line() -> None:
    declared = declared_on_command_line(["sample_rate = 8000", "xares.amplitude=int16", "output=a=b", "sample_rate=9000"])
    assert values(declared) == {"sample_rate": 9000, "amplitude": "int16", "output": "a=b"}
    assert {declaration.source for declaration in declared.values()} == {"--contract"}


def test_every_key_reads_its_own_type() -> None:
    declared = declared_on_command_line(
        ["first_frame_center_samples=-12.5", "receptive_field_samples=-40", "hop_samples=160", "license=CC-BY-4.0"]
    )
    assert values(declared) == {
        "first_frame_center_samples": -12.5,
        "receptive_field_samples": -40,
        "hop_samples": 160,
        "license": "CC-BY-4.0",
    }


@pytest.mark.parametrize(
    ("pair", "says"),
    [
        ("hop_samples", "must be KEY=VALUE, such as sample_rate=16000"),
        ("hop_sample=160", "there is no contract key 'hop_sample'; did you mean 'hop_samples'"),
        ("zzz=160", "there is no contract key 'zzz'"),
        ("contract_version=1", "there is no contract key 'contract_version'"),
        ("hop_samples=16O", "hop_samples='16O' is not a whole number"),
        ("hop_samples=160.0", "hop_samples='160.0' is not a whole number"),
        ("hop_samples=" + "9" * 5000, "hop_samples has 5000 characters; the most is 1000"),
        ("hop_samples=0", "hop_samples=0 must be from 1 to 2147483647"),
        ("chunk_samples=-5", "chunk_samples=-5 must be from 1"),
        ("sample_rate=2147483648", "sample_rate=2147483648 must be from 1 to 2147483647"),
        ("first_frame_center_samples=nan", "first_frame_center_samples='nan' is not a number"),
        ("first_frame_center_samples=inf", "first_frame_center_samples='inf' is not a number"),
        ("amplitude=Unit", "amplitude='Unit' must be one of int16, unit"),
        ("normalize=yes", "normalize='yes' must be one of none, zscore"),
        ("input_kind=tokens", "input_kind='tokens' must be one of features, waveform"),
        ("output_layout=DBTB", "output_layout='DBTB' must name each axis: B the batch, T the frames, D the dimension"),
        ("output_layout=BT", "output_layout='BT' must name each axis"),
        ("input_layout=BTT", "input_layout='BTT' must name each axis: B the batch, T the samples or frames"),
        ("input_layout=BF", "input_layout='BF' must name each axis"),
    ],
)
def test_wrong_declarations_say_what_is_wrong(pair: str, says: str) -> None:
    with pytest.raises(UsageError, match=re.escape(says)) as caught:
        declared_on_command_line([pair])
    assert "--contract" in str(caught.value)
    assert len(str(caught.value)) < 200


def test_sidecar(tmp_path: Path) -> None:
    path = tmp_path / "model.toml"
    assert declared_in_sidecar(path) == {}
    written(path, 'sample_rate = 8000\nfirst_frame_center_samples = 12.5\namplitude = "int16"\n"xares.license" = "MIT"\n')
    declared = declared_in_sidecar(path)
    assert values(declared) == {
        "sample_rate": 8000,
        "first_frame_center_samples": 12.5,
        "amplitude": "int16",
        "license": "MIT",
    }
    assert declared["sample_rate"].source == "model.toml"


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("hop_sampels = 160", "model.toml: there is no contract key 'hop_sampels'; did you mean 'hop_samples'"),
        ("hop_samples = [160]", "model.toml: hop_samples='[160]' is not a whole number"),
        ("hop_samples = true", "model.toml: hop_samples='True' is not a whole number"),
        ("hop_samples =", "is not valid TOML"),
        ("a = " + "[" * 5000, "it is nested deeper than 32"),
        ("#" * 64_001, "it is larger than 64 kB"),
    ],
)
def test_wrong_sidecar(tmp_path: Path, text: str, says: str) -> None:
    with pytest.raises((ContractError, UsageError), match=re.escape(says)):
        declared_in_sidecar(written(tmp_path / "model.toml", text))


def test_unreadable_sidecar(tmp_path: Path) -> None:
    (tmp_path / "model.toml").mkdir()
    with pytest.raises(ContractError, match=r"model\.toml beside the model cannot be read"):
        declared_in_sidecar(tmp_path / "model.toml")
    (tmp_path / "latin.toml").write_bytes(b'license = "\xe9"')
    with pytest.raises(ContractError, match=r"latin\.toml beside the model cannot be read"):
        declared_in_sidecar(tmp_path / "latin.toml")


def test_metadata_own_keys_before_plain_ones_and_foreign_keys_ignored() -> None:
    declared = declared_in_metadata(
        {
            "xares.contract_version": "1",
            "xares.sample_rate": "8000",
            "sample_rate": "16000",
            "output_dim": "512",
            "model_type": "zipformer",
            "version": "3",
            "xares.exporter": "theirs",
            "xares.normalize": " zscore ",
        }
    )
    assert values(declared) == {"sample_rate": 8000, "output_dim": 512, "normalize": "zscore"}
    assert {declaration.source for declaration in declared.values()} == {"metadata"}


@pytest.mark.parametrize(("flag", "amplitude"), [("0", "int16"), ("1", "unit"), ("maybe", None)])
def test_metadata_normalize_samples_is_the_amplitude(flag: str, amplitude: str | None) -> None:
    assert values(declared_in_metadata({"normalize_samples": flag})).get("amplitude") == amplitude
    assert values(declared_in_metadata({"normalize_samples": flag, "xares.amplitude": "unit"}))["amplitude"] == "unit"


def test_metadata_of_a_later_contract_is_refused() -> None:
    with pytest.raises(ContractError, match="declares contract version '2', this program reads 1; update it"):
        declared_in_metadata({"xares.contract_version": "2"})


def test_metadata_wrong_value_is_refused() -> None:
    with pytest.raises(ContractError, match="metadata: sample_rate='16k' is not a whole number"):
        declared_in_metadata({"sample_rate": "16k"})


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({"sampling_rate": 8000, "do_normalize": True}, {"sample_rate": 8000, "normalize": "zscore"}),
        ({"feature_extractor_type": "Wav2Vec2FeatureExtractor", "do_normalize": False}, {"normalize": "none"}),
        ({"do_normalize": "yes", "unrelated": [1]}, {}),
        ({}, {}),
    ],
)
def test_preprocessor_config(tmp_path: Path, config: dict[str, object], expected: dict[str, object]) -> None:
    path = written(tmp_path / "preprocessor_config.json", json.dumps(config))
    assert values(declared_by_preprocessor(path)) == expected


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ('{"sampling_rate": "fast"}', "preprocessor_config.json: sample_rate='fast' is not a whole number"),
        ("{", "is not valid json"),
        ("[" * 100_000, "it is nested deeper than 32"),
        ("[]", "Expected `object`, got `array`"),
    ],
)
def test_wrong_preprocessor_config(tmp_path: Path, text: str, says: str) -> None:
    with pytest.raises(ContractError, match=re.escape(says)):
        declared_by_preprocessor(written(tmp_path / "preprocessor_config.json", text))


def test_no_preprocessor_config(tmp_path: Path) -> None:
    assert declared_by_preprocessor(tmp_path / "preprocessor_config.json") == {}


def test_described_says_where_each_field_is_from() -> None:
    described = Contract(
        input="audio",
        input_layout="BT",
        lengths_input=None,
        output="embeddings",
        output_layout="BD",
        dim=4,
        sample_rate=16_000,
        hop_samples=None,
        receptive_field_samples=None,
        first_frame_center_samples=None,
        min_samples=1,
        max_samples=None,
        chunk_samples=160_000,
        amplitude="unit",
        normalize="none",
        dynamic_batch=True,
        batch_coupled=False,
        sources={"sample_rate": "--contract"},
    ).described()
    assert described["sample_rate"] == {"value": 16_000, "source": "--contract"}
    assert described["dim"] == {"value": 4, "source": "measured"}
    assert described["hop_samples"] == {"value": None, "source": "not declared"}
    assert "sources" not in described


# ---------------------------------------------------------------- the frame law

LOW = 16_000
HIGH = 3 * LOW + 1
hops = st.integers(1, LOW)
receptives = st.integers(-LOW, LOW)


def counted(hop: int, receptive: int) -> Callable[[int], int]:
    """Frames by counting them: how many windows start at a multiple of the hop and end inside the input."""
    return lambda samples: len(range(0, samples - receptive + 1, hop))


@given(hops, receptives, st.integers(-LOW, HIGH))
def test_frames_are_the_windows_that_fit(hop: int, receptive: int, samples: int) -> None:
    assert FrameLaw(hop, receptive).frames(samples) == counted(hop, receptive)(samples)


@given(hops, receptives, st.integers(1, 500))
def test_first_length_with(hop: int, receptive: int, frames: int) -> None:
    law = FrameLaw(hop, receptive)
    assert law.frames(law.first_length_with(frames)) == frames
    assert law.frames(law.first_length_with(frames) - 1) == frames - 1


@given(hops, receptives)
@example(hop=LOW, receptive=LOW)  # the fewest frames that a law can be told from
@example(hop=1, receptive=-LOW)
def test_fit_recovers_every_law(hop: int, receptive: int) -> None:
    asked = []

    def frames(samples: int) -> int:
        asked.append(samples)
        return counted(hop, receptive)(samples)

    assert fit_frame_law(frames, LOW, HIGH) == FrameLaw(hop, receptive)
    assert len(asked) < 40  # each is a run of the model
    assert law_holds(FrameLaw(hop, receptive), frames, LOW, HIGH)


@given(hops, receptives, st.integers(-LOW + 1, LOW), st.integers(-LOW, LOW))
@example(hop=160, receptive=400, hop_error=0, receptive_error=1)
@example(hop=160, receptive=400, hop_error=0, receptive_error=-1)
@example(hop=160, receptive=400, hop_error=0, receptive_error=160)
@example(hop=160, receptive=400, hop_error=160, receptive_error=0)
def test_a_wrong_law_does_not_hold(hop: int, receptive: int, hop_error: int, receptive_error: int) -> None:
    assume(0 < hop + hop_error <= LOW)
    wrong = FrameLaw(hop + hop_error, receptive + receptive_error)
    truth = counted(hop, receptive)
    assume(any(truth(samples) != wrong.frames(samples) for samples in range(LOW, HIGH + 1)))
    assert not law_holds(wrong, truth, LOW, HIGH)


@pytest.mark.parametrize(
    "frames",
    [
        lambda n: 50,
        lambda n: 0,
        lambda n: max(0, 100 - n // 1000),
        lambda n: (n - 400) // 160 + 1 + (n - 400) // 211 + 1,
        lambda n: 4 * math.ceil(n / 640),
    ],
    ids=["constant", "none", "falling", "two strides", "four at a time"],
)
def test_what_follows_no_law_gets_none(frames: Callable[[int], int]) -> None:
    assert fit_frame_law(frames, LOW, HIGH) is None


def test_a_curve_with_two_fitting_jumps_is_no_law() -> None:
    law = fit_frame_law(math.isqrt, LOW, HIGH)
    assert law is not None
    assert not law_holds(law, math.isqrt, LOW, HIGH)


# ---------------------------------------------------------------- symbolic dimensions


@st.composite
def expressions(draw: st.DrawFn, depth: int = 3) -> str:
    if depth == 0 or draw(st.booleans()):
        return draw(st.sampled_from(["samples", "samples", str(draw(st.integers(0, 999)))]))
    inner = expressions(depth - 1)
    form = draw(st.sampled_from(["({} + {})", "({}-{})", "{} * {}", "({}//{})", "({} / {})", "min({}, {})", "max({},{})"]))
    single = draw(st.sampled_from(["floor({})", "ceil({})", "-({})"]))
    if draw(st.booleans()):
        return form.format(draw(inner), draw(inner))
    return single.format(draw(inner))


@given(expressions(), st.integers(1, 10**6))
@example("((samples - 400)//160) + 1", 16_000)
@example("floor(samples/320 - 1/2) + 1", 16_159)
@example("-samples//7", 5)
@example("16000*samples//(samples - 48001)", 48_001)
def test_the_grammar_is_plain_arithmetic(expression: str, samples: int) -> None:
    assume(len(expression) <= 300 and "samples" in expression)
    names = {"__builtins__": {}, "floor": math.floor, "ceil": math.ceil, "min": min, "max": max}
    try:
        eval(expression, names, {"samples": 16_000})
    except ZeroDivisionError:
        assert frames_of_dimension(expression, "samples") is None
        return
    try:
        expected = math.floor(eval(expression, names, {"samples": samples}))
    except ZeroDivisionError:
        expected = 0
    frames = frames_of_dimension(expression, "samples")
    assert frames is not None
    assert frames(samples) == expected


@pytest.mark.parametrize("name", ["samples", "n", "sequence_length", "T"])
def test_the_samples_axis_may_have_any_name(name: str) -> None:
    frames = frames_of_dimension(f" {name}//160 + 1 ", name)
    assert frames is not None
    assert frames(16_000) == 101


HOSTILE = [
    "",
    "frames",
    "samples.real",
    "samples**2",
    "2**999999999",
    "samples + 2**999999999",
    "samples << 9",
    "samples % 160",
    "samples + frames",
    "samples + 0.5",
    "samples + 1j",
    "samples + True",
    "samples + 'a'",
    "samples + (1, 2)",
    "samples if samples else 0",
    "samples or 1",
    "samples == 1",
    "samples(1)",
    "[samples for samples in samples]",
    "(lambda: samples)()",
    "(samples := 1)",
    "f'{samples}'",
    "samples[0]",
    "__import__('os').system('touch hacked')",
    "samples + __import__('os').getpid()",
    "floor(samples, key=1)",
    "floor(*samples)",
    "min(samples)",
    "floor(samples, samples)",
    "floor()+samples",
    "floor + samples",
    "print(samples)",
    "abs(samples)",
    "samples/0",
    "samples//(samples - 16000)",
    "samples + 9**9",
    "samples; samples",
    "samples\n+1\nimport os",
    "samples\0",
    "samples + \ud800",
    "(" * 149 + "samples" + ")" * 10,
    "-" * 290 + "samples )",
    "samples" + "+1" * 1000,
    "samples*" * 40 + "1" * 300,
    "1e999 * samples",
]


@pytest.mark.parametrize("expression", HOSTILE)
def test_anything_else_is_no_law_and_never_run(expression: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("eval", "exec", "compile"):
        monkeypatch.setattr(contract, name, lambda *_: pytest.fail("Python was asked to run it"), raising=False)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", SyntaxWarning)
        assert frames_of_dimension(expression, "samples") is None
    assert not list(tmp_path.iterdir())


def test_numbers_that_grow_are_met_quickly() -> None:
    deep = "*".join(["samples"] * 30)
    frames = frames_of_dimension(deep, "samples")
    assert frames is not None
    assert frames(3) == 3**30
    assert frames_of_dimension("(" * 90 + "samples" + "//1)" * 40, "samples") is None
    divided = frames_of_dimension(f"{deep}*{deep} // 1 / 7", "samples")  # too large for a float only later on
    assert divided is None or divided(2**31) == 0


@given(st.text(max_size=40))
def test_any_text_at_all(text: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        frames = frames_of_dimension(text, "samples")
    assert frames is None or isinstance(frames(random.Random(0).randrange(10**6)), int)
