"""Recipes, their changes, their reasons and their fingerprints."""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Any

import pydantic
import pytest

from melfold.artefacts import differences
from melfold.config import LogMelConfig, Recipe, View
from melfold.errors import MelfoldError
from melfold.files import Home, write_json
from melfold.recipe_text import compare_recipes, recipe_keys, recipe_toml
from melfold.recipes import change_recipe, explain_recipe, load_recipe, parse_recipe, recipe_names

OTHER_LOGMEL: dict[str, Any] = {
    "sr": 48_000,
    "n_fft": 1024,
    "hop_length": 512,
    "n_mels": 64,
    "fmin": 50.0,
    "fmax": 16_000.0,
    "window": "hamming",
    "norm": None,
    "htk": True,
    "top_db": 100.0,
}


@pytest.mark.parametrize("name", recipe_names())
def test_every_shipped_recipe_loads_and_survives_being_saved(name: str) -> None:
    recipe = load_recipe(name)
    assert recipe.name == name
    assert recipe.about
    again = parse_recipe(recipe.model_dump(mode="json"), "saved")
    assert again == recipe
    assert again.fingerprint() == recipe.fingerprint()


@pytest.mark.parametrize("name", recipe_names())
def test_every_key_of_a_shipped_recipe_has_a_reason(name: str) -> None:
    explained = explain_recipe(name)
    without = {key for key, (_, reason) in explained.items() if not reason}
    assert without - {"phases.0"} == {"about"}, "phases.0 sets nothing: it is as in `train`"


def test_the_tracks_tell_the_rules_from_the_rest() -> None:
    tracks = {name: load_recipe(name).track for name in recipe_names()}
    assert (tracks["scratch"], tracks["demo"]) == ("scratch", "scratch")
    assert (tracks["open"], tracks["article"]) == ("open", "open")
    assert load_recipe("scratch", ["model.weights=file:w.safetensors"]).track == "open"


def test_a_recipe_file_is_a_delta_on_its_base(tmp_path: Path) -> None:
    path = tmp_path / "mine.toml"
    path.write_text('base = "scratch"\n[train]\nlr = 2e-3  # twice as fast\n')
    recipe = load_recipe(str(path))
    assert recipe.name == "mine"
    assert differences(load_recipe("scratch").training(), recipe.training()) == ["train.lr: 0.001 -> 0.002"]
    assert explain_recipe(str(path))["train.lr"] == (2e-3, "twice as fast")


@pytest.mark.parametrize("name", recipe_names())
def test_a_recipe_written_as_toml_loads_as_the_same_recipe(name: str, tmp_path: Path) -> None:
    recipe = load_recipe(name)
    text = recipe_toml(recipe, {key: reason for key, (_, reason) in explain_recipe(name).items()})
    (tmp_path / f"{name}.toml").write_text(text)
    assert load_recipe(str(tmp_path / f"{name}.toml")) == recipe
    given, written = explain_recipe(name), explain_recipe(str(tmp_path / f"{name}.toml"))
    assert {key: written[key][1] for key in given if key != "data.exclude"} == {
        key: reason for key, (_, reason) in given.items() if key != "data.exclude"
    }


def test_toml_keeps_what_is_hard_to_write(tmp_path: Path) -> None:
    sets = ["logmel.norm=none", 'model.kwargs={a="x\\"#\\n\\u007f é", b=[1, 2.5], c={d=true}, "e f"=-1}', "train.lr_min=1e-12"]
    recipe = load_recipe("base", [*sets, "data.exclude.'x.wav'='a # \" b'", "predict.shift_seconds=[-0.25, 0]"])
    corrected = {"data": recipe.model_dump(mode="json")["data"] | {"corrections": {"y.wav": {"labels": ["A", "B"], "why": "c"}}}}
    recipe = parse_recipe(recipe.model_dump(mode="json") | corrected, "test")
    assert recipe.logmel.norm is None
    (tmp_path / "base.toml").write_text(recipe_toml(recipe, {}))
    assert load_recipe(str(tmp_path / "base.toml")) == recipe


