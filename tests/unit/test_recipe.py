"""Recipes, presets and names."""

import dataclasses
import importlib.metadata

import pytest
import yaml

from kvfold import registry
from kvfold.architectures.base import empty_model
from kvfold.compression.presets import PRESETS
from kvfold.compression.recipe import assignments, load_recipe, make_recipe, parse_budget
from kvfold.compression.suit_width import suited
from kvfold.errors import RecipeError
from kvfold.evaluation.geometries import Shape

BASE = {"model": "m", "out": "o"}


@pytest.mark.parametrize("preset", PRESETS)
def test_every_preset_makes_a_recipe_that_round_trips_with_all_defaults(preset, tmp_path):
    recipe = make_recipe(BASE | {"preset": preset, "kv_budget": "1/4"})
    written = yaml.safe_load(recipe.to_yaml())
    assert written["kv_budget"] == 0.25 and written["calibration"]["num_samples"] == 0
    (tmp_path / "r.yaml").write_text(recipe.to_yaml())
    assert make_recipe(load_recipe(tmp_path / "r.yaml")).to_dict() == recipe.to_dict()


def test_set_reaches_any_field_and_wins():
    sets = ["width.latent=group", "width.multiple=4", "calibration.seq_len=32", "kv_budget=1/2", "allocate=greedy"]
    recipe = make_recipe(BASE | {"preset": "svd_a", "kv_budget": 0.9}, sets)
    assert recipe.width == {"method": "svd_a", "latent": "group", "multiple": 4}
    assert (recipe.calibration.seq_len, recipe.kv_budget, recipe.allocate) == (32, 0.5, "greedy")
    assert recipe.method("width").latent == "group"


def test_another_method_drops_the_presets_fields():
    recipe = make_recipe(BASE | {"preset": "mqa"}, ["width.method=svd_w"])
    assert recipe.width == {"method": "svd_w"}


def test_fields_are_those_of_the_method_that_is_set_in_any_order():
    for sets in (["width.latent=group", "width.method=logit"], ["width.method=logit", "width.latent=group"]):
        assert make_recipe(BASE, sets).width == {"method": "logit", "latent": "group"}
    assert make_recipe(BASE | {"width": {"latent": "group"}}, ["width.method=logit"]).width["latent"] == "group"


def test_a_loss_that_would_not_be_seen_is_no_aim():
    for length in ({"method": "scored"}, {"method": "recency", "prompt": "whole"}, {"method": "lead"}):
        with pytest.raises(RecipeError, match="leaves every token"):
            make_recipe(BASE | {"target_kl": 0.1, "length": length})
    make_recipe(BASE | {"target_kl": 0.1, "length": {"method": "recency"}})


