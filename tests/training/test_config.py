"""Recipes: what ships is valid, and what is wrong is named in one line."""

from __future__ import annotations

from pathlib import Path

import pytest
from pydantic import ValidationError

from embedding.errors import InvalidRecipe, NotFound
from training.config import AugmentationConfig, NetworkConfig, Recipe, load_recipe, parse_recipe
from training.datasets_config import DigitsData
from training.losses.config import ContrastiveConfig

RECIPES = Path(__file__).parents[2] / "recipes"

MINIMAL = """
name = "tiny"
[data]
source = "digits"
[preprocessing]
image_size = 16
channels = 1
[network]
name = "small_cnn"
[loss]
name = "triplet"
[training]
steps = 200
"""


def refused(old: str, new: str) -> InvalidRecipe:
    assert old in MINIMAL
    with pytest.raises(InvalidRecipe) as caught:
        parse_recipe(MINIMAL.replace(old, new))
    return caught.value


@pytest.mark.parametrize("path", sorted(RECIPES.glob("*.toml")), ids=lambda path: path.stem)
def test_every_recipe_that_ships_is_valid_and_bears_its_files_name(path: Path) -> None:
    recipe = load_recipe(path)
    assert recipe.name == path.stem
    assert recipe.description.endswith((".", "?"))


def test_the_eight_recipes_ship() -> None:
    names = {path.stem for path in RECIPES.glob("*.toml")}
    assert names == {"digits", "emoji", "faces", "fashion_mnist", "grocery", "mnist", "omniglot", "omniglot_small"}


def test_what_a_recipe_leaves_out_takes_defaults() -> None:
    recipe = parse_recipe(MINIMAL)
    assert recipe.data == (DigitsData(source="digits"),)
    assert recipe.split.protocol == "identity-disjoint"
    assert recipe.augmentation == AugmentationConfig()
    assert recipe.architecture.image_size == 16
    assert recipe.architecture.channels == 1


def test_a_recipe_cannot_be_changed() -> None:
    recipe = parse_recipe(MINIMAL)
    with pytest.raises(ValidationError, match="frozen"):
        recipe.seed = 1


def test_the_loss_is_chosen_by_name() -> None:
    recipe = parse_recipe(MINIMAL.replace('name = "triplet"', 'name = "contrastive"\nmargin = 0.5'))
    assert recipe.loss == ContrastiveConfig(name="contrastive", margin=0.5)


def test_several_parts_keep_their_order_and_roles() -> None:
    parts = '[[data]]\nsource = "digits"\n[[data]]\nsource = "zip"\npath = "a.zip"\nrole = "test"\n'
    recipe = parse_recipe(MINIMAL.replace('[data]\nsource = "digits"\n', parts))
    assert [(part.source, part.role) for part in recipe.data] == [("digits", "split"), ("zip", "test")]