def test_the_quick_recipes_are_the_measured_runs() -> None:
    """The settings of the runs S6 and O3 of the tables of measured scores."""
    common = ["logmel.n_mels=64", "train.batch_size=16", "train.crop_seconds=4", "train.ema_decay=0.99", "augment.freq_masks=1"]
    common += ["augment.time_masks=1", "train.validate_every=0", "model.drop_path_rate=0", "train.clips=curated", "phases=[]"]
    s6 = ["logmel.hop_length=1323", "train.epochs=160", "train.lr=2e-3", "train.warmup_epochs=3", "augment.mixup_prob=0.3"]
    s6 += ["model.kwargs={channels=[32, 64, 128, 256]}"]
    quick = load_recipe("quick")
    assert differences(load_recipe("small", [*common, *s6]).training(), quick.training()) == []
    lite0 = ["model.name=tf_efficientnet_lite0", "train.lr=1e-3", "train.layer_decay=1", "train.warmup_epochs=1"]
    o3 = ["logmel.hop_length=661", "train.epochs=40", "augment.mixup_prob=0.5", "model.weights=hub", "model.head=linear"]
    pretrained = load_recipe("quick_pretrained")
    assert differences(load_recipe("open", [*common, *lite0, *o3]).training(), pretrained.training()) == []
    assert (quick.track, pretrained.track) == ("scratch", "open")


def test_the_recipe_of_a_run_is_the_saved_one_and_a_shipped_name_wins(tmp_path: Path) -> None:
    home = Home(tmp_path)
    saved = load_recipe("demo", ["train.lr=0.5", "data.exclude.'x.wav'=silent"])
    for name in ("mine", "open"):
        write_json(home.runs / name / "recipe.json", saved.model_dump(mode="json"))
    found = load_recipe("mine", ["seed=3"], home)
    assert found == saved.model_copy(update={"name": "mine", "seed": 3})
    assert load_recipe("open", home=home) == load_recipe("open")
    (tmp_path / "more.toml").write_text('base = "mine"\n[train]\nlr = 0.25\n')
    assert load_recipe(str(tmp_path / "more.toml"), home=home).train.lr == 0.25
    with pytest.raises(MelfoldError, match=r"unknown recipe: 'other' .*; and there is no such run in .*runs. Known: .*open"):
        load_recipe("other", home=home)


def test_a_loaded_recipe_can_be_changed() -> None:
    recipe = load_recipe("demo")
    changed = change_recipe(recipe, ["predict.shift_seconds=[0, 0.25]"])
    assert changed.predict.shift_seconds == (0, 0.25)
    assert changed.training() == recipe.training()
    with pytest.raises(MelfoldError, match=r"unknown key: predict\.shift "):
        change_recipe(recipe, ["predict.shift=1"])


def test_every_key_is_explained_with_its_values_and_default() -> None:
    keys = {key.name: key for key in recipe_keys()}
    dumped = Recipe(name="x").model_dump(mode="json", exclude={"name"})
    settings = {f"{k}.{inner}" for k, v in dumped.items() if isinstance(v, dict) for inner in v} | {"about", "seed", "phases"}
    assert keys.keys() == settings
    assert [key.name for key in keys.values() if not key.meaning.endswith((".", "?"))] == []
    assert keys["train.loss"].allowed == "bce | focal | asl | lsep | lsep_bce"
    assert keys["train.layer_decay"].allowed == "number, > 0, <= 1"
    assert keys["logmel.norm"].allowed == "slaney | none"
    assert keys["predict.shift_seconds"].allowed == "list of number"
    for key in keys.values():
        section, _, inner = key.name.rpartition(".")
        default = tomllib.loads(f"v = {key.default}")["v"]
        plain = dumped[section][inner] if section else dumped[key.name]
        assert default == plain


def test_a_hash_sign_in_a_value_is_no_reason(tmp_path: Path) -> None:
    path = tmp_path / "mine.toml"
    path.write_text('[model]\nname = "a#b"  # why # indeed\nweights = "none"\n')
    assert explain_recipe(str(path)) == {"model.name": ("a#b", "why # indeed"), "model.weights": ("none", "")}


@pytest.mark.parametrize(
    ("item", "nearest"),
    [
        ("train.epoch=3", "train.epochs"),
        ("logmel.hop=3", "logmel.hop_length"),
        ("sede=3", "seed"),
        ("trian.lr=3", "train.lr"),
        ("agument.mixup_prob=3", "augment."),
    ],
)
def test_an_unknown_key_is_refused_and_the_nearest_named(item: str, nearest: str) -> None:
    with pytest.raises(MelfoldError, match="unknown key") as caught:
        load_recipe("base", [item])
    assert f"(nearest: {nearest}" in str(caught.value)


