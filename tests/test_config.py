from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from compress_search.config import StudyConfig
from compress_search.exceptions import ConfigError
from compress_search.recipe import FineTune
from compress_search.search.stop_when import StopWhen
from compress_search.search.variables import Choice, Range

Write = Callable[[str], Path]

MINIMAL = "name: small\ntask: own.py:make\ntarget: 0.5\n"


@pytest.fixture
def write(tmp_path: Path) -> Write:
    (tmp_path / "own.py").write_text("def make():\n    return None\n")

    def write(text: str) -> Path:
        path = tmp_path / "study.yaml"
        path.write_text(text)
        return path

    return write


def faults_of(path: Path, *overrides: str) -> tuple[str, ...]:
    with pytest.raises(ConfigError) as caught:
        StudyConfig.load(path, overrides)
    return caught.value.faults


def test_what_is_not_said_has_the_default(write: Write, tmp_path: Path) -> None:
    config = StudyConfig.load(write(MINIMAL))
    assert config.search.target == 0.5
    assert config.search.fine_tune == FineTune()
    assert config.search.final_fine_tune is None
    assert config.task == f"{tmp_path / 'own.py'}:make"


def test_settings_are_read_with_their_types(write: Write) -> None:
    text = "methods: [spatial_svd]\nmax_drop: 1e-2\nstep: .1\n"
    text += "fine_tune: {epochs: 3, lr: 1e-3, weight_decay: 0}\n"
    config = StudyConfig.load(write(MINIMAL + text))
    assert config.search.methods == ("spatial_svd",)
    assert config.search.fine_tune == FineTune(epochs=3, lr=0.001, weight_decay=0.0)
    assert isinstance(config.search.fine_tune.weight_decay, float)
    assert (config.max_drop, config.search.step) == (0.01, 0.1)


def test_a_range_chosen_methods_and_what_ends_a_study_are_read_saved_and_overridden(
    write: Write, tmp_path: Path
) -> None:
    text = "name: small\ntask: own.py:make\ntarget: [0.3, 0.8]\nstop_when: {max_drop: 0.01, mac_ratio: 0.5}\n"
    text += "methods: {choices: [spatial_svd+channel_pruning, channel_pruning]}\n"
    config = StudyConfig.load(write(text))
    assert config.search.target == (0.3, 0.8)
    assert config.stop_when == StopWhen(max_drop=0.01, mac_ratio=0.5)
    chosen = Choice(("spatial_svd+channel_pruning", "channel_pruning"))
    assert config.search.variables == {"methods": chosen}
    config.save(tmp_path / "config.yaml")
    assert StudyConfig.load(tmp_path / "config.yaml") == config
    changes = ["target=[0.2, 0.4]", "stop_when.mac_ratio=0.3"]
    changed = StudyConfig.load(tmp_path / "config.yaml", changes)
    assert changed.search.target == (0.2, 0.4)
    assert changed.stop_when == StopWhen(max_drop=0.01, mac_ratio=0.3)
    assert StudyConfig.load(tmp_path / "config.yaml", ["stop_when=null"]).stop_when is None


@pytest.mark.parametrize(
    ("override", "fault"),
    [
        ("stop_when.max_drop=little", "stop_when.max_drop is 'little'; it must be a number."),
        ("stop_when.mac_ratio=2", "stop_when.mac_ratio is 2.0; it must be in (0, 1], MACs kept / MACs, or"),
        ("stop_when.mac_ratio=0.4", "stop_when.mac_ratio is 0.4, but feasible candidates have 0.49 or more."),
        ("stop_when.accuracy=0.9", "stop_when.accuracy is not a known key;"),
        ("stop_when=soon", "stop_when is 'soon'; it must be a mapping"),
        ("target=[0.8, 0.3]", "target is [0.8, 0.3]; it must be the lowest ratio of a range and then"),
        ("target=[0.3, 0.5, 0.8]", "target is [0.3, 0.5, 0.8]; it must be a number or a list of 2 items."),
        ("target=[0.3, high]", "target is [0.3, 'high']; it must be a number or a list of 2 items."),
        ("target=[0.3, 1.2]", "target is [0.3, 1.2]; it must be in (0, 1)"),
    ],
)
def test_a_range_or_an_end_that_means_nothing_is_refused(write: Write, override: str, fault: str) -> None:
    (found,) = faults_of(write(MINIMAL), override)
    assert found.startswith(fault)