@pytest.mark.parametrize(
    ("data", "sets", "message"),
    [
        ({"preset": "svda"}, [], "no preset 'svda'. Did you mean 'svd_a'"),
        ({"preset": "svd_a"}, ["width.latnet=group"], "Did you mean 'latent'"),
        ({"preset": "svd_a"}, ["width.latent=head"], "choose 'layer' or 'group'"),
        ({"preset": "svd_a"}, ["width.method=svd_b"], "no width method 'svd_b'"),
        ({"preset": "svd_a"}, ["width=svd_w"], "its fields are meant"),
        ({"preset": "svd_a"}, ["latent"], "is not AXIS.FIELD=VALUE"),
        ({"kv_buget": 0.5}, [], "Did you mean 'kv_budget'"),
        ({"kv_budget": 1.5}, [], "above 0 and at most 1"),
        ({"kv_budget": "half"}, [], "is not a number"),
        ({"preset": "xkv", "allocate": "measured"}, [], "cannot measure cross_layer"),
        ({"calibration": {"num_sample": 3}}, [], "Did you mean 'num_samples'"),
        ({"calibration": {"num_samples": -1}}, [], "below 0"),
        ({"calibration": {"select": "divers"}}, [], "Did you mean 'diverse'"),
        ({"allocate": "greed"}, [], "Did you mean 'greedy'"),
        ({"out": None}, [], "lacks out"),
        ({"kv_budget": 0.5, "target_kl": 0.1}, [], "give one of them"),
        ({"target_kl": 0}, [], "above 0"),
        ({"preset": "auto", "prefer": "sped"}, [], "Did you mean 'speed'"),
        ({"preset": "svd_a", "prefer": "speed"}, [], "goes with width methods mla and fisher"),
        (
            {"preset": "auto", "prefer": "speed"},
            ["width.leading=32"],
            "no field of width method 'fisher' called 'leading'",
        ),
        ({"min_width": 2.0}, [], "0 to 1"),
        ({"keep_layers": ["0"]}, [], "not a list of whole numbers"),
        ({"preset": "xkv"}, ["bits.method=integer"], "not quantized"),
        ({"preset": "procrustes"}, ["bits.method=mixed"], "numbers of equal rank"),
        ({"keep_layers": 1}, [], "not a list of whole numbers"),
        ({"preset": "int4"}, ["bits.k_bits=9"], "choose one of"),
        ({"preset": "int4"}, ["bits.group_size=16"], "goes with bits.scales=affine"),
        ({"preset": "kivi"}, ["bits.block=48"], "divides 256"),
        ({"preset": "turboquant_4bit_nc"}, ["bits.k_bits=7"], "bits.k_bits = 7"),
        ({"preset": "turboquant_4bit_nc"}, ["width.sides=values"], "width.sides = 'values'"),
        ({"preset": "auto"}, ["bits.least=5", "bits.most=4"], "bits.least = 5"),
    ],
)
def test_mistakes_are_named(data, sets, message):
    with pytest.raises(RecipeError, match=message):
        make_recipe(BASE | data, sets)


def test_unreadable_recipes(tmp_path):
    with pytest.raises(RecipeError, match="cannot be read"):
        load_recipe(tmp_path / "none.yaml")
    (tmp_path / "list.yaml").write_text("- 1")
    with pytest.raises(RecipeError, match="holds no recipe"):
        load_recipe(tmp_path / "list.yaml")


@pytest.mark.parametrize(
    "content", [b"\xff\xfe", b"a: \xe9", b"[" * 100_000, b"a: 2026-13-45", b"a: !!python/name:os.system", b"\0"]
)
def test_bytes_that_are_no_recipe(tmp_path, content):
    """In files, and where they are text on the command line."""
    (tmp_path / "r.yaml").write_bytes(content)
    with pytest.raises(RecipeError, match=r"r\.yaml cannot be read as a YAML recipe"):
        load_recipe(tmp_path / "r.yaml")
    value = content.decode("latin1").removeprefix("a: ")
    if "é" not in value and "ÿ" not in value:
        with pytest.raises(RecipeError, match="the value is not YAML"):
            assignments([f"kv_budget={value}"])


def test_a_preference_is_how_keys_are_stored():
    assert make_recipe(BASE | {"preset": "auto"}).width == {"method": "mla"}
    assert make_recipe(BASE | {"preset": "auto", "kv_budget": "1/8"}).width == {"method": "mla"}
    small = {"method": "mla", "rope": "on_read", "leading": 0, "recent_leading": 0}
    assert make_recipe(BASE | {"preset": "auto", "prefer": "size"}).width == small
    own = {"preset": "auto", "prefer": "size", "width": {"method": "mla", "leading": 32}}
    assert make_recipe(BASE | own).width == small | {"leading": 32}
    assert make_recipe(BASE | {"preset": "small", "prefer": "size"}).width["rope"] == "on_read"
    assert make_recipe(BASE | {"preset": "auto", "prefer": "speed"}).width["rope"] == "applied"
    coarse = make_recipe(BASE | {"preset": "auto", "prefer": "speed"}, ["width.multiple=16"])
    assert coarse.width == {"method": "fisher", "rope": "applied", "multiple": 16}
    assert make_recipe(BASE | {"preset": "auto"}).calibration.data == "self"
    assert make_recipe(BASE | {"preset": "auto"}).length == {"method": "recent"}
    assert make_recipe(BASE | {"preset": "auto", "prefer": "speed"}).length == {"method": "recent"}
    assert make_recipe(BASE, ["length.method=identity"]).preset == "auto"
    assert make_recipe(BASE | {"preset": "auto", "keep_layers": [0, 1]}).keep_layers == (0, 1)


