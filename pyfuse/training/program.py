"""What all programs of `pyfuse train` have in common: a run in a folder, from its options to its last checkpoint.

options -> material -> model -> loop -> checkpoints, table, picture

A new program is a `Program` (lm.py is the model to follow), its options and a row in pyfuse/cli/train.py. It supplies

    options       a subclass of `RunOptions` (options.py), often of `ModelOptions`; check_together() for what
                  contradicts each other
    material()    a `Material`: data (rows of a step: loop.Data), identity (what run.json keeps of it, so that a run
                  that goes on can tell that it is the same, or be given it again, as the tokenizer), files (what a
                  checkpoint has beside the model); a subclass adds what the program itself needs, as held-out text
    model()       a new `Transformer`, or that of --from; one to go on with is read here
    loss()        the mean over the targets of a batch that are not -100, as in loop.py
    evaluation()  a function that gives the figures of the model on what is held out, "loss" among them
    config()      the config.json of a checkpoint
    figures       the names of those figures: columns of log.csv; drawn: those with a curve of their own

and no more: folders, locks, processes, checkpoints, going on, and errors of the disk are the business of this file.
"""

from __future__ import annotations

import json
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar, Generic, NamedTuple, TextIO, TypeVar

import torch
from torch import Tensor

from pyfuse import ops as pyfuse_ops
from pyfuse.models import stock
from pyfuse.models.checkpoint import from_pretrained
from pyfuse.models.export import hf_tensors
from pyfuse.models.transformer import Transformer
from pyfuse.training import state
from pyfuse.training.belonging import Begin, Identity, Stored, begun, claim, hashed, last_checkpoint
from pyfuse.training.curves import Log, Picture
from pyfuse.training.errors import TrainingError
from pyfuse.training.loop import Batch, Data, Figures, Listener, Loss, Plan, Trainer
from pyfuse.training.options import DTYPES, RunOptions
from pyfuse.training.products import Products
from pyfuse.training.progress import progress
from pyfuse.training.world import World, joined

LOG, CURVES = "log.csv", "curves.png"
MODEL, OPTIMIZER = "model.safetensors", "optimizer.safetensors"


class Table(NamedTuple):
    """Something to show: rows under a title; right: the columns that hold numbers."""

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    right: Sequence[str]


@dataclass(frozen=True)
class Result:
    """figures: of what is held out, at the end. uniform: outcomes there are, the perplexity of knowing nothing.
    speed: tokens a second."""

    figures: Figures
    uniform: int
    speed: float
    steps: int
    seconds: float
    checkpoint: Path

    @property
    def loss(self) -> float:
        return self.figures["loss"]

    @property
    def perplexity(self) -> float:
        return perplexity(self.loss)

    def tables(self) -> list[Table]:
        """What there is to say beside the figures."""
        return []


def perplexity(loss: float) -> float:
    """exp(loss), and no error where that is beyond all numbers."""
    return math.exp(min(loss, 700.0))


@dataclass(frozen=True)
class Material:
    """What is learnt from (data), what identifies it (identity: for JSON), and the files of it in a checkpoint."""

    data: Data
    identity: Identity
    files: Mapping[str, bytes]


SomeOptions = TypeVar("SomeOptions", bound=RunOptions)
SomeMaterial = TypeVar("SomeMaterial", bound=Material)


class Program(ABC, Generic[SomeOptions, SomeMaterial]):
    """What a program supplies; see the head of this file.

    identified: the keys of its material's identity. drawn: figures that get a curve of their own beside the loss.
    """

    name: ClassVar[str]
    options: type[SomeOptions]
    identified: ClassVar[tuple[str, ...]]
    figures: ClassVar[tuple[str, ...]]
    drawn: ClassVar[tuple[str, ...]] = ()

    @abstractmethod
    def material(self, options: SomeOptions, stored: Stored | None, world: World) -> SomeMaterial:
        """stored: the run that goes on, with the keys `identified`; None for a new one.

        ValueError, FileNotFoundError: nothing to learn from. TrainingError: not what the run began with.
        """

    @abstractmethod
    def model(self, options: SomeOptions, material: SomeMaterial, ops: Any) -> Transformer:
        """A model to begin with; ops: see `Transformer`. ValueError: none can be made of these options."""

    @abstractmethod
    def loss(self, model: Any, batch: Batch) -> Tensor:
        """The mean over the targets of a batch."""

    def objective(self, options: SomeOptions) -> Loss:
        """What is minimised, where options change it: the loss itself by default."""
        return self.loss

    @abstractmethod
    def evaluation(
        self, model: Transformer, material: SomeMaterial, options: SomeOptions, world: World
    ) -> Callable[[], Figures]:
        """What all processes call together, each for its share; the same figures in all of them."""

    @abstractmethod
    def config(self, model: Transformer, material: SomeMaterial) -> dict[str, Any]:
        """config.json. ValueError: the model has no form to be saved in."""

    def uniform(self, model: Transformer) -> int:
        """Outcomes that a target may have."""
        return model.config.vocabulary