def test_an_unknown_key_in_a_file_is_refused_too(tmp_path: Path) -> None:
    (tmp_path / "r.toml").write_text("[train]\nepochs = 3\nwarmup = 2\n")
    with pytest.raises(MelfoldError, match=r"unknown key: train.warmup \(nearest: train.warmup_epochs\)"):
        load_recipe(str(tmp_path / "r.toml"))


def test_every_value_that_does_not_fit_gets_its_own_line() -> None:
    with pytest.raises(MelfoldError) as caught:
        load_recipe("base", ["train.lr=-1", "train.epochs=many", "model.weights=hubb", "logmel.fmax=40000"])
    lines = caught.value.lines
    assert len(lines) == 4
    for part, line in zip(("logmel", "model.weights", "train.epochs", "train.lr"), sorted(lines), strict=True):
        assert f": {part}:" in line
    assert "found -1" in str(caught.value)
    assert "found 'many'" in str(caught.value)


@pytest.mark.parametrize(
    ("item", "path", "value"),
    [
        ("train.epochs=2", "train.epochs", 2),
        ("train.lr=3e-4", "train.lr", 3e-4),
        ("model.frozen=true", "model.frozen", True),
        ("model.name=resnet18", "model.name", "resnet18"),
        ('model.name="resnet18"', "model.name", "resnet18"),
        ("model.weights=file:/x y/w=1.safetensors", "model.weights", "file:/x y/w=1.safetensors"),
        ("predict.shift_seconds=[0.0, 0.5]", "predict.shift_seconds", (0.0, 0.5)),
        ("seed=7", "seed", 7),
        ("folds.groups=none", "folds.groups", "none"),
    ],
)
def test_set_takes_toml_values_or_plain_words(item: str, path: str, value: Any) -> None:
    found: Any = load_recipe("base", [item])
    for part in path.split("."):
        found = getattr(found, part)
    assert found == value


def test_set_reaches_into_the_models_keyword_arguments_and_keeps_the_others() -> None:
    before = load_recipe("scratch").model.kwargs
    after = load_recipe("scratch", ["model.kwargs.depths=[1, 1, 2, 1]", "model.kwargs.conv_mlp=false"]).model.kwargs
    assert after == {**before, "depths": [1, 1, 2, 1], "conv_mlp": False}
    assert load_recipe("scratch").model.kwargs == before


@pytest.mark.parametrize(
    "item",
    ["data.exclude.0a1b2c3d.wav=too short", "data.exclude.'0a1b2c3d.wav'='too short'", 'data.exclude."0a1b2c3d.wav"=too short'],
)
def test_set_leaves_out_a_clip_and_keeps_the_others_with_or_without_quotes(item: str, tmp_path: Path) -> None:
    path = tmp_path / "mine.toml"
    path.write_text('base = "scratch"\n[data.exclude]\n"ffffffff.wav" = "silent"\n')
    assert load_recipe(str(path), [item]).data.exclude == {"ffffffff.wav": "silent", "0a1b2c3d.wav": "too short"}


@pytest.mark.parametrize("item", ["train.lr", "=3", " =3"])
def test_set_without_key_or_value_is_refused(item: str) -> None:
    with pytest.raises(MelfoldError, match=r"--set needs section\.key=value"):
        load_recipe("base", [item])


def test_the_last_set_wins() -> None:
    assert load_recipe("base", ["train.epochs=2", "train.epochs=3"]).train.epochs == 3


@pytest.mark.parametrize(
    ("name", "said"), [("scrach", "nearest: scratch"), ("Base", "nearest: base"), ("nowhere.toml", "cannot read a recipe")]
)
def test_an_unknown_recipe_is_refused(name: str, said: str) -> None:
    with pytest.raises(MelfoldError, match=said):
        load_recipe(name)


def test_a_recipe_that_is_not_toml_is_reported(tmp_path: Path) -> None:
    (tmp_path / "bad.toml").write_text("[train\n")
    with pytest.raises(MelfoldError, match=r"bad\.toml is not TOML"):
        load_recipe(str(tmp_path / "bad.toml"))


def test_recipes_that_are_based_on_each_other_are_refused(tmp_path: Path) -> None:
    for one, other in (("a", "b"), ("b", "a")):
        (tmp_path / f"{one}.toml").write_text(f'base = "{tmp_path / other}.toml"\n')
    with pytest.raises(MelfoldError, match="base"):
        load_recipe(str(tmp_path / "a.toml"))


