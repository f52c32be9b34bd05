"""NNI 3.0's one-shot strategies, step by step, for `benchmarks/strategies.py --nni`.

    python nni_peer.py SPACE STRATEGY BATCH SIZE THREADS

Runs under the Python that NNI is installed for, and knows nothing of nasfx. NNI's own strategy and
Lightning's own trainer train NNI's own form of the space. Each line on stdin is a step: a JSON list
of architectures in nasfx' form, one for each path that the step runs. For each, the milliseconds of
the step, from when its batch is there to when it is done, go to stdout: CPU time and time on the
wall. The line "update" runs an update of ENAS' controller over the paths since the last one, and is
answered in the same way.

NNI draws its paths as it does, which costs time, too. Then the paths of the line are set in their
stead, so that both sides run the same subnets. Logging of probabilities is switched off.
"""

from __future__ import annotations

import itertools
import json
import logging
import os
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch

warnings.filterwarnings("ignore")
logging.disable(logging.WARNING)

import pytorch_lightning as pl  # noqa: E402
from nni.nas import strategy as strategies  # noqa: E402
from nni.nas.evaluator.pytorch import Lightning, Trainer  # noqa: E402
from nni.nas.evaluator.pytorch.lightning import ClassificationModule  # noqa: E402
from nni.nas.hub.pytorch import DARTS, NasBench201, ProxylessNAS, ShuffleNetSpace  # noqa: E402
from nni.nas.oneshot.pytorch.supermodule.proxyless import ProxylessMixedRepeat  # noqa: E402

LEARNING_RATE = 0.025
NEVER = 10**9
Path = dict[str, Any]

# Model, classes.
SPACES: dict[str, tuple[Callable[[], Any], int]] = {
    "nasbench201": (NasBench201, 10),
    "proxyless": (
        lambda: ProxylessNAS(base_widths=(32, 16, 24, 40, 80, 96, 192, 320, 1280)), 1000,
    ),
    "shufflenet": (ShuffleNetSpace, 1000),
    "darts": (lambda: DARTS(width=16, num_cells=8, dataset="cifar"), 10),
}  # fmt: skip

STRATEGIES: dict[str, Callable[[], Any]] = {
    "darts": lambda: strategies.DARTS(log_prob_every_n_step=NEVER),
    "proxyless": lambda: strategies.Proxyless(log_prob_every_n_step=NEVER),
    "random": strategies.RandomOneShot,
    "enas": lambda: strategies.ENAS(
        batches_per_update=NEVER, log_prob_every_n_step=NEVER, reward_metric_name="val_acc",
        replay_buffer_size=10_000,
    ),
}  # fmt: skip


# -- nasfx' architectures in NNI's names -----------------------------------------------------------

STAGES = [range(4), range(4, 8), range(8, 12), range(12, 16), range(16, 20), range(20, 21)]


def translated(space: str, arch: Path) -> Path:
    return {
        "nasbench201": of_nasbench201, "proxyless": of_proxyless, "shufflenet": of_shufflenet,
        "darts": of_darts,
    }[space](arch)  # fmt: skip


def of_nasbench201(arch: Path) -> Path:
    edges = ((edge.split("<-"), name) for edge, name in arch.items())
    return {f"cell/{j}_{i}": name.removeprefix("nor_") for (i, j), name in edges}


def of_proxyless(arch: Path) -> Path:
    """Skipped blocks go to the end of their stage: NNI's spaces have depths."""
    path: Path = {}
    for s, blocks in enumerate(STAGES, 2):
        kept = [name for b in blocks if (name := arch[f"block{b}"]) != "zero"]
        path[f"s{s}_depth"] = len(kept)
        names = kept + ["k3e3"] * (len(blocks) - len(kept))
        path |= {f"s{s}_i{i}": name for i, name in enumerate(names)}
    return path


def of_shufflenet(arch: Path) -> Path:
    names = {"shuffle3": "k3", "shuffle5": "k5", "shuffle7": "k7", "xception": "xcep"}
    return {f"layer_{i + 1}": names[arch[f"block{i}"]] for i in range(20)}