def run(
    program: Program[Any, Any], folder: Path, given: Mapping[str, Any], *, resume: bool = False,
    speak: TextIO | None = None,
) -> Result | None:  # fmt: skip
    """Train in a folder; None in all processes but the first.

    given: values of the program's options, the others are as by default, or as the run has them. resume: go on with
    the run that the folder holds. speak: where to say how it goes, stderr by default.

    ValueError, FileNotFoundError: options or material that do not do. TrainingError: everything else that can go wrong.
    """
    folder = Path(folder)
    stored: Stored | None = None
    if resume:
        options, stored = begun(folder, program.name, program.options, program.identified, given)
    else:
        options = program.options(**given)
    options.check()
    options.check_together(given if stored is None else ())
    gpu = torch.cuda.is_available()
    if options.device == "cuda" and not gpu:
        raise TrainingError("--device: cuda, but torch finds no GPU here")
    device = options.device or ("cuda" if gpu else "cpu")
    with ExitStack() as stack:
        stack.enter_context(_settings(options))
        options = replace(options, threads=torch.get_num_threads())
        world = stack.enter_context(joined(device))
        _check_share(options, world)
        if world.first and stored is None:
            state.refuse_used(folder)
        material = program.material(options, stored, world)
        begin = None
        if stored is not None:
            begin = last_checkpoint(folder, options, {n: stored[n] for n in program.identified})
        model = _model(program, options, material, begin)
        program.config(model, material)  # a model that cannot be saved is not trained
        if world.first:
            claim(stack, folder, program.name, options, material.identity, new=stored is None)
        return _Run(program, folder, options, material, model, world).go_on(begin, speak)


@contextmanager
def _settings(options: RunOptions) -> Iterator[None]:
    """torch's settings for the run, and back."""
    threads, before = torch.get_num_threads(), torch.are_deterministic_algorithms_enabled()
    deterministic: Any = torch.utils.deterministic
    fill = deterministic.fill_uninitialized_memory
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    if options.deterministic:
        torch.use_deterministic_algorithms(True)
        deterministic.fill_uninitialized_memory = False  # it takes time, and is for finding errors
    try:
        yield
    finally:
        torch.set_num_threads(threads)
        torch.use_deterministic_algorithms(before)
        deterministic.fill_uninitialized_memory = fill


def _check_share(options: RunOptions, world: World) -> None:
    if options.batch % world.size:
        raise ValueError(
            f"--batch: {options.batch} sequences cannot be shared evenly by {world.size} processes"
        )


# ---- the run ---------------------------------------------------------------------------------------


def _model(
    program: Program[Any, Any], options: RunOptions, material: Material, begin: Begin | None
) -> Transformer:
    ops = stock if options.stock else pyfuse_ops
    torch.manual_seed(options.seed)
    if begin is not None:
        model = from_pretrained(begin.folder, ops=ops, **begin.state["config"])
    else:
        model = program.model(options, material, ops)
    model.recompute(options.recompute)
    return model


class _Run(NamedTuple):
    program: Program[Any, Any]
    folder: Path
    options: RunOptions
    material: Material
    model: Transformer
    world: World

    def go_on(self, begin: Begin | None, speak: TextIO | None) -> Result | None:
        from safetensors.torch import load_file

        program, folder, options, world = self.program, self.folder, self.options, self.world
        model = self.model
        uniform = program.uniform(model)
        same_processes = begin is not None and len(begin.state["products"]) == world.size
        products = Products(
            begin.state["products"][world.rank] if begin and same_processes else None
        )
        step = begin.state["step"] if begin else None
        last: list[Path] = [] if begin is None else [begin.folder]
        picture = Picture(folder / LOG, folder / CURVES, math.log(uniform), program.drawn)

        def save(trainer: Trainer) -> None:
            made, optimizer = world.gathered(products.saved()), trainer.optimizer_tensors()
            if world.first:
                last[:] = [self.save(trainer.counters(), optimizer, made)]
                picture.draw_if_due(at_once=trainer.step == options.steps)

        with ExitStack() as stack:
            stack.enter_context(products.kept())
            listeners: tuple[Listener, ...] = ()
            if world.first:
                shown = stack.enter_context(progress(options.steps, step or 0, speak))
                listeners = (Log(folder / LOG, program.figures, step), shown)
            trainer = Trainer(
                model, program.objective(options), self.material.data,
                program.evaluation(model, self.material, options, world), _plan(options), world,
                save=save, listeners=listeners,
            )  # fmt: skip
            if begin is not None:
                trainer.restore(begin.state, load_file(begin.folder / OPTIMIZER))
            figures = trainer.run()
        if not world.first:
            return None
        speed = trainer.tokens / trainer.seconds
        return Result(figures, uniform, speed, trainer.step, trainer.seconds, last[0])

    def save(self, counters: Figures, optimizer: Mapping[str, Tensor], products: list[Any]) -> Path:
        """A checkpoint, which Hugging Face's libraries read as well."""
        from safetensors.torch import save

        config = self.program.config(self.model, self.material)
        described = {
            **counters,
            "config": vars(self.model.config),
            "products": products,
            "run": hashed(self.options, self.material.identity),
        }
        contents: dict[str, Callable[[], bytes]] = {
            "config.json": lambda: json.dumps(config, indent=1).encode() + b"\n",
            **{name: lambda data=data: data for name, data in self.material.files.items()},  # type: ignore[misc]
            MODEL: lambda: save(hf_tensors(self.model, config["model_type"]), {"format": "pt"}),
            OPTIMIZER: lambda: save(dict(optimizer)),
        }
        state.sync_file(self.folder / LOG)  # a checkpoint is not there without its rows
        return state.write_checkpoint(self.folder, described, contents)


def _plan(options: RunOptions) -> Plan:
    return Plan(
        options.steps, options.accumulate, options.lr, options.warmup, options.weight_decay, options.clip,
        DTYPES[options.dtype], options.seed, options.save_every, options.eval_every, options.parallel,
    )  # fmt: skip