@pytest.mark.parametrize(
    ("old", "new", "field", "said"),
    [
        ("steps = 200", "step = 200", "training.step", "unknown key, did you mean 'steps'?; accepted: steps, "),
        ('name = "tiny"', 'name = "tiny"\nsede = 3', "sede", "unknown key, did you mean 'seed'?"),
        ("image_size = 16", "image_sise = 16", "preprocessing.image_sise", "did you mean 'image_size'?"),
        ("steps = 200", "steps = 0", "training.steps", "must be greater than or equal to 1; got 0"),
        ("steps = 200", 'steps = "200"', "training.steps", "must be a valid integer; got '200'"),
        ("steps = 200", "steps = 200.5", "training.steps", "got 200.5"),
        ("steps = 200", "steps = true", "training.steps", "got True"),
        ("steps = 200", f"steps = {10**30}", "training.steps", "less than or equal to 1000000000; got 1"),
        ("steps = 200", f"steps = 200\ncheckpoint_every = {10**30}", "training.checkpoint_every", "1000000000; got 1"),
        ("steps = 200", f"steps = 200\nlog_every = {10**30}", "training.log_every", "1000000000; got 1"),
        ("[loss]", f"[split]\nseed = {2**63}\n[loss]", "split.seed", "less than 9223372036854775808"),
        ("channels = 1", "channels = true", "preprocessing", "channels takes no true or false; got True"),
        ("channels = 1", "channels = 1\nbackground = true", "preprocessing", "background takes no true or false"),
        ("channels = 1", "channels = 1\nmean = [true]", "preprocessing", "mean takes no true or false; got (True,)"),
        ("channels = 1", "channels = 1\nmean = [1e30]", "preprocessing.mean", "less than or equal to 100; got 1e+30"),
        ("channels = 1", "channels = 1\nstd = [1e-30]", "preprocessing.std", "equal to 0.0001; got 1e-30"),
        ("steps = 200", "", "training.steps", "this key is required"),
        ("steps = 200", "steps = 50", "optimizer.warmup_steps", "at most training.steps, which is 50"),
        ('"triplet"', '"tripplet"', "loss.name", "did you mean 'triplet'?; accepted: contrastive, contrastive-"),
        ('name = "triplet"', "margin = 1.0", "loss.name", "this key is required"),
        ('name = "triplet"', 'name = "triplet"\nmargin = 2.5', "loss.margin", "less than or equal to 2; got 2.5"),
        ('name = "triplet"', 'name = "triplet"\nmargin = nan', "loss.margin", "finite"),
        ('name = "triplet"', 'name = "triplet"\ntemperature = 1.0', "loss.temperature", "accepted: name, margin, "),
        ('"digits"', '"digit"', "data.source", "did you mean 'digits'?; accepted: folder, manifest, zip, mnist"),
        ('"digits"', '"folder"', "data.path", "this key is required"),
        ('"digits"', '"digits"\npath = "x"', "data.path", "unknown key"),
        ('"digits"', '"digits"\nmax_bad_images = -1', "data.max_bad_images", "count of 0 or more, or a share"),
        ('"digits"', '"digits"\nmax_bad_images = 1.5', "data.max_bad_images", "got 1.5"),
        ('[data]\nsource = "digits"', 'data = []', "data", "at least 1 item"),
        ('[data]\nsource = "digits"', '[[data]]\nsource = "digits"\nrol = 1', "data.0.rol", "did you mean 'role'?"),
        ("[loss]", "[split]\ntrain = 0.9\n[loss]", "split", "train + calibration + test must be 1; got 1.2"),
        ("[loss]", '[split]\nprotocol = "closed"\n[loss]', "split.protocol", "accepted: identity-disjoint, closed-set"),
        ("[loss]", '[split]\nprotocol = "closed-set"\nby = "super"\n[loss]', "split.by", "needs protocol"),
        ("[loss]", "[augmentation]\nscale = [1.1, 0.9]\n[loss]", "augmentation.scale", "takes [low, high]"),
        ("[loss]", '[augmentation]\nfill = "white"\n[loss]', "augmentation.fill", "grey level in [0, 1]; got 'white'"),
        ("[loss]", "[augmentation]\ngrey = 0.5\n[loss]", "augmentation.grey", "grey images have no colour"),
        ("[loss]", "[augmentation]\nshear = 60\n[loss]", "augmentation.shear", "less than or equal to 30"),
        ("[loss]", "[sampling]\nimages_per_identity = 1\n[loss]", "sampling.images_per_identity", "equal to 2; got 1"),
        ("[loss]", "[sampling]\ncomposed_identities = 1.5\n[loss]", "sampling.composed_identities", "equal to 1"),
        ("[loss]", "[sampling]\nidentities_per_batch = 2\ncomposed_identities = 0.5\n[loss]",
         "sampling.identities_per_batch", "at least 3"),
        ("[loss]", "[classifier]\nepochs = 5\n[loss]", "classifier", 'split.protocol = "closed-set"'),
        ("steps = 200", 'steps = 200\nmode = "unsupervised"', "training.mode", "did you mean 'supervised'?"),
        ("steps = 200", 'steps = 200\nmode = "self-supervised"', "augmentation", "give some"),
        ("steps = 200", "steps = 200\nearly_stopping = {patience = 3}", "training.evaluate_every", "between two"),
        (
            "steps = 200",
            "steps = 200\nevaluate_every = 201\nearly_stopping = {patience = 3}",
            "training.evaluate_every",
            "200 steps have none",
        ),
        ("steps = 200", "steps = 200\nearly_stopping = {patience = 0}", "training.early_stopping.patience", "got 0"),
        ("steps = 200", 'steps = 200\nearly_stopping = {metric = "F1"}', "training.early_stopping.metric", "recall@1"),
        ("steps = 200", "steps = 200\nmicro_batch = 1", "training.micro_batch", "greater than or equal to 2"),
        ("steps = 200", 'steps = 200\ncompile = "gcc"', "training.compile", "accepted: inductor, aot_eager, eager"),
        ("[loss]", "[optimizer]\nlayer_decay = 1.5\n[loss]", "optimizer.layer_decay", "equal to 1; got 1.5"),
        ('"small_cnn"', '"resnet18"', "network", "image_size must be at least 32; got 16"),
        ('"small_cnn"', '"resnet19"', "network.name", "did you mean 'resnet18'?"),
        ('name = "tiny"', 'name = "Tiny!"', "name", "got 'Tiny!'"),
        ("steps = 200", "steps = 200\nfreeze_backbone_steps = 201", "training.freeze_backbone_steps", "at most"),
        ("[loss]", "[optimizer]\nloss_learning_rate = 0.1\n[loss]", "optimizer.loss_learning_rate", "learns nothing"),
        ("[loss]", '[sampling]\nimages_from = "every-part"\n[loss]', "sampling.images_from", "one data part alone"),
    ],
)  # fmt: skip
def test_a_wrong_key_is_named_with_what_is_accepted(old: str, new: str, field: str, said: str) -> None:
    error = refused(old, new)
    assert error.field == field
    assert f"recipe: {field}: " in str(error)
    assert said in str(error)
    assert "\n" not in str(error)


