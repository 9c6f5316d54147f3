"""Configuration: strict, documented, changed by dotted path."""

from __future__ import annotations

import dataclasses
import inspect
import subprocess
import sys
import textwrap

import pytest
from hypothesis import given
from hypothesis import strategies as st

from esper.mesh.errors import InvalidInput, NotFound
from esper.tolaria import config as config_module
from esper.tolaria import recipes
from esper.tolaria.config import RunConfig
from esper.tolaria.overrides import apply, decode, encode

RECIPES = [recipe.name for recipe in recipes.all_recipes()]


@pytest.mark.parametrize("name", RECIPES)
def test_every_recipe_survives_being_written_and_read(name):
    """What config.json holds is the whole configuration."""
    built = recipes.get(name).build()
    assert built == decode(RunConfig, encode(built))


@pytest.mark.parametrize("name", RECIPES)
def test_every_recipe_describes_itself(name):
    """The list of recipes tells what each of them is."""
    recipe = recipes.get(name)
    assert len(recipe.description) > 40
    assert name == recipe.build().recipe


def test_every_field_is_documented():
    """Each field of each section has a docstring right below it."""
    source = inspect.getsource(config_module)
    for section in vars(config_module).values():
        if dataclasses.is_dataclass(section):
            lines = [line.strip() for line in inspect.getsource(section).splitlines()]
            for field in dataclasses.fields(section):
                at = next(i for i, line in enumerate(lines) if line.startswith(f"{field.name}:"))
                assert lines[at + 1].startswith('"""'), f"{section.__name__}.{field.name}"
    assert source


def test_an_unknown_recipe_lists_the_known_ones():
    """NOT_FOUND with the names that would have been right."""
    with pytest.raises(NotFound, match="cifar10, digits, stdlib-lm") as caught:
        recipes.get("mnist")
    assert "RECIPE_NOT_FOUND" == caught.value.reason


def test_overrides_change_fields_by_path_and_nothing_else():
    """Two fields changed, everything else as the recipe has it."""
    before = recipes.get("digits").build()
    after = apply(before, {"schedule.epochs": 7.0, "data.shift_pixels": 0})
    assert 7 == after.schedule.epochs
    assert isinstance(after.schedule.epochs, int)
    assert dataclasses.replace(before, schedule=after.schedule, data=after.data) == after


@pytest.mark.parametrize(
    ("path", "value", "reason", "text"),
    [
        ("schedule.epoch", 3, "OVERRIDE_UNKNOWN", "did you mean 'epochs'"),
        ("shedule.epochs", 3, "OVERRIDE_UNKNOWN", "no section 'shedule'"),
        ("recipe", "other", "OVERRIDE_UNKNOWN", "no field 'recipe'"),
        ("schedule.epochs.more", 3, "OVERRIDE_UNKNOWN", "no section"),
        ("schedule.epochs", "ten", "OVERRIDE_INVALID", "expected a whole number, found 'ten'"),
        ("schedule.epochs", 2.5, "OVERRIDE_INVALID", "expected a whole number, found 2.5"),
        ("schedule.epochs", True, "OVERRIDE_INVALID", "expected a whole number, found True"),
        ("machine.deterministic", 1, "OVERRIDE_INVALID", "expected true or false, found 1"),
        ("optimizer.learning_rate", float("inf"), "OVERRIDE_INVALID", "a finite number"),
        ("optimizer.learning_rate", 0, "OVERRIDE_INVALID", "expected above 0"),
        ("optimizer.name", "adam", "OVERRIDE_INVALID", "'adamw' or 'sgd'"),
        ("optimizer.betas", [0.9], "OVERRIDE_INVALID", "a list of 2"),
        ("optimizer.betas", 0.9, "OVERRIDE_INVALID", "expected a list"),
        ("optimizer.betas", [0.9, 1.0], "OVERRIDE_INVALID", "up to but not 1"),
        ("schedule.decay_start", 1.0, "OVERRIDE_INVALID", "both excluded"),
        ("data.test_fraction", 0.75, "OVERRIDE_INVALID", "leave at least a tenth"),
        ("data.kind", "cifar10", "OVERRIDE_UNKNOWN", "no field"),
        ("data.kind", "other", "OVERRIDE_INVALID", "'digits' or 'stdlib' or 'cifar10'"),
        ("data", 3, "OVERRIDE_INVALID", "data.kind"),
        ("schedule", 3, "OVERRIDE_INVALID", "expected a section"),
        ("host", {"kind": "residual"}, "OVERRIDE_INVALID", "expected 'conv' for data of kind 'digits'"),
        ("host.pooled_extent", 3, "OVERRIDE_INVALID", "expected 1 or 2"),
        ("growth.blueprints", [1], "OVERRIDE_INVALID", "growth.blueprints[0]"),
        ("control.on_loss", "wait", "OVERRIDE_INVALID", "'continue' or 'pause'"),
        ("guard.rate_cut", 1.0, "OVERRIDE_INVALID", "both excluded"),
        ("seed", -1, "OVERRIDE_INVALID", "0 to 2**63"),
    ],
)
def test_a_wrong_override_says_what_was_expected_and_found(path, value, reason, text):
    """Each fault is told with its path; nothing is guessed."""
    with pytest.raises(InvalidInput) as caught:
        apply(recipes.get("digits").build(), {path: value})
    assert reason == caught.value.reason
    assert text in caught.value.public


def test_fields_that_only_fit_together_are_checked_together():
    """Heads that do not divide the width are refused, changed with it they are taken."""
    config = recipes.get("stdlib-lm").build()
    with pytest.raises(InvalidInput, match="divisor"):
        apply(config, {"host.heads": 3})
    assert 3 == apply(config, {"host.heads": 3, "host.width": 48}).host.heads


def test_a_missing_required_field_is_named():
    """A file without its task is refused by name."""
    data = encode(recipes.get("digits").build())
    del data["task"]
    with pytest.raises(InvalidInput, match="task: expected a value"):
        decode(RunConfig, data)


@given(st.integers(1, 10**6), st.floats(1e-6, 10), st.booleans(), st.lists(st.text(max_size=8), max_size=4))
def test_any_lawful_override_survives_the_round_trip(epochs, rate, flag, names):
    """Encode and decode are inverse over the space of configurations."""
    changes = {
        "schedule.epochs": epochs,
        "optimizer.learning_rate": rate,
        "artifacts.html": flag,
        "growth.blueprints": names,
    }
    config = apply(recipes.get("digits").build(), changes)
    assert config == decode(RunConfig, encode(config))
    assert tuple(names) == config.growth.blueprints


def test_listing_recipes_and_building_the_service_imports_no_torch():
    """The service lists and checks recipes without paying for torch."""
    code = textwrap.dedent(
        """
        import sys
        import esper.tolaria.service
        from esper.tolaria import recipes
        [recipe.build() for recipe in recipes.all_recipes()]
        sys.exit("torch" in sys.modules)
        """
    )
    assert 0 == subprocess.run([sys.executable, "-c", code], check=False).returncode