def test_channels_to_keep_are_read_saved_and_overridden(write: Write, tmp_path: Path) -> None:
    # A layer of a Sequential has a number for a name, which YAML reads as one.
    config = StudyConfig.load(write(MINIMAL + "keep_channels: {layer1.conv: [3, 0], 0: [1]}\n"))
    assert config.search.keep_channels == {"0": (1,), "layer1.conv": (0, 3)}
    config.save(tmp_path / "config.yaml")
    assert StudyConfig.load(tmp_path / "config.yaml") == config
    other = StudyConfig.load(tmp_path / "config.yaml", ["keep_channels={stem: [5]}"])
    assert other.search.keep_channels == {"stem": (5,)}


def test_a_grid_is_read_saved_and_overridden(write: Write, tmp_path: Path) -> None:
    config = StudyConfig.load(write(MINIMAL + "sampler: grid\ngrid: {c_ssvd: [1, .8], c_cp: [0.6]}\n"))
    assert config.search.grid == {"c_ssvd": (1.0, 0.8), "c_cp": (0.6,)}
    config.save(tmp_path / "config.yaml")
    assert StudyConfig.load(tmp_path / "config.yaml") == config
    other = StudyConfig.load(tmp_path / "config.yaml", ["grid={c_ssvd: [0.7]}"])
    assert other.search.grid == {"c_ssvd": (0.7,)}
    assert faults_of(write(MINIMAL + "sampler: grid\ngrid: {c_ssvd: 0.8}\n"))[0] == (
        "grid.c_ssvd is 0.8; it must be a list."
    )


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ("keep_channels: [stem]", "keep_channels is ['stem']; it must be a mapping."),
        ("keep_channels: {stem: 3}", "keep_channels.stem is 3; it must be a list."),
        ("keep_channels: {stem: [0, a]}", "keep_channels.stem[1] is 'a'; it must be a whole number."),
    ],
)
def test_channels_to_keep_of_another_shape_are_refused(write: Write, text: str, fault: str) -> None:
    assert faults_of(write(MINIMAL + text)) == (fault,)


def test_the_final_fine_tuning_inherits_what_it_does_not_say(write: Write) -> None:
    text = "fine_tune: {epochs: 3, lr: 0.01}\nfinal_fine_tune: {epochs: 8}\n"
    config = StudyConfig.load(write(MINIMAL + text))
    assert config.search.final_fine_tune == FineTune(epochs=8, lr=0.01)


def test_training_after_each_layer_is_read_saved_and_overridden(write: Write, tmp_path: Path) -> None:
    path = write(MINIMAL + "fine_tune: {epochs: 3, lr: 0.01}\nper_layer_fine_tune: {epochs: 1}\n")
    config = StudyConfig.load(path)
    assert config.search.per_layer_fine_tune == FineTune(epochs=1, lr=0.01)
    config.save(tmp_path / "config.yaml")
    assert StudyConfig.load(tmp_path / "config.yaml") == config
    other = StudyConfig.load(tmp_path / "config.yaml", ["per_layer_fine_tune.lr=1e-3"])
    assert other.search.per_layer_fine_tune == FineTune(epochs=1, lr=0.001)
    assert StudyConfig.load(path, ["per_layer_fine_tune=null"]).search.per_layer_fine_tune is None
    assert StudyConfig.load(write(MINIMAL)).search.per_layer_fine_tune is None


def test_faults_of_the_training_after_each_layer_come_together(write: Write) -> None:
    text = "per_layer_fine_tune: {epoch: 1, lr: -1}\nper_layer_finetune: {epochs: 1}\n"
    assert faults_of(write(MINIMAL + text)) == (
        "per_layer_finetune is not a known key; did you mean per_layer_fine_tune?",
        "per_layer_fine_tune.epoch is not a known key; did you mean per_layer_fine_tune.epochs?",
        "per_layer_fine_tune.lr is -1.0; it must be a positive number.",
    )
    assert faults_of(write(MINIMAL + "per_layer_fine_tune: 3\n")) == (
        "per_layer_fine_tune is 3; it must be a mapping or null.",
    )