@pytest.mark.parametrize(
    ("sampling", "training", "field"),
    [
        ("", "", "sampling.images_per_identity"),
        ('[sampling]\nimages_per_identity = 2\nby = "super"\n', "", "sampling.by"),
        ("[sampling]\nimages_per_identity = 2\n", "whitening = 0.1\n", "training.whitening"),
        ("[sampling]\nimages_per_identity = 2\ncomposed_identities = 0.5\n", "", "sampling.composed_identities"),
        ('[sampling]\nimages_per_identity = 2\nimages_from = "every-part"\n', "", "sampling.images_from"),
    ],
)
def test_self_supervised_training_says_what_it_needs_and_leaves_unused(
    sampling: str, training: str, field: str
) -> None:
    text = MINIMAL.replace("[loss]", f"{sampling}[augmentation]\nrotation = 5\n[loss]")
    with pytest.raises(InvalidRecipe) as caught:
        parse_recipe(text + training + 'mode = "self-supervised"\n')
    assert caught.value.field == field


@pytest.mark.parametrize(
    "loss",
    [
        'name = "arcface"',
        'name = "proxy-anchor"',
        'name = "margin-based"\nboundaries = "per-identity"',
        'name = "joint"\npair = {name = "contrastive"}',
        'name = "cross-batch-memory"\npair = {name = "contrastive"}',
        'name = "threshold-consistent"\npair = {name = "margin-based", boundaries = "per-identity"}',
    ],
)
def test_composed_identities_need_a_loss_of_the_batch_alone(loss: str) -> None:
    composed = "[sampling]\ncomposed_identities = 0.5\n[loss]"
    error = refused('[loss]\nname = "triplet"', f"{composed}\n{loss}")
    assert error.field == "sampling.composed_identities"
    assert "from batch to batch" in str(error)
    for of_the_batch in ('name = "margin-based"', 'name = "threshold-consistent"\npair = {name = "contrastive"}'):
        parse_recipe(MINIMAL.replace('[loss]\nname = "triplet"', f"{composed}\n{of_the_batch}"))


@pytest.mark.parametrize(
    ("loss", "field", "says"),
    [
        ('name = "triplet"\nfallback = "skip"', "loss.fallback", 'mining = "batch-hard"; use "semi-hard"'),
        ('name = "triplet"\nmining = "all"\nfallback = "hardest"', "loss.fallback", 'mining = "all"'),
        ('name = "triplet-soft-margin"\nfallback = "skip"', "loss.fallback", 'mining = "batch-hard"'),
        ('name = "multi-similarity"\nmining = "all"\nepsilon = 0.2', "loss.epsilon", 'use "multi-similarity"'),
        (
            'name = "joint"\npair = {name = "triplet", mining = "hard", fallback = "skip"}',
            "loss.pair.fallback",
            'mining = "hard"',
        ),
    ],
)
def test_what_a_mining_does_not_look_at_is_refused(loss: str, field: str, says: str) -> None:
    error = refused('[loss]\nname = "triplet"', f"[loss]\n{loss}")
    assert error.field == field
    assert "changes nothing" in str(error)
    assert says in str(error)


@pytest.mark.parametrize("change", ["fill = 0.5", "elastic_cells = 5", "shared_rotation = 30\nshared_elastic = 0.1"])
def test_what_changes_no_image_by_itself_makes_no_views(change: str) -> None:
    text = MINIMAL.replace("[loss]", f"[sampling]\nimages_per_identity = 2\n[augmentation]\n{change}\n[loss]")
    with pytest.raises(InvalidRecipe, match="random changes of an image") as caught:
        parse_recipe(text + 'mode = "self-supervised"\n')
    assert caught.value.field == "augmentation"