def test_configurations_are_frozen_and_refuse_infinity() -> None:
    with pytest.raises(pydantic.ValidationError, match="frozen"):
        LogMelConfig().sr = 1  # type: ignore[misc]
    with pytest.raises(MelfoldError, match=r"train\.lr"):
        load_recipe("base", ["train.lr=inf"])


def test_other_values_stand_here_for_every_front_end_field() -> None:
    assert OTHER_LOGMEL.keys() == LogMelConfig.model_fields.keys()


@pytest.mark.parametrize("field", OTHER_LOGMEL)
def test_the_cache_fingerprint_changes_with_every_field(field: str) -> None:
    base = LogMelConfig()
    other = LogMelConfig(**{field: OTHER_LOGMEL[field]})
    assert other.fingerprint() != base.fingerprint()
    assert LogMelConfig(**other.model_dump()).fingerprint() == other.fingerprint()


def test_the_cache_fingerprint_changes_with_the_version(monkeypatch: pytest.MonkeyPatch) -> None:
    before = LogMelConfig().fingerprint()
    monkeypatch.setattr("melfold.config.CACHE_VERSION", 999)
    assert LogMelConfig().fingerprint() != before


def test_the_recipe_fingerprint_sees_values_and_not_names() -> None:
    base = Recipe(name="a")
    assert Recipe(name="b", about="other words").fingerprint() == base.fingerprint()
    for change in ({"seed": 1}, {"train": {"lr": 2e-3}}, {"model": {"kwargs": {"x": 1}}}, {"data": {"exclude": {"a.wav": "b"}}}):
        assert parse_recipe({"name": "a", **change}, "test").fingerprint() != base.fingerprint()


def test_differences_name_each_changed_value_and_nothing_else() -> None:
    base = load_recipe("base")
    assert differences(base.training(), base.model_copy(update={"name": "x", "about": "y"}).training()) == []
    other = load_recipe("base", ["seed=3", "train.epochs=2", "model.kwargs.x=1"])
    assert differences(base.training(), other.training()) == [
        "seed: 0 -> 3",
        "model.kwargs.x: none -> 1",
        "train.epochs: 30.0 -> 2.0",
    ]


def test_seconds_become_the_nearest_frames_and_never_none() -> None:
    recipe = load_recipe("base", ["train.crop_seconds=1.28", "predict.window_seconds=2.0", "predict.shift_seconds=[0, 0.5]"])
    assert (recipe.crop_frames, recipe.views) == (128, (View(200, 0, "wrap"), View(200, 50, "wrap")))
    assert recipe.frames(1e-6) == 1
    assert load_recipe("base", ["train.crop_seconds=1.28"]).views[0].length == 128


def test_views_are_every_length_with_every_padding_at_every_shift_the_first_of_each_first() -> None:
    sets = ["train.crop_seconds=1", "predict.window_seconds=[2, 1]", "predict.shift_seconds=[0, 0.5]"]
    views = load_recipe("base", [*sets, 'predict.pads=["wrap", "floor"]']).views
    assert len(views) == len(set(views)) == 8
    assert views[:3] == (View(200, 0, "wrap"), View(200, 0, "floor"), View(100, 0, "wrap"))
    assert {view.shift for view in views[:4]} == {0}
    assert load_recipe("base", ["predict.shift_seconds=[-0.25]"]).views[0].shift == -25
    assert load_recipe("base", ["train.crop_seconds=1", "predict.pads=floor"]).views == (View(100, 0, "floor"),)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("fname,labels\na.wav,Bark\n", "is no table of corrections: fname,labels. Its columns are fname,labels,why,track"),
        ("", "is no table of corrections: an empty file"),
        ("fname,labels,why\na.wav,Bark,x\na.wav,Tone,x\n", "duplicate clip: a.wav"),
        ("fname,labels,why\na.wav,,x\n", "no labels: a.wav. Put several labels in quotes; to leave a clip out use data.exclude"),
        ("fname,labels,why\na.wav,Bark,Tone,x\n", "more cells than columns: a.wav"),
    ],
)
def test_a_bad_table_of_corrections_is_refused(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "c.csv").write_text(text)
    with pytest.raises(MelfoldError) as caught:
        load_recipe("base", [f"data.corrections={tmp_path / 'c.csv'}"])
    assert message in str(caught.value)


