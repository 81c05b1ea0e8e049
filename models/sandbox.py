"""A jinja2 sandbox in which a template can neither reach Python nor spend more than it is given.

A chat template comes with the checkpoint, and so from anybody. jinja2's ImmutableSandboxedEnvironment keeps it away from Python's
internals, but lets it run for ever and fill the memory: ten nested loops, `s ~ s` forty times, `'%999999999d' % 1`. Here every
iteration, call, filter, literal, concatenation and output is charged against a `Budget`, in units of about one character, and
whatever could make much from little in one step is bounded first or is not offered.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from typing import Any

from jinja2 import nodes, pass_context
from jinja2.compiler import CodeGenerator, Frame
from jinja2.exceptions import SecurityError
from jinja2.ext import Extension, loopcontrols
from jinja2.filters import FILTERS, do_indent
from jinja2.parser import Parser
from jinja2.runtime import Context, Undefined
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace, _PassArg
from jinja2.visitor import NodeTransformer

from r1q.models.budget import STRING_METHODS, Budget, charge_product, charge_replacing, joinable

BUDGET = "r1q budget"  # no template can spell a variable with a space
_WEIGH, _STEP = "r1q weigh", "r1q step"
_MAX_ARGUMENT = 100_000
_MAX_INDENT = 64
# Not offered: center, format, slice, wordwrap … (much from little), attr (reaches), random (differs), pprint, urlize, xmlattr.
_PLAIN_FILTERS = (
    *(
        "abs",
        "batch",
        "capitalize",
        "count",
        "d",
        "default",
        "dictsort",
        "e",
        "escape",
        "first",
        "float",
        "forceescape",
    ),
    *(
        "groupby",
        "int",
        "items",
        "last",
        "length",
        "list",
        "lower",
        "map",
        "max",
        "min",
        "reject",
        "rejectattr",
        "reverse",
    ),
    *(
        "round",
        "safe",
        "select",
        "selectattr",
        "sort",
        "string",
        "striptags",
        "sum",
        "title",
        "trim",
        "truncate",
        "unique",
    ),
    *("upper", "urlencode", "wordcount"),
)
_WIDENING = frozenset(("center", "expandtabs", "ljust", "rjust", "translate", "zfill"))


class SandboxedNamespace(Namespace):
    """jinja2's namespace without names that begin with an underscore."""

    def __init__(*args: Any, **kwargs: Any) -> None:  # `self` stays free for the template
        self = args[0]
        attributes: dict[str, Any] = dict(*args[1:], **kwargs)
        for name in attributes:
            _refuse_private(name)
        Namespace.__init__(self, attributes)

    def __setitem__(self, name: str, value: Any) -> None:
        _refuse_private(name)
        super().__setitem__(name, value)


class _Generation(Extension):
    """`{% generation %}` marks what an assistant says, for training; for us it is only its body."""

    tags = {"generation"}  # noqa: RUF012 (the base class says what it is)

    def parse(self, parser: Parser) -> nodes.Node | list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


class _Charged(NodeTransformer):
    """Puts a charge on everything in a template's syntax that neither a call nor a filter would charge for."""

    def visit_For(self, node: nodes.For) -> nodes.For:
        self.generic_visit(node)
        node.iter = _through(_STEP, node.iter)
        return node

    def visit_Concat(self, node: nodes.Concat) -> nodes.Concat:
        self.generic_visit(node)
        node.nodes = [_through(_WEIGH, part) for part in node.nodes]
        return node

    def visit_List(self, node: nodes.Expr) -> nodes.Expr:
        self.generic_visit(node)
        return _through(_WEIGH, node)

    visit_Dict = visit_List

    def visit_Tuple(self, node: nodes.Tuple) -> nodes.Expr:
        return self.visit_List(node) if node.ctx == "load" else node


class _ChargingGenerator(CodeGenerator):
    def visit_Template(self, node: nodes.Template, frame: Frame | None = None) -> None:
        super().visit_Template(_Charged().visit(node), frame)