def layers_of(shape, kv_heads=None):
    """The first layer of a shape, with other key/value heads."""
    shape = Shape(name=shape, layers=1)
    layer = shape.arch.describe(empty_model(shape.arch, shape.config()))[0]
    return [layer if kv_heads is None else dataclasses.replace(layer, num_kv_heads=kv_heads)]


def test_the_default_suits_a_model():
    """Groups of heads where every query head has its own, one latent of keys and values where they are shared."""
    default = make_recipe(BASE | {"preset": "auto", "kv_budget": "1/8"})
    group = {"method": "fisher", "rope": "banded", "latent": "group", "v_latent": "group"}
    assert suited(default, layers_of("llama2-7b")).width == group | {"group_size": 4}
    assert suited(default, layers_of("pythia-160m")).width == group | {"group_size": 4}
    odd = [dataclasses.replace(layer, num_attention_heads=15) for layer in layers_of("llama2-7b", 15)]
    assert suited(default, odd).width["group_size"] == 5
    ten = [dataclasses.replace(layer, num_attention_heads=10) for layer in layers_of("llama2-7b", 10)]
    assert suited(default, ten).width["group_size"] == 5
    five = layers_of("llama2-7b", 5)  # one group would be all heads
    assert suited(default, five) == default
    few = [dataclasses.replace(layer, num_attention_heads=4) for layer in layers_of("pythia-160m", 4)]
    assert suited(default, few) == default == suited(default, layers_of("llama2-7b", 4))


def test_the_default_suits_a_budget():
    """Of shared heads: keys and values apart where much is kept, joint latents below, all rebuilt where little is."""
    auto = make_recipe(BASE | {"preset": "auto"})
    few, many = layers_of("llama2-7b", 4), layers_of("llama2-7b", 8)

    def width(budget, layers, **fields):
        return suited(make_recipe(BASE | {"preset": "auto", "kv_budget": budget} | fields), layers).width

    apart, groups = {"method": "fisher", "rope": "banded"}, {"latent": "group", "v_latent": "group", "group_size": 4}
    assert width("1/4", few) == apart and width("1/4", many) == apart | groups
    assert width("1/5", few) == auto.width and width("1/5", many) == {"method": "mla", "group_size": 4, "below": 0}
    assert width("1/16", few) == width("1/16", many) == {"method": "mla", "rope": "on_read"}
    assert width("1/5", few, runtime="vllm") == {"method": "mla", "below": 0}  # what is read again makes steps longer
    assert width("1/16", few, runtime="vllm") == width("1/16", few) and width("1/4", few, runtime="vllm") == apart
    assert width("1/5", few, runtime="vllm", width={"method": "mla", "below": 3})["below"] == 3
    assert width("1/2", many, prefer="size")["method"] == "mla"
    applied = {"method": "fisher", "rope": "applied"}
    assert width("1/8", few, prefer="speed") == applied and width("1/8", many, prefer="speed") == applied | groups
    coarse = make_recipe(BASE | {"preset": "auto", "prefer": "speed"}, ["width.multiple=16"])
    assert suited(coarse, many).width == applied | {"multiple": 16}
    assert width("1/2", many, length={"method": "recency", "kept": 0.5}) == auto.width
    wide = layers_of("llama2-7b", 16)
    assert width("1/5", wide) == apart | groups and width("1/16", wide)["latent"] == "group"
    aimed = make_recipe(BASE | {"preset": "auto", "kv_budget": None, "target_kl": 0.01})
    assert suited(aimed, few).width == auto.width


