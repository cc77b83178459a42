"""`pyfuse generate`: text from a model, or a conversation with it."""

import argparse
import importlib.util
import io
import os
import sys
from pathlib import Path

import torch

from pyfuse.cli import answers, chat, knobs, machine
from pyfuse.generation.options import Options
from pyfuse.generation.runner import CacheFull
from pyfuse.generation.text import Tokenizer
from pyfuse.models import zoo
from pyfuse.models.transformer import Transformer

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
_DESCRIPTION = """\
Answers prompts, or continues them, or talks in the terminal where no prompt is given.

MODEL is a folder (config.json, safetensors and a tokenizer), a GGUF file, or `smollm2` (see `pyfuse models`). A model
with a chat template answers; with --raw, or without a template, it continues the text as it is. The likeliest token
is taken each time, unless there is a temperature, or beams.
"""
_EXAMPLES = f"""\
examples:
  pyfuse generate smollm2
  pyfuse generate smollm2 --prompt "Why is the sky blue?" --stream
  pyfuse generate smollm2 --prompt "A haiku." "A limerick." --temperature 0.7 --top-p 0.9 --n 3 --seed 7
  pyfuse generate ./gpt2 --raw --prompt "Once upon a time" --beams 4 --length-penalty 0.8 --max-new-tokens 60
  pyfuse generate model.gguf --prompt-file question.txt --stop "Question:" --json
  git diff | pyfuse generate smollm2 --system "Describe this change in one sentence."

In a conversation Ctrl-C stops the answer, Ctrl-D or /bye leaves, and /reset forgets what was said; an answer has at
most {chat.ANSWER} tokens there, unless --max-new-tokens says otherwise.
"""


class Refused(Exception):
    """What is asked for cannot be done; the message says why. status: the exit status."""

    def __init__(self, message: object, status: int = 1) -> None:
        super().__init__(str(message))
        self.status = status


