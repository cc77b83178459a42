"""Recognise a method by its code.

The fused methods replace exactly the bodies that they were written for, in whatever class these
stand (Mistral's and Qwen's feed-forward block is Llama's), and nothing else.
"""

from __future__ import annotations

import ast
import hashlib
import inspect
import io
import textwrap
import tokenize
from collections.abc import Callable
from functools import cache
from typing import Any


@cache
def fingerprint(function: Callable[..., Any], decorated: bool = False) -> str | None:
    """A hash of the parameters' names and of the body; None: no source, or a decorator.

    decorated: decorators do no harm where the method itself is called; their names are hashed too.
    """
    try:
        source = textwrap.dedent(inspect.getsource(function))
    except (OSError, TypeError):  # no source file: a frozen or interactive class
        return None
    definition = ast.parse(source).body[0]
    if not isinstance(definition, ast.FunctionDef):
        return None
    decorators = [f"@{ast.unparse(d)}" for d in definition.decorator_list]
    if decorators and not decorated:
        return None  # a decorator may do anything
    body = definition.body
    if isinstance(body[0], ast.Expr) and isinstance(body[0].value, ast.Constant):
        body = body[1:]
    names = [
        a.arg
        for a in (*definition.args.posonlyargs, *definition.args.args, *definition.args.kwonlyargs)
    ]
    code = _without_comments(source).splitlines()[body[0].lineno - 1 :] if body else []
    text = "\n".join(
        [*decorators, ",".join(names), *(line.rstrip() for line in code if line.strip())]
    )
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _without_comments(source: str) -> str:
    lines = source.splitlines()
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT:
            row, column = token.start
            lines[row - 1] = lines[row - 1][:column]
    return "\n".join(lines)
