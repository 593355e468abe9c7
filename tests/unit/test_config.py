"""Configurations: what is wrong is named with its key, and with the nearest one that is right."""

from pathlib import Path

import pytest
import yaml

from actors.errors import ConfigError
from orchestrator.config import RunConfig, load_config, parse_config

CONF = Path(__file__).parents[2] / "conf"
RECIPES = [*CONF.glob("*.yaml"), *CONF.glob("model/*.yaml")]


def test_overlays_merge_left_to_right_and_the_dotlist_comes_last(tmp_path: Path) -> None:
    first, second = tmp_path / "first.yaml", tmp_path / "second.yml"
    first.write_text("name: first\ntrain:\n  steps: 1\n  eval_every: 1\n")
    second.write_text("train: {steps: 2, eval_every: 2}\n")
    config = load_config([str(first), "train.eval_every=3", str(second)])
    assert (config.name, config.train.steps, config.train.eval_every) == ("first", 2, 3)


def test_the_resolved_yaml_gives_the_same_configuration_back() -> None:
    config = load_config(["plan.split=[2,2]", "fleet.region_prices={eu: 1.5}", "optim.lr=1e-3"])
    assert parse_config(config.yaml) == config
    assert parse_config(config.yaml).sha256 == config.sha256


def test_an_empty_overlay_changes_nothing(tmp_path: Path) -> None:
    (tmp_path / "empty.yaml").write_text("")
    assert load_config([str(tmp_path / "empty.yaml")]) == RunConfig()


@pytest.mark.parametrize(
    ("word", "named"),
    [
        ("trian.steps=3", r"trian: .*Did you mean .*'train'"),
        ("train.stesp=3", r"train\.stesp: .*Did you mean: 'steps'"),
        ("model.hiden_size=3", r"model\.hiden_size: .*'hidden_size'"),
        ("train.steps=abc", r"train\.steps: Value 'abc' .* Integer"),
        ("train.steps=1.5", r"train\.steps: Value '1\.5' .* Integer"),
        ("train.steps=", r"train\.steps: "),
        ("train=3", r"train=3: "),
        ("=3", r"=3: "),
        ("plan.split=[a]", r"plan\.split=\[a\]: Value could not be converted to Integer"),
        ("plan.schedule=fastest", r"plan\.schedule: .*'1f1b'"),
        ("fleet.region_prices={eu: x}", r"fleet\.region_prices\.eu: "),
        ("wire.forward=${nowhere}", r"wire\.forward is '\$\{nowhere\}': write the value itself"),
        ("wire.forward=q9", r"wire\.forward=q9 is no codec"),
        ("train.steps=[1", r"the value in 'train\.steps=\[1' is not YAML: line 2: "),
        ("train.steps={a: b", r"is not YAML"),
        ("x=${", r"x: "),
        ("optim.lr=.nan", r"optim\.lr is nan: set optim\.lr to a finite number"),
        ("fleet.region_prices={eu: .inf}", r"fleet\.region_prices\.eu is inf"),
        ("fleet.probe_bytes=4000001", r"fleet\.probe_bytes is 4000001, .*: set fleet\.probe_bytes to 4000000 or less"),
        ("batch.seq_len=0", r"batch\.seq_len is 0: set batch\.seq_len"),
        ("name=a b", r"the run's name is 'a b': set name="),
        ("demo", r"'demo' is neither a \*\.yaml file nor key=value"),
        ("nowhere.yaml", r"nowhere\.yaml cannot be read: No such file"),
    ],
)
def test_what_cannot_be_taken_is_named(word: str, named: str) -> None:
    with pytest.raises(ConfigError, match=named) as raised:
        load_config([word])
    assert raised.value.remedy
    assert "\n" not in raised.value.message


@pytest.mark.parametrize(
    ("content", "named"),
    [
        (b"train:\n  steps: [1\n", "is not YAML: line 3: "),
        (b"- train\n- steps\n", "incompatible container types"),
        (b"train\n", "Key 'train'|train: "),
        (b"\xff\xfe\x00", "is not YAML"),
        (b"train:\n  stesp: 3\n", r"train\.stesp: .*Did you mean: 'steps'"),
    ],
)
def test_a_bad_overlay_is_named_with_its_file(tmp_path: Path, content: bytes, named: str) -> None:
    path = tmp_path / "bad.yaml"
    path.write_bytes(content)
    with pytest.raises(ConfigError, match=rf"bad\.yaml.*({named})"):
        load_config([str(path)])


@pytest.mark.parametrize("path", RECIPES, ids=str)
def test_every_recipe_loads(path: Path) -> None:
    load_config([str(path)])


def test_a_saved_configuration_of_another_release_is_said_to_be_one() -> None:
    with pytest.raises(ConfigError, match=r"saved configuration .*: use the release"):
        parse_config(yaml.safe_dump({"train": {"later_key": 1}}))


def test_interpolation_is_refused_because_it_could_carry_a_secret(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("A_SECRET", "hunter2")
    with pytest.raises(ConfigError, match=r"data\.path is") as caught:
        load_config(["data.path=${oc.env:A_SECRET}"])
    assert "hunter2" not in str(caught.value)


def test_links_take_codecs_of_their_own_from_the_command_line() -> None:
    config = load_config(["wire.links.0-1=hq4/q8", "wire.links.2-3=none/bf16"])
    assert config.wire.links == {"0-1": "hq4/q8", "2-3": "none/bf16"}
    for word, named in (("wire.links.0-1=zip/q8", "the first of"), ("wire.links.0-1=q8/tk2", "the second of")):
        with pytest.raises(ConfigError, match=rf"{named} wire\.links\.0-1=.* is no codec"):
            load_config([word])