def test_what_is_searched_stands_in_the_place_of_a_value_or_in_variables(
    write: Write, tmp_path: Path
) -> None:
    inline = "selection: {choices: [optimal, uniform]}\nsamples: {low: 64, high: 512, step: 64}\n"
    inline += "fine_tune: {epochs: 3, lr: {low: 1e-4, high: 0.1, log: true}}\n"
    inline += "final_fine_tune: {temperature: {choices: [2, 4]}}\n"
    config = StudyConfig.load(write(MINIMAL + inline))
    assert config.search.variables == {
        "selection": Choice(("optimal", "uniform")),
        "samples": Range(64, 512, step=64),
        "fine_tune.lr": Range(1e-4, 0.1, log=True),
        "final_fine_tune.temperature": Choice((2, 4)),
    }
    # What is not searched is as it is said, or the default; a training of which all is searched has no rest.
    assert (config.search.selection, config.search.fine_tune) == ("optimal", FineTune(epochs=3))
    assert config.search.final_fine_tune is None
    named = "fine_tune: {epochs: 3}\nvariables:\n  fine_tune.lr: {low: 1e-4, high: 0.1, log: true}\n"
    named += "  selection: {choices: [optimal, uniform]}\n  samples: {low: 64, high: 512, step: 64}\n"
    named += "  final_fine_tune.temperature: {choices: [2, 4]}\n"
    assert StudyConfig.load(write(MINIMAL + named)) == config
    config.save(tmp_path / "config.yaml")
    assert StudyConfig.load(tmp_path / "config.yaml") == config


def test_overrides_start_and_end_a_search(write: Write) -> None:
    path = write(MINIMAL + "fine_tune: {lr: {low: 1e-4, high: 0.1}}\n")
    assert StudyConfig.load(path, ["fine_tune.lr=0.01"]).search.variables == {}
    searched = StudyConfig.load(path, ["fine_tune.lr.low=1e-3", "round_to={choices: [1, 8]}"]).search
    assert searched.variables == {"fine_tune.lr": Range(0.001, 0.1), "round_to": Choice((1, 8))}


def test_the_final_fine_tuning_inherits_no_search(write: Write) -> None:
    text = "fine_tune: {epochs: 3, lr: {low: 1e-4, high: 0.1}}\nfinal_fine_tune: {momentum: 0.8}\n"
    search = StudyConfig.load(write(MINIMAL + text)).search
    assert search.final_fine_tune == FineTune(epochs=3, momentum=0.8)
    assert list(search.variables) == ["fine_tune.lr"]


def test_all_faults_of_what_is_searched_come_together(write: Write) -> None:
    text = "fine_tune: {lr: {lwo: 1, high: 0.1}, epochs: {low: a, high: 3}, lrr: {low: 1, high: 2}}\n"
    text += "selection: {choices: optimal}\nsamples: {low: 64, high: 8}\ntarget: {low: 0.3, high: 0.5}\n"
    text += "variables: {samples: {low: 1, high: 2}, probes: 3}\nstep: 7\n"
    text += "per_layer_fine_tune: {epochs: {low: 1, high: 2}}\n"
    assert faults_of(write("name: small\ntask: own.py:make\n" + text)) == (
        "samples has what it is searched over twice, there and in variables. Remove one.",
        "probes is 3; it must be a mapping.",
        "selection.choices is 'optimal'; it must be a list.",
        "fine_tune.lr.lwo is not a known key; did you mean fine_tune.lr.low?",
        "fine_tune.lr.low is missing.",
        "fine_tune.epochs.low is 'a'; it must be a number.",
        "target is {'low': 0.3, 'high': 0.5}; it must be a number or a list of 2 items.",
        "per_layer_fine_tune.epochs is {'low': 1, 'high': 2}; it must be a whole number.",
        "step is 7.0; it must be in (0, 1), for example 0.05.",
        "samples has low 64 and high 8; low must be less than high.",
        "variables names 'fine_tune.lrr', which is no setting that can be searched. "
        "Did you mean 'fine_tune.lr'?",
    )


def test_overrides_are_stronger_than_the_file(write: Write) -> None:
    path = write(MINIMAL + "fine_tune: {epochs: 3, lr: 0.01}\n")
    config = StudyConfig.load(
        path, ["target=0.4", "fine_tune.epochs=5", "final_fine_tune.epochs=9", "methods=[channel_pruning]"]
    )
    assert config.search.target == 0.4
    assert config.search.fine_tune == FineTune(epochs=5, lr=0.01)
    assert config.search.final_fine_tune == FineTune(epochs=9, lr=0.01)
    assert config.search.methods == ("channel_pruning",)