class BoundedEnvironment(ImmutableSandboxedEnvironment):
    """The environment to compile chat templates in; render with a `Budget` under the name `BUDGET`."""

    code_generator_class = _ChargingGenerator
    intercepted_binops = frozenset({"+", "*", "**", "%"})

    def __init__(self) -> None:
        super().__init__(
            trim_blocks=True,
            lstrip_blocks=True,
            optimized=False,  # the optimizer would compute constants before any charge
            finalize=_output,
            extensions=[_Generation, loopcontrols],
        )
        filters = {name: _charged(FILTERS[name]) for name in _PLAIN_FILTERS}
        self.filters = {
            **filters,
            "indent": _indent,
            "join": _join,
            "replace": _replace,
            "tojson": _tojson,
            _WEIGH: _weigh,
            _STEP: _steps,
        }
        self.globals = {"range": self.globals["range"], "dict": dict, "namespace": SandboxedNamespace}

    def unsafe_undefined(self, obj: Any, attribute: str) -> Undefined:
        """Refuse at once: jinja2 itself would print an unsafe attribute as nothing."""
        raise SecurityError(f"it asks for the attribute {attribute!r} of a {type(obj).__name__}")

    def is_safe_attribute(self, obj: Any, attr: str, value: Any) -> bool:
        """Return jinja2's answer, and no for methods of strings that take a width."""
        if isinstance(obj, str) and attr in _WIDENING:
            return False
        return super().is_safe_attribute(obj, attr, value)

    def call(__self, __context: Context, __obj: Any, *args: Any, **kwargs: Any) -> Any:
        """Call `__obj` after charging for a step, the arguments, and what methods of strings will make of them."""
        budget = __context[BUDGET]
        budget.charge(budget.step)
        budget.weigh(args)
        budget.weigh(kwargs)
        method = getattr(__obj, "__wrapped__", __obj)  # jinja2 wraps str.format
        text = getattr(method, "__self__", None)
        if isinstance(text, str):
            budget.weigh(text)
            if before := STRING_METHODS.get(method.__name__):
                args = before(budget, text, args, kwargs)
        return super().call(__context, __obj, *args, **kwargs)

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        """Charge for what `+`, `*`, `**` and `%` make, before it is made."""
        budget = context[BUDGET]
        if operator == "%" and isinstance(left, str):
            raise SecurityError("formatting with % is not offered to chat templates; use ~")
        if operator in ("*", "**"):
            charge_product(budget, operator, left, right)
        elif not isinstance(left, int | float):
            budget.weigh(left)
            budget.weigh(right)
        return super().call_binop(context, operator, left, right)


def _through(name: str, node: Any) -> nodes.Filter:
    return nodes.Filter(node, name, [], [], None, None, lineno=node.lineno)


def _refuse_private(name: object) -> None:
    if isinstance(name, str) and name.startswith("_"):
        raise SecurityError(f"it stores the private name {name!r}")


@pass_context
def _weigh(context: Context, value: Any) -> Any:
    context[BUDGET].weigh(value)
    return value


_output = _weigh


@pass_context
def _steps(context: Context, values: Iterable[Any]) -> Iterable[Any]:
    """Charge for each item when a loop takes it; lists stay lists, whose length a loop may ask for."""
    budget: Budget = context[BUDGET]
    if isinstance(values, Undefined) or (isinstance(values, Collection) and not isinstance(values, range)):
        budget.charge(budget.step * len(values))
        return values
    return _stepping(budget, values)


def _stepping(budget: Budget, values: Iterable[Any]) -> Iterator[Any]:
    for value in values:
        budget.charge(budget.step)
        yield value


def _nothing(context: Context) -> tuple[Any, ...]:
    del context
    return ()


# What jinja2's own filters want before the value, by their mark.
_PASSED: Mapping[_PassArg | None, Callable[[Context], tuple[Any, ...]]] = {
    _PassArg.context: lambda context: (context,),
    _PassArg.eval_context: lambda context: (context.eval_ctx,),
    _PassArg.environment: lambda context: (context.environment,),
}


def _charged(function: Callable[..., Any]) -> Callable[..., Any]:
    """Return a filter of jinja2's that is charged for its input and its result."""
    first = _PASSED.get(_PassArg.from_obj(function), _nothing)

    @pass_context
    @functools.wraps(function, updated=())
    def charged(context: Context, value: Any, *args: Any, **kwargs: Any) -> Any:
        budget = context[BUDGET]
        budget.charge(budget.step)
        _weigh(context, value)
        for argument in (*args, *kwargs.values()):
            budget.weigh(argument)
            if isinstance(argument, int) and abs(argument) > _MAX_ARGUMENT:
                raise SecurityError(f"it gives a filter the number {argument}")
        result = function(*first(context), value, *args, **kwargs)
        budget.weigh(result)
        return result

    return charged


@pass_context
def _join(context: Context, value: Iterable[Any], d: str = "", attribute: str | int | None = None) -> str:
    if attribute is not None:
        value = context.environment.call_filter("map", value, kwargs={"attribute": attribute}, context=context)
    return str(d).join(joinable(context[BUDGET], str(d), value))


@pass_context
def _replace(context: Context, value: Any, old: Any, new: Any, count: int = -1) -> str:
    text, old, new = (str(_weigh(context, part)) for part in (value, old, new))
    charge_replacing(context[BUDGET], text, old, new)
    return text.replace(old, new, count)


@pass_context
def _indent(context: Context, s: Any, width: int | str = 4, first: bool = False, blank: bool = False) -> str:
    text = str(_weigh(context, s))
    size = width if isinstance(width, int) else len(width)
    if size > _MAX_INDENT:
        raise SecurityError(f"it indents text by {size}")
    context[BUDGET].charge(len(text) + size * (1 + len(text.splitlines())))
    return do_indent(text, width, first, blank)


@pass_context
def _tojson(
    context: Context,
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """Return JSON as transformers' templates expect it: not escaped for HTML."""
    budget = context[BUDGET]
    budget.weigh(separators)
    if indent is not None and not (isinstance(indent, int) and 0 <= indent <= _MAX_INDENT):
        raise SecurityError(f"it indents JSON by {indent!r}")
    encoder = json.JSONEncoder(ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)
    pieces = []
    for piece in encoder.iterencode(_weigh(context, value)):
        budget.charge(len(piece))
        pieces.append(piece)
    return "".join(pieces)