def of_darts(arch: Path) -> Path:
    path: Path = {}
    for kind, node in itertools.product(("normal", "reduce"), range(2, 6)):
        for k, state in enumerate(arch[f"{kind}/{node}"]):
            path[f"{kind}/op_{node}_{k}"] = arch[f"{kind}/{node}<-{state}"]
            path[f"{kind}/input_{node}_{k}"] = [state]
    return path


# -- the run ---------------------------------------------------------------------------------------


class Batches:
    """For ever the batch, in the form that the strategy reads; ENAS takes turns with two."""

    def __init__(self, strategy: str, batch: Any) -> None:
        self.forms = {
            "darts": [{"train": batch, "val": batch}],
            "proxyless": [{"train": batch, "val": batch}],
            "random": [batch],
            "enas": [(batch, 0, 0), (batch, 0, 1)],
        }[strategy]

    def __iter__(self) -> Iterator[Any]:
        return itertools.cycle(self.forms)


class Clock(pl.Callback):
    """Waits for a line, and then times the step; sets the paths of that line."""

    def __init__(self, space: str, strategy: str, out: Any) -> None:
        self.space, self.strategy, self.out = space, strategy, out
        self.paths: list[Path] = []
        self.module: Any = None

    def attach(self, module: Any) -> None:
        self.module = module
        drawing = module.resample

        def resample() -> Any:
            drawn = drawing()
            if self.paths:
                set_path(module, self.paths.pop(0))
            return drawn

        module.resample = resample

    def on_train_batch_start(self, *_: Any) -> None:
        for line in sys.stdin:
            if line.strip() != "update":
                self.paths = [translated(self.space, arch) for arch in json.loads(line)]
                self.start()
                return
            self.start()
            self.module.policy.train()
            options, buffer = self.module.update_kwargs, self.module._replay_buffer
            for _ in range(options.get("update_times", 1)):
                self.module.policy.update(0, buffer, **options)
            buffer.reset()
            self.answer()
        os._exit(0)

    def on_train_batch_end(self, *_: Any) -> None:
        self.answer()

    def start(self) -> None:
        self.started = time.process_time(), time.perf_counter()

    def answer(self) -> None:
        ended = time.process_time(), time.perf_counter()
        taken = [1e3 * (b - a) for a, b in zip(self.started, ended, strict=True)]
        print(*taken, file=self.out, flush=True)


def set_path(module: Any, path: Path) -> None:
    for part in module.supernet_modules():
        if isinstance(part, ProxylessMixedRepeat):
            depth = path[part.depth_choice.label]
            for d in range(part.min_depth, part.max_depth):
                part.blocks[d].resample({part.blocks[d].label: str(int(d < depth))})
        elif "in_repeat_" not in str(getattr(part, "label", "")):
            part.resample(memo=dict(path))


def main() -> None:
    space, strategy, *numbers = sys.argv[1:]
    n, size, threads = map(int, numbers)
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever else is printed goes to stderr
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    build, classes = SPACES[space]
    batch = torch.randn(n, 3, size, size), torch.randint(classes, (n,))
    searcher = STRATEGIES[strategy]()
    searcher.train_dataloader = lambda *_: Batches(strategy, batch)
    model = searcher.mutate_model(build())
    training = ClassificationModule(
        learning_rate=LEARNING_RATE, optimizer=torch.optim.SGD, num_classes=classes
    )
    clock = Clock(space, strategy, out)
    trainer = Trainer(
        max_epochs=1, accelerator="cpu", logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, limit_val_batches=0,
        callbacks=[clock],
    )  # fmt: skip
    evaluator = Lightning(training, trainer, train_dataloaders=[batch], val_dataloaders=[batch])
    evaluator = searcher.mutate_evaluator(evaluator)
    evaluator.module.set_model(model)
    clock.attach(evaluator.module)
    trainer.fit(evaluator.module, evaluator.train_dataloaders)


if __name__ == "__main__":
    main()