PRESETS = """
n_trials: 9
fine_tune: {epochs: 3, lr: 0.5}
presets:
  quick:
    name: small-quick
    n_trials: 1
    fine_tune: {epochs: 1}
  plain: {}
"""


def test_a_preset_is_stronger_than_the_file_and_weaker_than_overrides(write: Write, tmp_path: Path) -> None:
    path = write(MINIMAL + PRESETS)
    quick = StudyConfig.load(path, ["n_trials=2"], preset="quick")
    assert (quick.name, quick.n_trials) == ("small-quick", 2)
    assert quick.search.fine_tune == FineTune(epochs=1, lr=0.5)
    assert StudyConfig.load(path, preset="plain") == StudyConfig.load(path)
    quick.save(tmp_path / "saved.yaml")
    assert StudyConfig.load(tmp_path / "saved.yaml") == quick


@pytest.mark.parametrize(
    ("presets", "fault"),
    [
        (PRESETS, "There is no preset 'slow'. The file has: quick, plain."),
        ("", "There is no preset 'slow'. The file has: none."),
        ("presets: [quick]\n", "presets is ['quick']; it must hold a mapping"),
        ("presets: {slow: 3}\n", "presets is {'slow': 3}; it must hold a mapping"),
        ("presets: {slow: {n_trials: 0}}\n", "n_trials is 0; it must be 1 or more."),
    ],
)
def test_what_is_wrong_with_a_preset_is_told(write: Write, presets: str, fault: str) -> None:
    with pytest.raises(ConfigError) as caught:
        StudyConfig.load(write(MINIMAL + presets), preset="slow")
    assert caught.value.faults[0].startswith(fault)


def test_task_arguments_pass_through(write: Write) -> None:
    config = StudyConfig.load(write(MINIMAL + "task_args: {width: 16}\n"), ["task_args.rate=1e-2"])
    assert config.task_args == {"width": 16, "rate": 0.01}


def test_all_faults_are_reported_together(write: Write) -> None:
    text = (
        "name: a/b\ntask: gone.py:make\ntarget: 1.5\ntolerence: 0.1\nn_trials: many\nmax_drop: .nan\n"
        "fine_tune: {epoch: 3, lr: -1, momentum: '0.9'}\nmethods: [spatial_sdv]\nsampler: 3\n"
    )
    faults = "\n".join(faults_of(write(text), "seed", "device=warp"))
    for fault in (
        "'seed' does not read key=value; write, for example, fine_tune.epochs=3.",
        "tolerence is not a known key; did you mean tolerance?",
        "fine_tune.epoch is not a known key; did you mean fine_tune.epochs?",
        "fine_tune.lr is -1.0; it must be a positive number.",
        "fine_tune.momentum is '0.9'; it must be a number. Remove the quotes.",
        "sampler is 3; it must be a text.",
        "target is 1.5; it must be in (0, 1)",
        "methods names 'spatial_sdv', which does not exist. Did you mean 'spatial_svd'?",
        "n_trials is 'many'; it must be a whole number.",
        "The study's name is 'a/b'; it names a folder of the workspace",
        "max_drop is nan; it must be a number",
        "device is 'warp'; write, for example, cpu",
        "there is no file",
    ):
        assert fault in faults


def test_missing_keys_are_named(write: Write) -> None:
    assert faults_of(write("tolerance: 0.05\n")) == (
        "target is missing.",
        "name is missing.",
        "task is missing.",
    )


def test_a_missing_target_does_not_hide_other_faults(write: Write) -> None:
    faults = faults_of(write("name: small\ntask: own.py:make\nstep: 7\n"))
    assert faults[0] == "target is missing."
    assert faults[1].startswith("step is 7")


@pytest.mark.parametrize(
    "target", ["0", "1", "-0.3", "1.2", ".nan", ".inf", "true", "'0.5'", "[0.3]", "null"]
)
def test_a_target_outside_0_1_is_refused(write: Write, target: str) -> None:
    faults = faults_of(write(MINIMAL), f"target={target}")
    assert any(fault.startswith("target is") for fault in faults)


