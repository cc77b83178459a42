"""Causal language modelling by maximum likelihood: the program of `pyfuse train lm`.

options -> text -> tokenizer -> windows -> model -> loop -> checkpoints, table, picture
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple, TextIO

import torch
from torch import Tensor

from pyfuse import ops as pyfuse_ops
from pyfuse.models import stock
from pyfuse.models.checkpoint import from_pretrained
from pyfuse.models.export import hf_config, hf_tensors
from pyfuse.models.transformer import Transformer
from pyfuse.training import state, text, tokens
from pyfuse.training.curves import Log, Picture
from pyfuse.training.errors import TrainingError
from pyfuse.training.lm_model import evaluation, loss, new_config, pretrained
from pyfuse.training.lm_options import Options
from pyfuse.training.loop import Listener, Plan, Trainer
from pyfuse.training.options import DTYPES, resumed
from pyfuse.training.products import Products
from pyfuse.training.progress import progress
from pyfuse.training.windows import Windows, evenly
from pyfuse.training.world import World, joined

TOKENIZER, LOG, CURVES = "tokenizer.json", "log.csv", "curves.png"
MODEL, OPTIMIZER = "model.safetensors", "optimizer.safetensors"


class Result(NamedTuple):
    """loss, perplexity: of the held-out text. uniform: the perplexity of knowing nothing. speed: tokens a second."""

    loss: float
    perplexity: float
    uniform: int
    speed: float
    steps: int
    seconds: float
    checkpoint: Path


class Material(NamedTuple):
    """What is learnt from, what is held out, and what identifies them."""

    learnt: Windows
    held: list[Tensor]
    tokenizer: tokens.Tokenizer
    text_sha256: str


def run(
    folder: Path, given: Mapping[str, Any], *, resume: bool = False, speak: TextIO | None = None
) -> Result | None:
    """Train in a folder; None in all processes but the first.

    given: values of `Options`, the others are as by default, or as the run has them. resume: go on with the run that
    the folder holds. speak: where to say how it goes, stderr by default.

    ValueError, FileNotFoundError: options or text that do not do. TrainingError: everything else that can go wrong.
    """
    folder = Path(folder)
    stored = state.read_run(folder) if resume else None
    options = Options(**given) if stored is None else _options_of(stored, given, folder)
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
        material = _material(options, stored, world)
        begin = _checkpoint(folder, stored, options) if stored is not None else None
        model = _model(options, material, begin)
        hf_config(model.config, None)  # a model that cannot be saved is not trained
        if world.first:
            _claim(stack, folder, options, material, new=stored is None)
        return _train(folder, options, material, model.to(world.device), begin, world, speak)


def _options_of(stored: Mapping[str, Any], given: Mapping[str, Any], folder: Path) -> Options:
    if stored.get("program") != "lm":
        raise TrainingError(f"{folder}: a run of `pyfuse train {stored.get('program')}`")
    if not {"options", "text", "tokenizer"} <= stored.keys():
        raise TrainingError(f"{folder / state.RUN}: damaged, it lacks a part; nothing was changed")
    return resumed(Options, stored["options"], given)


@contextmanager
def _settings(options: Options) -> Iterator[None]:
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


def _check_share(options: Options, world: World) -> None:
    if options.batch % world.size:
        raise ValueError(
            f"--batch: {options.batch} sequences cannot be shared evenly by {world.size} processes"
        )


# ---- what is learnt from -------------------------------------------------------------------------


def _material(options: Options, stored: Mapping[str, Any] | None, world: World) -> Material:
    found = text.read_text(options.text)
    if stored is not None and found.sha256 != stored["text"]:
        raise TrainingError(
            "--text: is not the text that the run began with; give the same one, or begin anew with another --out"
        )
    learnt, held = text.split(found.documents, options.held_out)
    if stored is not None:
        tokenizer = tokens.from_json(stored["tokenizer"])
    else:  # made once, since a BPE of a large text takes a while
        made = _tokenizer(options, learnt).json if world.first else None
        tokenizer = tokens.from_json(world.from_first(made))
    windows, rest = (
        Windows(
            tokenizer.stream(part),
            options.context,
            seed=options.seed,
            count=options.batch * options.accumulate,
            what=what,
        )
        for part, what in ((learnt, "to learn from"), (held, "held out (--held-out)"))
    )
    return Material(windows, evenly(rest, options.eval_windows), tokenizer, found.sha256)


def _tokenizer(options: Options, documents: list[str]) -> tokens.Tokenizer:
    if options.from_ is not None:
        return tokens.from_folder(options.from_)
    if options.tokenizer == "bytes":
        return tokens.single_bytes()
    return tokens.train_bpe(documents, options.vocabulary)


# ---- the model -----------------------------------------------------------------------------------


class Begin(NamedTuple):
    """A checkpoint to go on from."""

    folder: Path
    state: dict[str, Any]


def _model(options: Options, material: Material, begin: Begin | None) -> Transformer:
    ops = stock if options.stock else pyfuse_ops
    torch.manual_seed(options.seed)
    if begin is not None:
        model = from_pretrained(begin.folder, ops=ops, **begin.state["config"])
    elif options.from_ is not None:
        model = pretrained(options, ops)
    else:
        model = Transformer(new_config(options, material.tokenizer.size), ops)
    if material.tokenizer.size > model.config.vocabulary:
        raise ValueError(
            f"--from: the tokenizer has {material.tokenizer.size} tokens, the model {model.config.vocabulary}"
        )
    model.recompute(options.recompute)
    return model


# ---- the run -------------------------------------------------------------------------------------


def _claim(
    stack: ExitStack, folder: Path, options: Options, material: Material, *, new: bool
) -> None:
    """Lock the folder and write what the run is: from here on it is there, and can go on."""
    folder.mkdir(parents=True, exist_ok=True)
    stack.enter_context(state.locked(folder))
    if new:
        state.refuse_used(folder)
    state.sweep(folder)
    described = {
        "format": state.FORMAT,
        "program": "lm",
        "options": options.stored(),
        "text": material.text_sha256,
        "tokenizer": material.tokenizer.json,
    }
    state.write_file(folder / state.RUN, json.dumps(described, indent=1).encode() + b"\n")


def identity(options: Options, text_sha256: str, tokenizer: str) -> str:
    """Of the run that a checkpoint belongs to."""
    fixed = json.dumps([options.fixed(), text_sha256, tokenizer], sort_keys=True)
    return hashlib.sha256(fixed.encode()).hexdigest()


def _checkpoint(folder: Path, stored: Mapping[str, Any], options: Options) -> Begin | None:
    """The last checkpoint; None before the first one."""
    found = state.checkpoints(folder)
    if not found:
        return None
    kept = state.read_checkpoint(found[-1])
    if kept["run"] != identity(options, stored["text"], stored["tokenizer"]):
        raise TrainingError(f"{found[-1]}: belongs to another run; nothing was changed")
    if kept["step"] > options.steps:
        raise TrainingError(
            f"--steps: {options.steps}, but the run has made {kept['step']} steps already"
        )
    return Begin(found[-1], kept)


def _train(
    folder: Path, options: Options, material: Material, model: Transformer, begin: Begin | None, world: World,
    speak: TextIO | None,
) -> Result | None:  # fmt: skip
    from safetensors.torch import load_file

    same_processes = begin is not None and len(begin.state["products"]) == world.size
    products = Products(begin.state["products"][world.rank] if begin and same_processes else None)
    evaluate = evaluation(model, material.held, options.batch, world)
    step = begin.state["step"] if begin else None
    last: list[Path] = [] if begin is None else [begin.folder]

    picture = Picture(folder / LOG, folder / CURVES, math.log(model.config.vocabulary))

    def save(trainer: Trainer) -> None:
        made = world.gathered(products.saved())
        if world.first:
            last[:] = [_save(folder, options, material, model, trainer, made)]
            picture.draw_if_due(at_once=trainer.step == options.steps)

    with ExitStack() as stack:
        stack.enter_context(products.kept())
        listeners: tuple[Listener, ...] = ()
        if world.first:
            shown = stack.enter_context(progress(options.steps, step or 0, speak))
            listeners = (Log(folder / LOG, step), shown)
        trainer = Trainer(
            model, loss, material.learnt, evaluate, _plan(options), world, save=save, listeners=listeners
        )  # fmt: skip
        if begin is not None:
            trainer.restore(begin.state, load_file(begin.folder / OPTIMIZER))
        figures = trainer.run()
    if not world.first:
        return None
    speed = trainer.tokens / trainer.seconds
    return Result(
        figures["loss"], figures["perplexity"], model.config.vocabulary, speed, trainer.step, trainer.seconds, last[0]
    )  # fmt: skip


def _plan(options: Options) -> Plan:
    return Plan(
        options.steps, options.accumulate, options.lr, options.warmup, options.weight_decay, options.clip,
        DTYPES[options.dtype], options.seed, options.save_every, options.eval_every,
    )  # fmt: skip


def _save(
    folder: Path, options: Options, material: Material, model: Transformer, trainer: Trainer, products: list[Any]
) -> Path:  # fmt: skip
    """A checkpoint, which Hugging Face's libraries read as well."""
    from safetensors.torch import save

    config = hf_config(model.config, material.tokenizer.end)
    described = {
        **trainer.counters(),
        "config": vars(model.config),
        "products": products,
        "run": identity(options, material.text_sha256, material.tokenizer.json),
    }
    contents: dict[str, Callable[[], bytes]] = {
        "config.json": lambda: json.dumps(config, indent=1).encode() + b"\n",
        TOKENIZER: lambda: material.tokenizer.json.encode(),
        MODEL: lambda: save(hf_tensors(model, config["model_type"]), {"format": "pt"}),
        OPTIMIZER: lambda: save({n: t.cpu() for n, t in trainer.optimizer_tensors().items()}),
    }
    state.sync_file(folder / LOG)  # a checkpoint is not there without its rows
    return state.write_checkpoint(folder, described, contents)
