"""The environment in which chat templates of the hub are written, closed against templates that are not just templates.

Names, filters and rules are those of transformers' `apply_chat_template`. Refuses to know processes: it neither bounds time
nor memory, which no sandbox inside a process can. Source: transformers 5, utils/chat_template_utils.py.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Iterator
from datetime import datetime
from typing import Any

import jinja2
import jinja2.ext
from jinja2 import meta, nodes
from jinja2.exceptions import SecurityError
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace

# Whatever is imported at first use is imported by this.
WARM_UP = "{{ [strftime_now('%c'), {'a': 1} | tojson(indent=1)] }}{% generation %}{% endgeneration %}"

# Spelled out in a template they are an attempt to leave it: the sandbox would refuse them when they are reached, this is earlier.
_INTERNALS = (
    "base", "bases", "builtins", "class", "closure", "code", "dict", "func", "getattr", "getattribute", "globals", "import",
    "init", "init_subclass", "loader", "mro", "new", "reduce", "reduce_ex", "self", "setattr", "spec", "subclasses",
    "subclasshook",
)  # fmt: skip
_FRAMES = (
    "ag_await", "ag_code", "ag_frame", "cr_await", "cr_code", "cr_frame", "f_back", "f_builtins", "f_code", "f_globals",
    "f_locals", "func_closure", "func_code", "func_defaults", "func_globals", "gi_code", "gi_frame", "gi_yieldfrom", "mro",
    "tb_frame", "tb_next",
)  # fmt: skip


class Clock:
    """The time that `strftime_now` shows; whoever renders sets it."""

    now = datetime(1970, 1, 1)


class Generation(jinja2.ext.Extension):
    """`{% generation %}` marks the assistant's words for training; here its body is just printed."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: Any) -> nodes.Node | list[nodes.Node]:
        lineno = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.Scope(body).set_lineno(lineno)


class SafeNamespace(Namespace):
    """A namespace without underscores in front, through which internals could be reached."""

    def __init__(*args: Any, **kwargs: Any) -> None:  # no named self, so that namespace(self=...) works
        values = dict(*args[1:], **kwargs)
        for name in values:
            _check_name(name)
        Namespace.__init__(args[0], values)

    def __setitem__(self, name: str, value: Any) -> None:
        _check_name(name)
        Namespace.__setitem__(self, name, value)


class SafeDict:
    """`dict` as templates call it; the type itself would open its methods."""

    def __call__(self, *args: Any, **kwargs: Any) -> dict[Any, Any]:
        return dict(*args, **kwargs)

    def fromkeys(self, *args: Any) -> dict[Any, Any]:
        return dict.fromkeys(*args)


def _check_name(name: object) -> None:
    if isinstance(name, str) and name.startswith("_"):
        raise SecurityError(f"a namespace cannot hold {name!r}")


def raise_exception(message: str) -> None:
    """How a template refuses messages."""
    raise jinja2.TemplateError(message)


def tojson(
    value: Any, ensure_ascii: bool = False, indent: int | None = None, separators: Any = None, sort_keys: bool = False
) -> str:
    """JSON without escaped HTML, which no model was trained on."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


class Environment(ImmutableSandboxedEnvironment):
    """Jinja's sandbox, in which what is unsafe is refused at once: jinja's own prints nothing in its place and goes on."""

    def unsafe_undefined(self, obj: Any, attribute: str) -> jinja2.Undefined:
        raise SecurityError(f"access to attribute {attribute!r} of {type(obj).__name__!r} object is unsafe")


@functools.cache
def environment() -> Environment:
    """The one that all templates share: they can change nothing in it."""
    made = Environment(trim_blocks=True, lstrip_blocks=True, extensions=[Generation, jinja2.ext.loopcontrols])
    made.filters["tojson"] = tojson
    made.globals |= {
        "raise_exception": raise_exception,
        "strftime_now": lambda form: Clock.now.strftime(form),
        "namespace": SafeNamespace,
        "dict": SafeDict(),
    }
    return made


@functools.lru_cache(maxsize=32)
def compiled(source: str) -> jinja2.Template:
    """A template that was checked. Raises what jinja raises, and SecurityError."""
    tree = environment().parse(source)
    for problem in _problems(tree):
        raise SecurityError(problem)
    return environment().from_string(source)


def _problems(tree: nodes.Template) -> Iterator[str]:
    """What shows that a template is not just one."""
    for node in tree.find_all((nodes.Include, nodes.Import, nodes.FromImport, nodes.Extends)):
        yield f"{type(node).__name__.lower()} of another template, which no chat template has"
    for node in tree.find_all(nodes.Getattr):
        if node.attr.startswith("_") or node.attr in _FRAMES:
            yield f"access to attribute {node.attr!r} is unsafe"
    for node in tree.find_all(nodes.Const):
        found = [name for name in _INTERNALS if isinstance(node.value, str) and f"__{name}__" in node.value]
        if found:
            yield f"access to attribute '__{found[0]}__' is unsafe"


def found_in(source: str) -> dict[str, Any]:
    """What has to be known of a template before it is used: the names that it reads, and whether it goes through contents.

    Raises what `compiled` raises.
    """
    compiled(source)
    tree = environment().parse(source)
    names = meta.find_undeclared_variables(tree)
    return {"variables": sorted(names - environment().globals.keys()), "lists_content": _lists_content(tree)}


def _lists_content(tree: nodes.Template) -> bool:
    """Whether some loop of a template goes through a message's content, so that it takes a list of parts."""

    def is_content(node: nodes.Node) -> bool:
        while isinstance(node, nodes.Filter) and node.node is not None:
            node = node.node
        if isinstance(node, nodes.Name):
            return node.name in named
        if isinstance(node, nodes.Getitem):
            return isinstance(node.arg, nodes.Const) and node.arg.value == "content"
        return isinstance(node, nodes.Getattr) and node.attr == "content"

    named: set[str] = set()
    for node in tree.find_all(nodes.Assign):
        if isinstance(node.target, nodes.Name) and is_content(node.node):
            named.add(node.target.name)
    return any(is_content(node.iter) for node in tree.find_all(nodes.For))


def render(source: str, variables: dict[str, Any], now: datetime, max_rendered: int) -> str:
    """Fill in a template. Raises whatever templates raise, and ValueError for more than `max_rendered` characters."""
    Clock.now = now
    parts, size = [], 0
    for part in compiled(source).generate(variables):
        parts.append(part)
        size += len(part)
        if size > max_rendered:
            raise ValueError(f"more than {max_rendered:,} characters")
    return "".join(parts)


def one_line(error: BaseException, limit: int = 200) -> str:
    """What went wrong, for a message."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= limit else text[: limit - 3] + "..."