@pytest.mark.parametrize("tolerance", ["0", "-0.1", "1.0", "5"])
def test_a_tolerance_without_room_is_refused(write: Write, tolerance: str) -> None:
    assert "tolerance is" in faults_of(write(MINIMAL), f"tolerance={tolerance}")[0]


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ("name: small\ntarget: [0.5\ntask: x", "line 3, column 5"),
        ("name: small\nname: other\n", "line 2, column 1: the key 'name' is given twice."),
        ("just words", "It holds 'just words'; it must hold lines of key: value."),
        ("", "It holds None; it must hold lines of key: value."),
        ("name: &a [*a, *b]", "line 1, column 15"),
    ],
)
def test_what_is_not_a_yaml_mapping_is_refused(write: Write, text: str, fault: str) -> None:
    assert fault in faults_of(write(text))[0]


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    assert "No such file or directory" in faults_of(tmp_path / "study.yaml")[0]


def test_an_override_that_is_not_yaml_is_named(write: Write) -> None:
    assert faults_of(write(MINIMAL), "methods=[a")[0].startswith("'methods=[a': line 1")


def test_a_storage_that_is_not_a_url_is_not_shown(write: Write) -> None:
    faults = faults_of(write(MINIMAL), "storage=me:secret@host")
    assert faults[0].startswith("storage is not the URL of a database")
    assert "secret" not in faults[0]


def test_a_saved_configuration_reads_the_same_from_elsewhere(
    write: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = "fine_tune: {epochs: 3, lr: 1e-5}\nstorage: sqlite:///own.db\ntask_args: {width: 16, name: 'é'}\n"
    config = StudyConfig.load(write(MINIMAL + text))
    config.save(tmp_path / "runs" / "small" / "config.yaml")
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert StudyConfig.load(tmp_path / "runs" / "small" / "config.yaml") == config


@pytest.mark.parametrize(
    "url",
    [
        "postgresql+psycopg://me:s%40cret@host/db?connect_timeout=5",
        "postgresql+psycopg://me@host/db?connect_timeout=5&password=s%40cret",
    ],
)
def test_a_password_is_not_saved(write: Write, tmp_path: Path, url: str) -> None:
    StudyConfig.load(write(MINIMAL + f"storage: {url}")).save(tmp_path / "config.yaml")
    saved = yaml.safe_load((tmp_path / "config.yaml").read_text())["storage"]
    assert saved == "postgresql+psycopg://me@host/db?connect_timeout=5"


def test_a_saved_configuration_has_every_value(write: Write, tmp_path: Path) -> None:
    config = StudyConfig.load(write(MINIMAL))
    config.save(tmp_path / "config.yaml")
    text = (tmp_path / "config.yaml").read_text()
    assert text.startswith("# compress-search resume ")
    assert yaml.safe_load(text)["fine_tune"]["temperature"] == FineTune().temperature
    assert yaml.safe_load(text)["tolerance"] == config.search.tolerance


def test_the_workspace_is_relative_to_the_current_folder(
    write: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    assert StudyConfig.load(write(MINIMAL)).workspace == tmp_path / "here" / "runs"


def test_the_workspace_can_come_from_the_environment(
    write: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COMPRESS_SEARCH_WORKSPACE", str(tmp_path / "mine"))
    assert StudyConfig.load(write(MINIMAL)).workspace == tmp_path / "mine"
    assert StudyConfig.load(write(MINIMAL), [f"workspace={tmp_path}"]).workspace == tmp_path


@pytest.mark.parametrize("name", ["stages", "teacher", "study.db", "../up", "", ".hidden", "a b"])
def test_a_name_that_is_no_folder_of_its_own_is_refused(write: Write, name: str) -> None:
    assert faults_of(write(MINIMAL), f"name='{name}'")[0].startswith(f"The study's name is {name!r}")


@pytest.mark.parametrize("key", ["? [a, b]\n: 1", "? {a: b}\n: 1"])
def test_a_list_or_a_mapping_is_no_key_and_its_line_is_told(write: Write, key: str) -> None:
    (fault,) = faults_of(write(f"{MINIMAL}\n{key}\n"))
    assert "found unhashable key" in fault and fault.startswith("line ")