def test_a_memory_that_is_never_looked_into_is_refused() -> None:
    text = MINIMAL[: MINIMAL.index("[loss]")] + (
        '[loss]\nname = "cross-batch-memory"\nstart = {start}\n[loss.pair]\nname = "supervised-contrastive"\n'
        "[training]\nsteps = 200\n"
    )
    with pytest.raises(InvalidRecipe, match="never looked into") as caught:
        parse_recipe(text.format(start=200))
    assert caught.value.field == "loss.start"
    assert parse_recipe(text.format(start=199)).training.steps == 200


def test_random_weights_are_not_frozen() -> None:
    error = refused("steps = 200", "steps = 200\nfreeze_backbone_steps = 10")
    assert error.field == "training.freeze_backbone_steps"
    assert 'network.weights is "random"' in str(error)


def test_all_errors_are_shown_and_of_many_the_first() -> None:
    error = refused("steps = 200", 'steps = 0\nprecision = "fp8"')
    assert error.field == "training.steps"
    assert "training.steps: must be greater" in str(error)
    assert "; training.precision: got 'fp8'" in str(error)
    with pytest.raises(InvalidRecipe) as caught:
        parse_recipe("")
    assert "name: this key is required; data: this key is required; " in str(caught.value)
    assert str(caught.value).endswith("; and 2 more errors")


def test_a_broken_file_is_named_with_the_line(tmp_path: Path) -> None:
    path = tmp_path / "broken.toml"
    path.write_text("name = \n")
    with pytest.raises(InvalidRecipe, match=r"broken\.toml is not valid TOML: .*line 1"):
        load_recipe(path)


def test_a_file_that_is_not_text_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "recipe.toml"
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(InvalidRecipe, match="cannot be read as a recipe: it is no text in UTF-8"):
        load_recipe(path)


def test_a_folder_is_no_recipe(tmp_path: Path) -> None:
    with pytest.raises(InvalidRecipe, match=r"cannot be read as a recipe \(Is a directory\)"):
        load_recipe(tmp_path)


def test_a_missing_file_is_not_found(tmp_path: Path) -> None:
    with pytest.raises(NotFound, match=r"no recipe .*absent\.toml"):
        load_recipe(tmp_path / "absent.toml")


class TestInitialWeights:
    """Where a network's first weights come from."""

    @pytest.mark.parametrize("weights", ["random", "pretrained"])
    def test_words_stand_for_themselves(self, weights: str) -> None:
        assert NetworkConfig(name="resnet18", weights=weights).initial_weights(None, {}) == weights

    def test_a_path_is_relative_to_the_data_root(self, tmp_path: Path) -> None:
        (tmp_path / "weights.pt").touch()
        network = NetworkConfig(name="resnet18", weights="weights.pt")
        assert network.initial_weights(tmp_path, {}) == str(tmp_path / "weights.pt")

    def test_the_environment_takes_the_place_of_a_recipes_weights(self, tmp_path: Path) -> None:
        path = tmp_path / "mine.pt"
        path.touch()
        environment = {"LOOKALIKE_WEIGHTS": str(path)}
        assert NetworkConfig(name="resnet18", weights="pretrained").initial_weights(None, environment) == str(path)

    def test_the_environment_leaves_random_weights_alone(self) -> None:
        environment = {"LOOKALIKE_WEIGHTS": "/nowhere/mine.pt"}
        assert NetworkConfig(name="small_cnn").initial_weights(None, environment) == "random"

    def test_a_missing_file_is_named(self, tmp_path: Path) -> None:
        network = NetworkConfig(name="resnet18", weights="weights.pt")
        with pytest.raises(NotFound, match=r"no weights file .*weights\.pt; set LOOKALIKE_WEIGHTS") as caught:
            network.initial_weights(tmp_path, {})
        assert caught.value.field == "network.weights"


def test_recipes_are_compared_by_value() -> None:
    assert parse_recipe(MINIMAL) == Recipe.model_validate(parse_recipe(MINIMAL).model_dump())


def test_a_folder_for_weights_is_told_from_a_missing_file(tmp_path: Path) -> None:
    (tmp_path / "bundle").mkdir()
    with pytest.raises(NotFound, match=r"is a folder; .*weights\.safetensors"):
        NetworkConfig(name="small_cnn", weights="bundle").initial_weights(tmp_path, {})