def test_corrections_become_part_of_the_recipe_and_of_its_fingerprint(tmp_path: Path) -> None:
    path = tmp_path / "c.csv"
    path.write_text('fname,labels,why\na.wav,"Bark,Tone",both are heard\n')
    recipe = load_recipe("base", [f"data.corrections={path}"])
    assert recipe.data.corrections["a.wav"].labels == ("Bark", "Tone")
    assert recipe.track == "scratch"
    assert recipe.fingerprint() != load_recipe("base").fingerprint()
    assert parse_recipe(recipe.model_dump(mode="json"), "saved") == recipe
    path.write_text("fname,labels,why\na.wav,Bark,both are heard\n")
    assert load_recipe("base", [f"data.corrections={path}"]).fingerprint() != recipe.fingerprint()
    path.write_text("fname,labels,why,track\na.wav,Bark,x,scratch\nb.wav,Bark,,\nc.wav,Tone,y,open\n")
    assert load_recipe("base", [f"data.corrections={path}"]).track == "open", "what an open run suggests is open"
    path.write_text("fname,labels,why,track\na.wav,Bark,x,neither\n")
    with pytest.raises(MelfoldError, match="a.wav.track: .*found 'neither'"):
        load_recipe("base", [f"data.corrections={path}"])


def test_a_recipe_that_would_never_show_a_curated_clip_to_its_output_layer_is_refused() -> None:
    with pytest.raises(MelfoldError, match="no phase draws curated clips, .*set noisy.own_head = false"):
        load_recipe("base", ["train.clips=noisy"])
    assert load_recipe("base", ["train.clips=noisy", "noisy.own_head=false"]).uses_noisy
    with pytest.raises(MelfoldError, match="noisy.teachers need a phase that draws noisy clips .*, or noisy.missing"):
        load_recipe("base", ["noisy.teachers=x"])
    assert load_recipe("base", ["noisy.teachers=x", "noisy.missing=0.01"]).noisy.teachers == ("x",)
    assert load_recipe("base", ['noisy.teachers=["x", "y"]', "train.clips=both"]).noisy.teachers == ("x", "y")


def test_a_phase_changes_some_settings_of_training_and_keeps_the_others(tmp_path: Path) -> None:
    path = tmp_path / "mine.toml"
    path.write_text(
        'base = "scratch"\n[train]\nlr = 0.5\n[[phases]]  # as above\n[[phases]]\nlr = 0.1  # slow\nloss = "lsep"\n[noisy]\n'
    )
    recipe = load_recipe(str(path), ["train.warmup_epochs=7", "phases.1.epochs=4"])
    first, second = recipe.schedule
    assert first == recipe.train
    assert (second.lr, second.loss, second.epochs, second.warmup_epochs, second.clips) == (0.1, "lsep", 4, 7, "both")
    assert explain_recipe(str(path))["phases.1.lr"] == (0.1, "slow")
    assert load_recipe("base").schedule == (load_recipe("base").train,)
    assert recipe.fingerprint() != load_recipe(str(path), ["train.warmup_epochs=7"]).fingerprint()
    # Saved and loaded again, a phase still takes from `train` what it does not change.
    assert change_recipe(parse_recipe(recipe.model_dump(mode="json"), "saved"), ["train.lr=0.25"]).schedule[0].lr == 0.25


def test_set_adds_phases_and_drops_them() -> None:
    recipe = load_recipe("base", ["phases.0.epochs=3", "phases.1={augment = false}", "phases.1.loss_kwargs.gamma=1"])
    assert [phase.model_dump() for phase in recipe.phases] == [{"epochs": 3}, {"augment": False, "loss_kwargs": {"gamma": 1}}]
    assert load_recipe("scratch", ["phases=[]"]).phases == ()
    assert compare_recipes(recipe, load_recipe("base", ["phases.0.epochs=4"])) == [
        ("phases.0.epochs", "3.0", "4.0"),
        ("phases.1.loss_kwargs.gamma", "1.0", ""),
        ("phases.1.augment", "false", ""),
    ]
    for item, said in (
        ("phases.1.epochs=3", r"no such phase: phases\.1\.epochs"),
        ("phases.first.epochs=3", "no such phase"),
        ("phases.0.epoch=3", r"unknown key: phases\.0\.epoch \(nearest: phases\.0\.epochs\)"),
        ("phases.0.batch_size=3", "unknown key"),
        ("phases.0.lr=-1", r"phases\.0\.lr: .*found -1"),
        ("phases=3", "phases"),
    ):
        with pytest.raises(MelfoldError, match=said):
            load_recipe("base", [item])
