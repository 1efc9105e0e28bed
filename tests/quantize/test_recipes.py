"""Recipes: matching, presets, JSON in and out, messages."""

import json

import pytest

import qjax
from qjax.errors import FormatError, SpecError
from qjax.recipes import PRESETS, load_recipe, preset, recipe_from_dict


def test_first_matching_rule_decides_and_vectors_are_kept():
    recipe = qjax.Recipe(
        (
            qjax.Rule("layers.0.*", None),
            qjax.Rule("re:.*\\.mlp\\.(up|down)\\.kernel", qjax.NF4()),
            qjax.Rule("*kernel", qjax.Int(8, "channel")),
        )
    )
    assert recipe.match("layers.0.mlp.up.kernel", (8, 8)) is None
    assert recipe.match("layers.1.mlp.up.kernel", (8, 8)).format == qjax.NF4()
    assert recipe.match("layers.1.attn.q.kernel", (8, 8)).format.bits == 8
    assert recipe.match("layers.1.attn.q.kernel", (8,)) is None
    assert recipe.match("norm.scale", (8, 8)) is None


@pytest.mark.parametrize(
    "name", [*PRESETS, "hqq-int5-g32", "rtn-int4", "int6-g128-sym"]
)
def test_presets_quantize_kernels_keep_the_ends_and_survive_json(name):
    recipe = preset(name)
    assert recipe.name == name
    assert recipe.match("layers.0.attn.q.kernel", (256, 256)) is not None
    assert recipe.match("kernel", (256, 256)) is not None
    for path in ("embed.embedding", "head.kernel", "model.lm_head.kernel"):
        assert recipe.match(path, (256, 256)) is None
    assert recipe_from_dict(json.loads(json.dumps(recipe.to_dict()))) == recipe


def test_named_combinations_parse():
    assert preset("hqq-int3-g64").rules[-1].method == qjax.HQQ()
    assert preset("int6-g128-sym").rules[-1].format.symmetric
    assert preset("rtn-int4").rules[-1].format.group == "channel"


def test_hand_written_recipe_file(tmp_path):
    file = tmp_path / "mine.json"
    rules = [
        {"pattern": "head.*", "keep": True},
        {"pattern": "*.mlp.*", "format": "int3-g64", "method": "hqq"},
        {"pattern": "*kernel", "format": {"kind": "NF4", "block": 128}},
    ]
    file.write_text(json.dumps({"name": "mine", "rules": rules}), "utf-8")
    recipe = load_recipe(file)
    assert recipe.match("layers.0.mlp.up.kernel", (64, 8)).method == qjax.HQQ()
    assert recipe.match("layers.0.attn.q.kernel", (64, 8)).format == qjax.NF4(128)


@pytest.mark.parametrize(
    ("spec", "text"),
    [
        ({"rules": {}}, '"rules": [...]'),
        ({"rules": [], "rule": 1}, "got ['rule', 'rules']"),
        ({"rules": [3]}, "rule 0: expected an object with a pattern"),
        ({"rules": [{"pattern": "*"}]}, 'rule 0: needs "format" or "keep": true'),
        ({"rules": [{"pattern": "*", "keep": True, "bits": 4}]}, "unknown fields"),
        ({"rules": [{"pattern": "*", "format": {"kind": "Int9"}}]}, "unknown kind"),
        ({"rules": [{"pattern": "*", "format": {"kind": "TableFormat"}}]}, "unknown"),
        ({"rules": [{"pattern": "re:(", "keep": True}]}, "recipe pattern 're:('"),
        (
            {"rules": [{"pattern": "*", "format": "nf4", "method": "gtpq"}]},
            "unknown method 'gtpq'; known: rtn, hqq",
        ),
        (
            {"rules": [{"pattern": "*", "format": {"kind": "Int", "bits": 9}}]},
            "bits is 9",
        ),
        (
            {"rules": [{"pattern": "*", "format": {"kind": "Int", "nbits": 4}}]},
            "unknown fields ['nbits']",
        ),
    ],
)
def test_malformed_recipes_say_what_is_wrong(spec, text):
    with pytest.raises(SpecError) as error:
        recipe_from_dict(spec)
    assert text in str(error.value)


def test_unknown_preset_lists_near_matches():
    with pytest.raises(SpecError, match="did you mean nf4") as error:
        preset("nf-4")
    assert "hqq-int3-g64" in str(error.value)


def test_a_damaged_recipe_file_is_refused(tmp_path):
    file = tmp_path / "bad.json"
    file.write_text('{"rules": [', "utf-8")
    with pytest.raises(FormatError, match=r"bad\.json"):
        load_recipe(file)
