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
from jinja2.filters import FILTERS
from jinja2.parser import Parser
from jinja2.runtime import Context, Undefined
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace, _PassArg
from jinja2.visitor import NodeTransformer

BUDGET = "r1q budget"  # no template can spell a variable with a space
_WEIGH, _STEP = "r1q weigh", "r1q step"
_ITEM_UNITS = 16  # weighing an item takes the time of many characters
_MAX_BITS = 4096
_MAX_ARGUMENT = 100_000
_MAX_INDENT = 16
# Not offered: center, format, indent, slice, wordwrap … (much from little), attr (reaches), random (differs), pprint, urlize, xmlattr.
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
_WIDENING = frozenset(("center", "expandtabs", "format", "format_map", "ljust", "rjust", "translate", "zfill"))


class Budget:
    """Units of work left to one rendering. `step` is what an iteration or a call costs, whatever it does."""

    def __init__(self, units: int, step: int) -> None:
        self.units, self.step = units, step

    def charge(self, units: int) -> None:
        """Take `units` away; raise `SecurityError` when they are not there."""
        self.units -= units
        if self.units < 0:
            raise SecurityError("it does more work than a chat template may")

    def weigh(self, value: object) -> None:
        """Charge for `value`: its characters, and everything inside of it."""
        if isinstance(value, str):
            self.charge(len(value))
        elif isinstance(value, Undefined) or not isinstance(value, Collection):
            self.charge(1)
        else:
            self.charge(_ITEM_UNITS * (1 + len(value)))
            for item in value:
                if isinstance(item, Namespace):
                    raise SecurityError("it puts a namespace into a list or a dict")
                self.weigh(item)
                if isinstance(value, Mapping):
                    self.weigh(value[item])


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
            "join": _join,
            "replace": _replace_filter,
            "tojson": _tojson,
            _WEIGH: _weigh,
            _STEP: _steps,
        }
        self.globals = {"range": self.globals["range"], "dict": dict, "namespace": SandboxedNamespace}

    def wrap_str_format(self, value: Any) -> Any:
        """Refuse str.format: a width in a format string makes any amount of text."""
        if super().wrap_str_format(value) is not None:
            raise SecurityError("str.format is not offered to chat templates; use ~")
        return None

    def unsafe_undefined(self, obj: Any, attribute: str) -> Undefined:
        """Refuse at once: jinja2 itself would print an unsafe attribute as nothing."""
        raise SecurityError(f"it asks for the attribute {attribute!r} of a {type(obj).__name__}")

    def is_safe_attribute(self, obj: Any, attr: str, value: Any) -> bool:
        """Return jinja2's answer, and no for methods of strings that take a width."""
        if isinstance(obj, str) and attr in _WIDENING:
            return False
        return super().is_safe_attribute(obj, attr, value)

    def call(__self, __context: Context, __obj: Any, *args: Any, **kwargs: Any) -> Any:
        """Call `__obj` after charging for a step, the arguments, and what strings' `join` and `replace` will make."""
        budget = __context[BUDGET]
        budget.charge(budget.step)
        budget.weigh(args)
        budget.weigh(kwargs)
        text = getattr(__obj, "__self__", None)
        if isinstance(text, str):
            budget.weigh(text)
            if __obj.__name__ == "join":
                args = (_joinable(budget, text, *args),)
            elif __obj.__name__ == "replace":
                _charge_replace(budget, text, *args)
        return super().call(__context, __obj, *args, **kwargs)

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        """Charge for what `+`, `*`, `**` and `%` make, before it is made."""
        budget = context[BUDGET]
        if operator == "%" and isinstance(left, str):
            raise SecurityError("formatting with % is not offered to chat templates; use ~")
        if operator in ("*", "**"):
            _charge_product(budget, operator, left, right)
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
    if isinstance(value, Namespace):
        raise SecurityError("it puts a namespace into text")
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
    items = (
        context.environment.call_filter("map", value, kwargs={"attribute": attribute}, context=context)
        if attribute
        else value
    )
    budget = context[BUDGET]
    return str(d).join(_joinable(budget, str(d), items))


def _joinable(budget: Budget, separator: str, items: Iterable[Any]) -> list[str]:
    texts = []
    for item in items:
        if isinstance(item, Namespace):
            raise SecurityError("it puts a namespace into text")
        budget.charge(len(separator) + 1)
        budget.weigh(item)
        texts.append(str(item))
    return texts


@pass_context
def _replace_filter(context: Context, value: Any, old: Any, new: Any, count: int = -1) -> str:
    text, old, new = str(_weigh(context, value)), str(_weigh(context, old)), str(_weigh(context, new))
    _charge_replace(context[BUDGET], text, old, new)
    return text.replace(old, new, count)


def _charge_replace(budget: Budget, text: str, old: object, new: object, count: object = None) -> None:
    if isinstance(old, str) and isinstance(new, str):
        budget.charge(len(text) + (len(text) // max(1, len(old)) + 1) * len(new))


def _charge_product(budget: Budget, operator: str, left: Any, right: Any) -> None:
    """Charge for a repetition; refuse numbers of more than `_MAX_BITS` bits."""
    for sequence, times in ((left, right), (right, left)):
        if isinstance(sequence, Collection) and isinstance(times, int):
            if isinstance(sequence, str):
                budget.charge(len(sequence) * max(0, times))
            else:
                for item in sequence:
                    budget.weigh(item)
                budget.charge(len(sequence) * max(0, times))
            return
    if isinstance(left, int) and isinstance(right, int):
        bits = left.bit_length() * abs(right) if operator == "**" else left.bit_length() + right.bit_length()
        if bits > _MAX_BITS:
            raise SecurityError("it computes with enormous numbers")


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