def add_parser(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add `generate`."""
    parser = commands.add_parser(
        "generate",
        help="continue or answer a prompt, or talk with a model",
        description=_DESCRIPTION,
        epilog=_EXAMPLES,
        usage="%(prog)s MODEL [--prompt TEXT ... | --prompt-file FILE] [OPTION ...]",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("model", metavar="MODEL", help="a folder, a GGUF file, or smollm2")
    _add_prompts(parser)
    knobs.add(parser)
    _add_forms(parser.add_argument_group("what is printed"))
    _add_running(parser.add_argument_group("running"))
    parser.set_defaults(run=run)


def _add_prompts(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("prompts")
    one = group.add_mutually_exclusive_group()
    one.add_argument(
        "--prompt", nargs="+", action="extend", metavar="TEXT", help="what to answer; several are run together"
    )  # fmt: skip
    one.add_argument(
        "--prompt-file", metavar="FILE", help="the same, as what a file has; - for standard input, which is read "
        "without this as well, if it is no terminal",
    )  # fmt: skip
    group.add_argument(
        "--system", metavar="TEXT", help="what the model is told before a conversation"
    )
    group.add_argument(
        "--raw", "--no-chat-template", action="store_true", help="continue the text, without the chat template"
    )  # fmt: skip


def _add_forms(group: "argparse._ArgumentGroup") -> None:
    group.add_argument("--stream", action="store_true", help="show the text as it grows")
    group.add_argument(
        "--json", action="store_true", help="print a line of JSON for each result: text, tokens, why it ended, times"
    )  # fmt: skip


def _add_running(group: "argparse._ArgumentGroup") -> None:
    group.add_argument(
        "--dtype", choices=tuple(DTYPES), help="of the weights (default: as they are there; GGUF: fp32)"
    )  # fmt: skip
    for name, what in answers.STORED.items():
        group.add_argument(f"--{name}", choices=("model", "int8"), help=what)
    group.add_argument(
        "--threads", type=_threads, metavar="N", help="CPU threads (default: physical cores)"
    )


def _threads(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"got {text!r}, needs a number of threads, at least 1")
    return int(text)


def run(arguments: argparse.Namespace) -> int:
    """2 for wrong usage; 1 for what cannot be done: no such model, options that contradict each other."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # models know more characters than some terminals
    try:
        _run(arguments)
    except Refused as refusal:
        print(f"pyfuse generate: {refusal}", file=sys.stderr)
        return refusal.status
    except BrokenPipeError:  # whoever read the text has had enough of it
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    return 0


def _run(arguments: argparse.Namespace) -> None:
    asked = arguments.prompt is not None or arguments.prompt_file is not None
    if sys.stdin is None and (not asked or arguments.prompt_file == "-"):
        raise Refused("standard input is closed; give a --prompt", 2)
    talks = not asked and sys.stdin.isatty()
    _check_usage(arguments, talks)
    _check_packages(arguments.model)
    try:
        options = Options(**knobs.given(arguments))
    except ValueError as error:
        raise Refused(knobs.in_flags(error)) from error
    prompts = [] if talks else _prompts(arguments)
    torch.set_num_threads(arguments.threads or machine.default_threads())
    tokenizer, model = _load(arguments)
    try:
        if talks:
            chat.Chat(model, tokenizer, options, arguments).run()
        else:
            answers.answer(model, tokenizer, options, prompts, arguments)
    except (ValueError, MemoryError, CacheFull) as error:
        raise Refused(knobs.in_flags(error, *answers.STORED)) from error


def _check_usage(arguments: argparse.Namespace, talks: bool) -> None:
    """What is known to make no sense before anything is loaded."""
    a, given = arguments, vars(arguments)
    several, searches = given.get("n", 1) > 1, given.get("beams", 1) > 1
    wrong = {
        "--system: a message of the chat template, which --raw leaves out": a.raw and a.system is not None,
        "--stream: shows a text, but --json prints results": a.stream and a.json,
        "--stream: shows one text as it grows, but --n asks for several": a.stream and several,
        "--stream: beam search (--beams) has no text before its end": a.stream and searches,
        "--logprobs: told by --json alone": "logprobs" in given and not a.json,
        "--raw: a conversation needs the chat template; give a --prompt": talks and a.raw,
        "--json: a conversation has no results; give a --prompt": talks and a.json,
        "--n: a conversation has one answer at a time; give a --prompt": talks and several,
        "--beams: a conversation shows its text as it grows; give a --prompt": talks and searches,
    }  # fmt: skip
    for message, is_so in wrong.items():
        if is_so:
            raise Refused(message, 2)


def _check_packages(model: str) -> None:
    needed = ["transformers", "safetensors"]
    needed += ["gguf", "accelerate"] if model.endswith(".gguf") else []
    missing = [name for name in needed if importlib.util.find_spec(name) is None]
    if missing:
        raise Refused(f"it needs {' and '.join(missing)}: pip install 'pyfuse[hf]'")


def _prompts(arguments: argparse.Namespace) -> list[str]:
    """The texts, without the line ends after a file's."""
    if arguments.prompt is not None:
        where, texts = "--prompt", arguments.prompt
    else:
        name = arguments.prompt_file or "-"
        where = "standard input" if name == "-" else name
        try:
            whole = sys.stdin.read() if name == "-" else Path(name).read_text(encoding="utf-8")
        except OSError as error:
            raise Refused(f"--prompt-file: {where}: {error.strerror}") from error
        except UnicodeDecodeError as error:
            raise Refused(f"{where}: no text in UTF-8 ({error.reason})") from error
        texts = [whole.rstrip("\r\n")]
    if "" in texts:
        raise Refused(f"{where}: the prompt is empty", 2)
    return list(texts)


def _load(arguments: argparse.Namespace) -> tuple[Tokenizer, Transformer]:
    """The model and its tokenizer."""
    _keep_offline()
    from safetensors import SafetensorError

    from pyfuse.models.checkpoint import from_pretrained

    name = arguments.model
    try:
        path = zoo.folder(name)
        if not path.exists():
            known = ", ".join(zoo.MODELS)
            raise Refused(f"{name}: no such folder or GGUF file, nor one of the models {known}")
        tokenizer = Tokenizer.of(path)
        dtype = None if arguments.dtype is None else DTYPES[arguments.dtype]
        model = from_pretrained(path, dtype=dtype)
    except (FileNotFoundError, ValueError) as error:
        raise Refused(error) from error
    except OSError as error:
        raise Refused(f"{error.filename}: {error.strerror}") from error
    except SafetensorError as error:
        raise Refused(f"{name}: its weights cannot be read: {error}") from error
    if model.config.head != "lm" or not model.config.causal:
        raise Refused(f"{name}: no language model, it has no logits of a next token")
    return tokenizer, model


def _keep_offline() -> None:
    """Keep transformers off the network and quiet. It reads the variable when it is imported."""
    os.environ["HF_HUB_OFFLINE"] = "1"
    from transformers.utils import logging

    logging.disable_progress_bar()  # type: ignore[no-untyped-call, unused-ignore]
    logging.set_verbosity_error()  # type: ignore[no-untyped-call, unused-ignore]