@pytest.mark.parametrize("kv_heads", [8, 16])
def test_a_method_that_is_named_stays_if_it_can(kv_heads):
    """Too many numbers of a layer have no common latent; few bytes are kept before rotation where nobody says how."""
    named = make_recipe(BASE | {"preset": "auto", "kv_budget": "1/16", "width": {"method": "mla", "below": 0}})
    layers = [dataclasses.replace(layers_of("llama2-7b", kv_heads)[0], num_attention_heads=kv_heads)]
    wide = kv_heads == 16
    expected = {"method": "fisher", "rope": "banded"} if wide else {"method": "mla", "below": 0, "rope": "on_read"}
    assert suited(named, layers).width == expected
    banded = make_recipe(BASE | {"kv_budget": "1/16", "width": {"method": "mla", "rope": "banded"}})
    assert suited(banded, layers).width == (expected if wide else {"method": "mla", "rope": "banded"})
    small = make_recipe(BASE | {"preset": "auto", "prefer": "size"})
    assert suited(small, layers).width["rope"] == "on_read"


def test_what_a_preset_has_anyway_stays_where_it_is_named():
    many = layers_of("llama2-7b", 8)
    for sets, data in ((["width.method=mla"], {}), ([], {"width": {"method": "mla"}}), (["width.below=3"], {})):
        width = suited(make_recipe(BASE | {"preset": "auto", "kv_budget": "1/4"} | data, sets), many).method("width")
        assert (width.part, width.below, width.group_size) == ("banded_keys_and_values", 3, 0)
    speed = BASE | {"preset": "auto", "kv_budget": "1/4", "prefer": "speed"}
    assert suited(make_recipe(speed), many).method("width").group_size == 4
    assert suited(make_recipe(speed, ["width.method=fisher"]), many).method("width").group_size == 0


def test_joint_latents_of_groups_are_not_predicted():
    assert make_recipe(BASE | {"preset": "auto"}, ["width.group_size=2"]).method("width").below == 0
    assert make_recipe(BASE | {"preset": "auto"}).method("width").below == 3
    six = [dataclasses.replace(layer, head_dim=80) for layer in layers_of("llama2-7b", 6)]
    width = make_recipe(BASE | {"width": {"method": "mla", "kv_heads": 1, "group_size": 1}}).method("width")
    with pytest.raises(RecipeError, match="its 160 numbers of layer 0 are not to be shared out among 6 latents"):
        width.key_shapes(six[0])


def test_budgets():
    assert [parse_budget(b) for b in (0.5, "0.5", "1/3", 1)] == [0.5, 0.5, 1 / 3, 1.0]


@pytest.mark.parametrize("package", [*registry.AXES, "architectures"])
def test_every_file_of_an_axis_is_a_method(package):
    assert registry.names(package)
    for name in registry.names(package):
        assert registry.load(package, name)
    if package in registry.AXES:
        assert "identity" in registry.names(package)


def test_numbers_with_exponents_are_numbers():
    """YAML 1.1 takes 1e-4 for a text."""
    found = assignments(["a=1e-4", "b=2.5E+3", "c=1e", "d=0.5", "e=text"])
    assert found == {"a": 1e-4, "b": 2500.0, "c": "1e", "d": 0.5, "e": "text"}


def test_presets_of_other_packages():
    """extras/kvfold-autoencoder, by its entry points: `make test` installs it."""
    recipe = make_recipe(BASE | {"preset": "autoencoder", "kv_budget": "1/4"}, ["width.hidden=8"])
    assert recipe.width == {"method": "autoencoder", "hidden": 8}
    assert registry.load("width", "autoencoder").__module__ == "kvfold_autoencoder.autoencoder"


def test_a_preset_of_a_package_that_is_not_installed_says_which(monkeypatch):
    monkeypatch.setattr(importlib.metadata, "entry_points", lambda group: ())
    with pytest.raises(RecipeError, match=r"pip install \./extras/kvfold-autoencoder"):
        make_recipe(BASE | {"preset": "autoencoder"})
