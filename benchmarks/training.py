"""What a training step costs on the CPU: the settings that make it fast, the loss's share, and waiting for images.

    python -m benchmarks.training [--quick] [--json FILE]

Steps are forward, supervised contrastive loss, backward and AdamW, on one thread, in processor time; each setting has
processes of its own, since malloc's settings hold for a whole process, and these take turns. Waiting for images is in
time by the clock, over the first steps of the omniglot recipe, and left out where LOOKALIKE_DATA is unset.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from benchmarks.measure import Bar, machine, say_bars
from embedding.networks import Architecture, NetworkName, build
from embedding.runtime import tune_malloc
from training.config import load_recipe
from training.datasets import load
from training.losses.softmax import SupervisedContrastiveLoss
from training.precision import has_bf16
from training.splits import split
from training.trainer import Trainer

IMAGE_SIDE, IMAGES_PER_IDENTITY = 105, 4
SPEED_UP, LOSS_SHARE, BUSY_SHARE = 2.5, 0.05, 0.9
"""To reach: times the speed of a plain step; at most this share of a step for the loss; at least this share of the time
in which the network works."""


@dataclass(frozen=True)
class Setting:
    """How a network is trained."""

    network: NetworkName
    malloc: bool = False
    channels_last: bool = False
    bf16: bool = False

    def __str__(self) -> str:
        ways = [("malloc", self.malloc), ("channels_last", self.channels_last), ("bf16", self.bf16)]
        return f"{self.network}, " + (" + ".join(name for name, used in ways if used) or "plain fp32")


BF16 = has_bf16(torch.device("cpu"))
"""As training takes it: emulated, it is ten times as slow."""
PLAIN = Setting("small_cnn")
BEST = Setting("small_cnn", malloc=True, channels_last=True, bf16=BF16)
WITH_LOSS = Setting("resnet18", malloc=True, channels_last=True, bf16=BF16)
SETTINGS = (
    PLAIN,
    Setting("small_cnn", malloc=True),
    *([Setting("small_cnn", malloc=True, channels_last=True)] if BF16 else []),
    BEST,
    WITH_LOSS,
)


@dataclass(frozen=True, kw_only=True)
class Row:
    """One setting: milliseconds of a step, and of its loss, forward and backward."""

    setting: str
    batch: int
    step_ms: float
    loss_ms: float


def time_steps(setting: Setting, *, batch: int, steps: int) -> tuple[float, float]:
    """Least processor seconds of a step, and of the loss within it: in this process, which it changes for good."""
    torch.set_num_threads(1)
    if setting.malloc:
        tune_malloc()
    torch.manual_seed(0)
    memory_format = torch.channels_last if setting.channels_last else torch.contiguous_format
    network = build(Architecture(network=setting.network, image_size=IMAGE_SIDE, channels=1))
    network = network.train().to(memory_format=memory_format)
    optimizer = torch.optim.AdamW(network.parameters())
    loss = SupervisedContrastiveLoss()
    images_BCHW = torch.randn(batch, 1, IMAGE_SIDE, IMAGE_SIDE).contiguous(memory_format=memory_format)
    labels_B = torch.arange(batch) // IMAGES_PER_IDENTITY
    of_steps, of_losses = [], []
    for _ in range(steps + 1):  # the first sets things up
        start = time.process_time()
        optimizer.zero_grad(set_to_none=True)
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=setting.bf16):
            emb_BD = network(images_BCHW)
        leaf_BD = emb_BD.detach().float().requires_grad_()
        loss_start = time.process_time()
        torch.autograd.backward(loss(leaf_BD, labels_B).loss)
        of_losses.append(time.process_time() - loss_start)
        emb_BD.backward(leaf_BD.grad.to(emb_BD.dtype) if leaf_BD.grad is not None else None)
        optimizer.step()
        of_steps.append(time.process_time() - start)
    return min(of_steps[1:]), statistics.median(of_losses[1:])


def in_a_process(setting: Setting, *, batch: int, steps: int) -> tuple[float, float]:
    """`time_steps` in a process of its own."""
    arguments = json.dumps({**asdict(setting), "batch": batch, "steps": steps})
    command = [sys.executable, "-m", "benchmarks.training", "--of", arguments]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    step_s, loss_s = json.loads(done.stdout)
    return float(step_s), float(loss_s)


def measure(*, quick: bool) -> list[Row]:
    """Every setting, by turns; the least time of a step counts."""
    batch, steps, turns = (64, 2, 1) if quick else (128, 3, 3)
    found: dict[Setting, list[tuple[float, float]]] = {setting: [] for setting in SETTINGS}
    for _ in range(turns):
        for setting, times in found.items():
            times.append(in_a_process(setting, batch=batch, steps=steps))
    return [
        Row(
            setting=str(setting),
            batch=batch,
            step_ms=1e3 * min(step for step, _ in times),
            loss_ms=1e3 * statistics.median(loss for _, loss in times),
        )
        for setting, times in found.items()
    ]


def busy_share(*, steps: int) -> float | None:
    """The share of the first steps of omniglot in which the network did not wait for images; None without data."""
    data_root = os.environ.get("LOOKALIKE_DATA")
    recipe = load_recipe(Path(__file__).parents[1] / "recipes" / "omniglot.toml")
    if data_root is None:
        return None
    images = load(recipe.data, data_root=Path(data_root), preprocessing=recipe.preprocessing)
    training = recipe.training.model_copy(update={"steps": steps, "checkpoint_every": 0, "evaluate_every": 0})
    optimizer = recipe.optimizer.model_copy(update={"warmup_steps": 1})
    recipe = recipe.model_copy(update={"training": training, "optimizer": optimizer})
    torch.manual_seed(recipe.seed)
    trainer = Trainer(recipe, build(recipe.architecture), images.subset(split(images, recipe.split).train_N))
    result = trainer.fit()
    return 1 - result.seconds_waiting / result.seconds


def bars(rows: list[Row], busy: float | None) -> list[Bar]:
    """The three bars; the last only where it was measured."""
    of = {row.setting: row for row in rows}
    faster = of[str(PLAIN)].step_ms / of[str(BEST)].step_ms
    share = of[str(WITH_LOSS)].loss_ms / of[str(WITH_LOSS)].step_ms
    found = [
        Bar(name=f"{BEST} at 105 px, x plain fp32", value=faster, reach=SPEED_UP, holds=faster >= SPEED_UP),
        Bar(
            name="the loss's share of a resnet18 step at most", value=share, reach=LOSS_SHARE, holds=share < LOSS_SHARE
        ),
    ]
    if busy is not None:
        name = "share of the omniglot recipe's steps in which the network does not wait for images"
        found.append(Bar(name=name, value=busy, reach=BUSY_SHARE, holds=busy >= BUSY_SHARE))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="smaller batches and fewer steps")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures there too")
    parser.add_argument("--of", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.of is not None:
        given = json.loads(options.of)
        batch, steps = given.pop("batch"), given.pop("steps")
        print(json.dumps(time_steps(Setting(**given), batch=batch, steps=steps)))
        return
    torch.set_num_threads(1)
    where = machine()
    print(f"{where}\n\n| setting | B | step, ms | loss, ms | share of the loss |\n| --- | ---: | ---: | ---: | ---: |")
    rows = measure(quick=options.quick)
    for row in rows:
        share = row.loss_ms / row.step_ms
        print(
            f"| {row.setting} | {row.batch} | {row.step_ms:,.0f} | {row.loss_ms:.2f} | {100 * share:.2g} % |",
            flush=True,
        )
    verdicts = bars(rows, busy_share(steps=6 if options.quick else 20))
    say_bars(verdicts)
    if options.json is not None:
        report = {
            "machine": where,
            "rows": [asdict(row) for row in rows],
            "bars": [asdict(bar) for bar in verdicts],
        }
        options.json.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
