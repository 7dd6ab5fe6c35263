"""Studies: their files, their runs, and how they go on after being stopped."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import TypeGuard, get_args

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from rich.console import Console
from sklearn.datasets import load_digits

from embedding.errors import AlreadyExists, InvalidDataset, InvalidRecipe, StorageFailed
from training import study as module
from training.classifier import LinearClassifier, fit_classifier, shuffled_batches
from training.losses.build import build_loss
from training.losses.config import MarginConfig
from training.losses.pairs import contrastive_loss
from training.pairs import distance_block
from training.sections import Section
from training.study import Done, perform, runs_of
from training.study.config import Study, load_study
from training.study.run import ComparisonRun, ConvergenceRun, StudyRun, encode, load_images, new_encoder
from training.study.sample import BINS, sample_of

FILE = Path(__file__).parents[2] / "studies" / "contrasting_losses.toml"


@pytest.fixture
def study() -> Study:
    """The quick form with two objectives, one paired batch and one beside, a layer of 16 and one α: eight runs."""
    quick = load_study(FILE).quick()
    return quick.model_copy(
        update={
            "encoder": quick.encoder.model_copy(update={"hidden": (16,)}),
            "objectives": tuple(each for each in quick.objectives if each.label in {"cross-entropy", "supcon"}),
            "batches": (quick.batches[1], quick.batches[3]),
            "claims": quick.claims.model_copy(
                update={
                    "beat_the_baseline": ("supcon",), "do_not_beat_it": (), "best_at_the_smallest_batch": None,
                    "fall_with_batch_size": (), "falls_least": None,
                }
            ),
            "convergence": quick.convergence.model_copy(update={"epochs": 1, "checks": 2, "alphas": (0.5,)}),
        }
    )  # fmt: skip


def run_study(study: Study, out: Path, *, workers: int = 1) -> tuple[Done, str]:
    """What it gives, and what it says."""
    with Path(os.devnull).open("w") as nowhere:
        console = Console(file=nowhere, record=True, width=160)
        done = perform(study, out=out, data_root=None, device="cpu", workers=workers, console=console)
    return done, console.export_text()


def of_kind(study: Study, *, label: str | None = None, alpha: float | None = None) -> ComparisonRun | ConvergenceRun:
    """The first run of an objective, or of an α."""
    loss = next((each.loss for each in study.objectives if each.label == label), None)
    for run in runs_of(study):
        if isinstance(run, ConvergenceRun) and run.alpha == alpha:
            return run
        if isinstance(run, ComparisonRun) and alpha is None and run.loss == loss:
            return run
    raise LookupError


class TestFile:
    @pytest.mark.parametrize(
        ("old", "new", "words"),
        [
            ("seeds = 5", "seedz = 5", ["seedz: unknown key, did you mean 'seeds'?"]),
            ("seeds = 5", "seeds = 1", ["seeds", "greater than or equal to 2"]),
            ('mining = "semi-hard"', 'mining = "softly"', ["objectives.3.loss.mining", "softly", "semi-hard"]),
            ('name = "n-pair"', 'name = "n-pears"', ["objectives.4.loss.name", "did you mean 'n-pair'?"]),
            ('source = "fashion_mnist"', 'source = "mnist"', ["data: 'mnist' is listed twice"]),
            ('label = "supcon"', 'label = "n-pair"', ["objectives: 'n-pair' is listed twice"]),
            ('mining = "semi-hard"', 'mining = "batch-hard"', ["'triplet hard' and 'triplet semi-hard' have the same"]),
            ("learning_rate = 5e-3", "learning_rate = 0.2", ["batches: '2048 at 0.2' is listed twice"]),
            ('falls_least = "supcon"', 'falls_least = "supconn"', ["claims", "did you mean 'supcon'?"]),
            ("alphas = [0.25, 0.5, 0.75]", "alphas = [0.25, 1.0]", ["convergence.alphas.1", "less than 1"]),
            ("alphas = [0.25, 0.5, 0.75]", "alphas = [0.25, 0.25]", ["convergence.alphas: '0.25' is listed twice"]),
            ("[convergence.pair]\nname", "[convergence.pair]\nnome", ["convergence.pair"]),
            ("[[data]]", "[[data]", ["TOML"]),
        ],
    )
    def test_what_is_wrong_is_named_in_one_line(self, tmp_path: Path, old: str, new: str, words: list[str]) -> None:
        text = FILE.read_text()
        assert old in text
        path = tmp_path / "bad.toml"
        path.write_text(text.replace(old, new, 1))
        with pytest.raises(InvalidRecipe) as error:
            load_study(path)
        assert "\n" not in str(error.value)
        for word in words:
            assert word in str(error.value)

    def test_one_objective_is_the_baseline(self, tmp_path: Path) -> None:
        path = tmp_path / "bad.toml"
        text = FILE.read_text()
        path.write_text(text.replace('label = "n-pair"\n[objectives.loss]\nname = "n-pair"', 'label = "n-pair"'))
        with pytest.raises(InvalidRecipe, match="one objective has no loss and is the baseline; got 2"):
            load_study(path)

    def test_the_published_comparison_is_whole(self) -> None:
        study = load_study(FILE)
        runs = runs_of(study)
        paired = [run for run in runs if isinstance(run, ComparisonRun) and run.learning_rate in {1e-3, 1e-2, 0.2}]
        six = [each.loss for each in study.objectives if each.label != "info-nce"]
        settings = {
            (run.data.source, six.index(run.loss), run.batch_size, run.learning_rate, run.seed)
            for run in paired
            if run.loss in six
        }
        assert settings == {
            (source, loss, size, rate, seed)
            for source in ("mnist", "fashion_mnist")
            for loss in range(6)
            for size, rate in ((32, 1e-3), (256, 1e-2), (2048, 0.2))
            for seed in range(5)
        }
        assert len({run.key for run in runs}) == len(runs)
        assert {run.alpha for run in runs if isinstance(run, ConvergenceRun)} == {0.25, 0.5, 0.75, 1}

    def test_every_seed_of_what_is_paired_comes_before_what_stands_beside(self) -> None:
        study = load_study(FILE)
        runs = runs_of(study)
        beside = [isinstance(run, ComparisonRun) and run.learning_rate == 5e-3 for run in runs]
        assert beside == sorted(beside)
        seeds = [run.seed for run, is_beside in zip(runs, beside, strict=True) if not is_beside]
        assert seeds == sorted(seeds)


def test_every_setting_is_documented() -> None:
    page = (FILE.parents[1] / "docs" / "studies" / "README.md").read_text()
    models: list[type[Section]] = [Study]
    for model in models:
        for name, field in model.model_fields.items():
            if name not in {"loss", "data", "pair"}:  # those of recipes
                models += [part for part in (field.annotation, *get_args(field.annotation)) if _is_of_studies(part)]
            assert f"`{name}" in page or f"[{name}" in page, name
    assert len(models) == 10


def _is_of_studies(part: object) -> TypeGuard[type[Section]]:
    return isinstance(part, type) and issubclass(part, Section)


class TestRuns:
    def test_the_baseline_takes_the_steps_of_adam_on_both_parts(self, study: Study) -> None:
        run = of_kind(study, label="cross-entropy")
        images = load_images(run.data, image_size=8, data_root=None)
        torch.manual_seed(run.seed)
        layer = torch.nn.Linear(64, 16)
        head = LinearClassifier.initial(identities=10, width=16, seed=run.seed)
        optimizer = torch.optim.Adam([*layer.parameters(), *head.parameters()], lr=run.learning_rate)
        for batch_B in shuffled_batches(len(images.train_NP), run.batch_size, seed=run.seed, epoch=0):
            activation_BD = layer(images.train_NP[batch_B]).clamp_min(0)
            emb_BD = activation_BD / activation_BD.norm(dim=1, keepdim=True)
            loss = F.cross_entropy(emb_BD @ head.weight_ID.T + head.bias_I, images.train_labels_N[batch_B])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        result = run.run(images)
        assert result.final_loss == pytest.approx(loss.item(), rel=1e-3)
        with torch.no_grad():
            test_ND = F.normalize(layer(images.test_NP).clamp_min(0))
        assert result.accuracy == pytest.approx(head.accuracy(test_ND, images.test_labels_N), abs=0.01)
        assert result.accuracy > 0.5

    def test_the_second_stage_leaves_the_encoder_alone(self, study: Study) -> None:
        """Another classifier stage gives another accuracy of the same embedding."""
        run = of_kind(study, label="supcon")
        images = load_images(run.data, image_size=8, data_root=None)
        assert run.classifier is not None
        longer = run.model_copy(update={"classifier": run.classifier.model_copy(update={"epochs": 8})})
        one, other = run.run(images), longer.run(images)
        assert one.spread == other.spread
        assert one.sample == other.sample
        assert one.accuracy < other.accuracy

    def test_a_run_depends_on_its_settings_alone(self, study: Study) -> None:
        supcon = of_kind(study, label="supcon")
        draws = supcon.model_copy(update={"loss": MarginConfig(name="margin-based")})  # pairs, by the global generator
        for run in (supcon, draws, of_kind(study, alpha=0.5)):
            images = load_images(run.data, image_size=8, data_root=None)
            torch.manual_seed(1)
            before = torch.get_rng_state()
            one = run.run(images)
            assert torch.equal(torch.get_rng_state(), before)
            torch.manual_seed(2)
            other = run.run(images)
            timeless = {"seconds", "encoder_seconds", "classifier_seconds"}
            assert one.model_dump(exclude=timeless) == other.model_dump(exclude=timeless)

    def test_a_joint_run_is_classified_by_the_classifier_that_it_learns(self, study: Study) -> None:
        joint, alone = of_kind(study, alpha=0.5), of_kind(study, alpha=1.0)
        images = load_images(joint.data, image_size=8, data_root=None)
        curve, curve_alone = joint.run(images).curve, alone.run(images).curve
        assert curve[0] == curve_alone[0]
        assert [epoch for epoch, _ in curve] == pytest.approx([0, 0.5, 1], abs=0.05)
        assert curve[-1][1] > curve[0][1] + 0.1
        assert curve != curve_alone
        # Almost all of the loss is cross-entropy: almost the same curve.
        nearly = joint.model_copy(update={"alpha": 0.9999}).run(images).curve
        assert [at for _, at in nearly] == pytest.approx([at for _, at in curve_alone], abs=0.02)

    def test_weights_that_are_no_numbers_are_a_result_and_no_crash(self, study: Study) -> None:
        run = of_kind(study, label="supcon")
        images = load_images(run.data, image_size=8, data_root=None)
        broken = type(images)(
            train_NP=images.train_NP * torch.nan, train_labels_N=images.train_labels_N, test_NP=images.test_NP,
            test_labels_N=images.test_labels_N, identities=10,
        )  # fmt: skip
        result = run.run(broken)
        assert (result.accuracy, result.final_loss, result.spread, result.sample) == (0, None, None, None)

    def test_digits_are_trained_on_and_tested_apart(self) -> None:
        images = load_images(load_study(FILE).quick().data[0], image_size=8, data_root=None)
        pixels_NP = torch.cat([images.train_NP, images.test_NP])
        expected_NP = load_digits().images.reshape(-1, 64) / 16
        np.testing.assert_allclose(pixels_NP.numpy(), expected_NP, atol=0.5 / 255 + 1e-6)
        assert (len(images.train_NP), len(images.test_NP)) == (1198, 599)

    def test_the_encoder_gives_unit_vectors(self) -> None:
        config = load_study(FILE).quick().encoder
        images_NP = torch.rand(1500, 64)
        emb_ND = encode(new_encoder(config, seed=0), images_NP)
        assert emb_ND.shape == (1500, 256)
        torch.testing.assert_close(emb_ND.norm(dim=1), torch.ones(1500))
        assert (emb_ND >= 0).all()


def test_a_sample_counts_every_pair_once() -> None:
    generator = torch.Generator().manual_seed(0)
    emb_ND = F.normalize(torch.randn(40, 6, generator=generator))
    labels_N = torch.arange(40) % 4
    sample = sample_of(emb_ND, labels_N)
    counted = np.zeros((2, BINS), dtype=int)
    for first in range(40):
        for second in range(first):
            distance = float((emb_ND[first] - emb_ND[second]).norm())
            counted[int(labels_N[first] != labels_N[second]), int(distance / 2 * BINS)] += 1
    assert np.abs(counted - [sample.matching, sample.non_matching]).sum() <= 2  # a distance on the edge of two bins
    assert sum(sample.matching) == 4 * 45
    # Of all planes, that of the first two components holds the most.
    position_N2 = np.array(sample.positions)
    centred = emb_ND.numpy() - emb_ND.numpy().mean(0)
    held = np.square(position_N2).sum() / np.square(centred).sum()
    assert held == pytest.approx(sum(sample.variance), abs=1e-3)
    assert sum(sample.variance) > np.square(centred[:, :2]).sum() / np.square(centred).sum()
    assert distance_block(position_N2.astype(np.float32), position_N2.astype(np.float32)).max() < 2.01


class TestResuming:
    def test_what_is_done_is_not_done_again_and_what_has_changed_is(
        self, study: Study, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        out = tmp_path / "out"
        done, said = run_study(study, out)
        assert len(done.runs) == 12
        assert "are done already" not in said
        began: list[StudyRun] = []
        real = module._run
        monkeypatch.setattr(module, "_run", lambda run, *rest: (began.append(run), real(run, *rest))[1])
        again, said = run_study(study, out)
        assert began == []
        assert "12 of 12 runs are done already" in said
        assert again.results == done.results

        more = study.model_copy(update={"seeds": 3})
        run_study(more, out)
        assert len(began) == 6
        assert {run.seed for run in began} == {2}
        began.clear()

        stage = study.classifier_stage.model_copy(update={"epochs": 2})
        run_study(study.model_copy(update={"classifier_stage": stage}), out)
        assert len(began) == 4  # two seeds and two batches of the objective that has a second stage
        assert all(isinstance(run, ComparisonRun) and run.loss is not None for run in began)
        began.clear()

    def test_a_file_is_known_by_what_it_holds(
        self, study: Study, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        out = tmp_path / "out"
        run_study(study, out)
        damaged, old, other, *_ = sorted((out / "runs").glob("digits-comparison-*.json"))
        damaged.write_text(damaged.read_text()[:40])
        held = json.loads(old.read_text())
        del held["settings"]["data"]["max_bad_images"]  # as if that setting were newer than the file
        old.rename(old.with_name("renamed.json"))
        old.with_name("renamed.json").write_text(json.dumps(held))
        other.write_text(other.read_text().replace('"results_of": 1', '"results_of": 0'))
        began: list[StudyRun] = []
        real = module._run
        monkeypatch.setattr(module, "_run", lambda run, *rest: (began.append(run), real(run, *rest))[1])
        run_study(study, out)
        assert sorted(f"digits-comparison-{run.key}.json" for run in began) == sorted([damaged.name, other.name])

    def test_a_study_that_was_killed_goes_on_where_it_stopped(self, study: Study, tmp_path: Path) -> None:
        out, path = tmp_path / "out", tmp_path / "study.json"
        path.write_text(study.model_dump_json())
        program = (
            "import json, sys, time; from pathlib import Path; from rich.console import Console\n"
            "from training import study as module; from training.study.config import Study\n"
            "from training.sections import tuples\n"
            "real = module._run\n"
            "def slow(*arguments):\n"
            "    time.sleep(0.2)\n"  # so that the kill finds it at work
            "    return real(*arguments)\n"
            "module._run = slow\n"
            "study = Study.model_validate(tuples(json.loads(Path(sys.argv[1]).read_text())))\n"
            "module.perform(study, out=Path(sys.argv[2]), data_root=None, device='cpu', workers=1, console=Console())\n"
        )
        runs = out / "runs"
        with subprocess.Popen([sys.executable, "-c", program, path, out], stdout=subprocess.DEVNULL) as process:
            until = time.monotonic() + 300
            while len(list(runs.glob("*.json"))) < 2 and time.monotonic() < until and process.poll() is None:
                time.sleep(0.02)
            process.send_signal(signal.SIGKILL)
        kept = {each.name: each.read_bytes() for each in runs.glob("*.json")}
        assert 2 <= len(kept) < 12
        for content in kept.values():
            json.loads(content)
        done, said = run_study(study, out)
        assert f"{len(kept)} of 12 runs are done already" in said
        assert {name: (runs / name).read_bytes() for name in kept} == kept
        undisturbed, _ = run_study(study, tmp_path / "undisturbed")
        assert _accuracies(done) == _accuracies(undisturbed)

    @pytest.mark.slow  # each worker is a process that imports torch
    def test_workers_give_what_one_process_gives(self, study: Study, tmp_path: Path) -> None:
        few = study.model_copy(update={"batches": study.batches[:1]})
        assert _accuracies(run_study(few, tmp_path / "two", workers=2)[0]) == _accuracies(
            run_study(few, tmp_path / "one")[0]
        )

    def test_a_folder_that_is_not_this_studys_is_left_alone(self, study: Study, tmp_path: Path) -> None:
        (tmp_path / "notes.txt").write_text("mine")
        with pytest.raises(AlreadyExists, match="--out"):
            run_study(study, tmp_path)
        other = tmp_path / "other"
        other.mkdir()
        (other / "study.json").write_text('{"name": "other"}')
        with pytest.raises(AlreadyExists, match="holds the study 'other'; give another folder with --out"):
            run_study(study, other)
        (other / "study.json").write_text("[]")
        with pytest.raises(AlreadyExists, match="names no study"):
            run_study(study, other)
        assert sorted(path.name for path in tmp_path.iterdir()) == ["notes.txt", "other"]

    def test_absent_data_end_it_before_its_first_run(self, tmp_path: Path) -> None:
        with pytest.raises(InvalidDataset, match="--data"):
            run_study(load_study(FILE), tmp_path / "out")
        assert not list((tmp_path / "out").glob("runs/*"))

    def test_a_disk_that_refuses_is_named(self, study: Study, tmp_path: Path) -> None:
        (tmp_path / "file").write_text("")
        with pytest.raises((StorageFailed, AlreadyExists), match="--out"):
            run_study(study, tmp_path / "file" / "out")


def _accuracies(done: Done) -> list[object]:
    return [getattr(result, "accuracy", None) or getattr(result, "curve", None) for result in done.results]


def test_the_pair_loss_that_springs_show_is_the_one_compared() -> None:
    """The picture's loss and the study's contrastive objective are one function."""
    run = of_kind(load_study(FILE), label="contrastive")
    assert run.loss is not None
    assert run.loss.name == "contrastive"
    emb_BD = F.normalize(torch.rand(6, 4, generator=torch.Generator().manual_seed(0)))
    labels_B = torch.arange(6) % 2
    loss = build_loss(run.loss, identities=2, width=4)(emb_BD, labels_B).loss
    first, second = torch.triu_indices(6, 6, offset=1)
    dist_P = (emb_BD[first] - emb_BD[second]).norm(dim=1)
    expected = contrastive_loss(dist_P, labels_B[first] == labels_B[second], margin=run.loss.margin)
    torch.testing.assert_close(loss, expected)


def test_the_classifier_stage_is_fit_classifier(study: Study) -> None:
    run = of_kind(study, label="supcon")
    assert run.classifier is not None
    images = load_images(run.data, image_size=8, data_root=None)
    no_step = run.model_copy(update={"learning_rate": 1e-30})
    encoder = new_encoder(run.encoder, seed=run.seed)
    fitted = fit_classifier(
        encode(encoder, images.train_NP), images.train_labels_N, identities=10, epochs=run.classifier.epochs,
        batch_size=run.classifier.batch_size, learning_rate=run.classifier.learning_rate, seed=run.seed,
    )  # fmt: skip
    assert no_step.run(images).accuracy == fitted.accuracy(encode(encoder, images.test_NP), images.test_labels_N)
