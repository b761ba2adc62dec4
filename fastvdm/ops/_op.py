"""How an op becomes a ``torch.library`` op: schema, opaque body, fakes, gradient, launchers.

Everything is derived from the signature of the forward. For a gradient, ``backward`` names what its
launcher takes and ``grads`` what it returns::

    @op("linear", backward="dy x weight", grads="x:dx weight:dw bias:db")
    def linear_fwd(x: Tensor, weight: Tensor, bias: Tensor | None, backend: str) -> Tensor:
        return x.new_empty((*x.shape[:-1], weight.shape[0]))  # the fake: outputs without data

One argument may be a NamedTuple. The schema, ``run`` and C++ have its fields instead; the fake and
Triton's launchers get the NamedTuple.

``torch.library.custom_op`` does more on every call: it reads the schema back from C++ to fill in
defaults, and it looks for outputs that alias inputs. Here ``opcheck`` looks for aliases in the
tests. ``run`` in ``_call`` saves even more.
"""

from __future__ import annotations

import inspect
import types
from collections.abc import Callable
from typing import Any, NamedTuple, get_type_hints

import torch
from torch import Tensor
from torch._ops import OpOverload

from fastvdm.ops._call import BODIES, DENSE, NODES, TENSORS, body_of, gathered, observed, run

NAMESPACE = "fastvdm"
_LIBRARY = torch.library.Library(NAMESPACE, "FRAGMENT")


def define(body: Callable[..., Any]) -> OpOverload:
    """Define the op ``fastvdm::<name of body>``. It mutates nothing and returns no alias of an
    input. ``body`` runs it on every device; the compiler and autograd do not look into it."""
    name = body.__name__
    schema = torch.library.infer_schema(body, mutates_args=())
    _LIBRARY.define(name + schema, tags=(torch.Tag.pt2_compliant_tag,))
    # torch.compiler.disable would import dynamo here, which takes longer than importing fastvdm.
    _LIBRARY.impl(name, torch._disable_dynamo(body), "CompositeExplicitAutograd")
    BODIES[name] = body
    found = getattr(getattr(torch.ops, NAMESPACE), name).default
    types = [str(a.type) for a in found._schema.arguments]
    TENSORS[name] = tuple(i for i, t in enumerate(types) if "Tensor" in t)
    return found


def fake(op: OpOverload) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Decorate the function that makes the op's outputs without data."""
    return torch.library.register_fake(op, lib=_LIBRARY)


def autograd(
    op: OpOverload,
    backward: Callable[..., Any],
    setup_context: Callable[[Any, tuple, Any], None] | None = None,
) -> None:
    """Give ``op`` its gradient, like ``torch.library.register_autograd``: ``backward(ctx, *grads)``
    returns one gradient or None per argument, and ``setup_context(ctx, inputs, output)`` saves what
    it needs."""
    # The dispatcher drops trailing arguments that equal their default.
    defaults = tuple(a.default_value for a in op._schema.arguments)

    name = op._opname

    def node(heard: bool) -> Any:
        def forward(ctx: Any, *inputs: Any) -> Any:
            with torch._C._AutoDispatchBelowAutograd():
                out = (op if heard else BODIES[name])(*inputs)
            if setup_context is not None:
                setup_context(ctx, inputs, out)
            return out

        methods = {"forward": staticmethod(forward), "backward": staticmethod(backward)}
        # A profile shows this name with "Backward" appended.
        return type(name + "_", (torch.autograd.Function,), methods)

    heard, unheard = node(True), node(False)

    def through_dispatcher(*args: Any) -> Any:
        args += defaults[len(args) :]
        if torch.is_grad_enabled() and torch._C._any_requires_grad(*args):
            return (heard if observed(name, args) else unheard).apply(*args)
        with torch._C._AutoDispatchBelowAutograd():
            return op(*args)

    # Function.apply first handles the transforms of torch.func; ``run`` has excluded them.
    NODES[name] = super(torch.autograd.Function, unheard).apply
    _LIBRARY.impl(name, through_dispatcher, "Autograd")


def no_double_backward(op: OpOverload) -> None:
    """Make differentiating the backward op ``op`` an error with advice."""
    name = op._opname.removesuffix("_bwd")

    def refuse(ctx: Any, *_: Any) -> Any:
        raise RuntimeError(
            f"{name} has no double backward; for higher-order gradients run it under "
            "fastvdm.use_backend('reference')"
        )

    autograd(op, refuse)


def op(
    stem: str,
    *,
    backward: str = "",
    grads: str = "",
    outputs: str = "y",
    residual: str = "",
    strided: str = "",
    laid_out: str = "",
    seed: Callable[[Tensor], Tensor] = Tensor.contiguous,
    unsaved: Callable[[dict[str, Any]], dict[str, Any]] | None = None,
    backward_body: Callable[..., Any] | None = None,
    shares: OpOverload | None = None,
) -> Callable[[Callable[..., Any]], OpOverload]:
    """Declare the op ``<name>_fwd`` and, given ``grads``, its backward op ``<name>_bwd``.

    The decorated function is the fake. Its last argument, ``backend``, selects the launcher: the
    one of the same name in the file ``stem``, which takes the other arguments.

    Args:
        stem: name of the op file and of its launchers' files.
        backward: what the backward's launcher takes, in order: the gradient of the first output,
            then arguments and outputs of the forward. One flag per group of ``grads`` follows.
        grads: "argument:group", in the order in which the launcher returns the gradients. The
            gradients of a group are computed together if ``need_<group>`` is set; "argument!" is
            always computed. Each has the shape and dtype of its argument, contiguous, or is (0,) if
            it is not needed or its argument is None. If ``backward`` leaves the argument out (a
            bias), the gradient is shaped like one row of the first output's gradient.
        outputs: names of the forward's outputs. Only the first has a gradient. An output with the
            name of an argument is saved in its place if that argument is None.
        residual: an argument whose gradient is that of the first output.
        strided: arguments that launchers take with any strides; ``run`` makes the others
            contiguous.
        laid_out: arguments whose gradient has their strides, as from ``torch.empty_like``.
        seed: converts the gradient of the first output to the form that the launcher takes.
        unsaved: may replace values that the backward does not need, by name, before they are saved.
        backward_body: body of the backward, if it is not a single launcher; it gets every argument.
        shares: another op's backward, used instead of an own one.
    """

    def declare(fake_of: Callable[..., Any]) -> OpOverload:
        name = fake_of.__name__
        kinds = inspect.get_annotations(fake_of, eval_str=True)
        result, value, names = kinds.pop("return"), _value(kinds), list(_flat(kinds))
        forward = _declare(name, _flat(kinds), result, body_of(stem, name, value))
        fake(forward)(lambda *args: fake_of(*gathered(args, value)))
        free = [names.index(n) for n in strided.split()]
        DENSE[name] = tuple(i for i in TENSORS[name] if i not in free)
        if grads:
            takes = {n: kinds.get(n, Tensor) for n in backward.split()}
            wanted = [_Grad(*g.partition(":")[::2]) for g in grads.split()]
            back = shares
            if back is None:
                back = _declare_backward(
                    name, takes, wanted, laid_out.split(), backward_body or stem
                )
            _connect(
                forward, back, names, list(_flat(takes))[1:], wanted, outputs.split(),
                residual.split(), seed, unsaved,
            )  # fmt: skip
        return forward

    return declare


def backward_of(op: OpOverload) -> OpOverload:
    """The backward op that was declared with ``op``."""
    name = _backward_name(op._opname)
    return getattr(getattr(torch.ops, NAMESPACE), name).default


def _backward_name(name: str) -> str:
    return name.removesuffix("_fwd") + "_bwd"


class _Grad(NamedTuple):
    """A gradient that a backward computes: always ("x!", ""), or if its group is needed."""

    spelled: str
    group: str

    @property
    def argument(self) -> str:
        return self.spelled.rstrip("!")


def _groups(wanted: list[_Grad]) -> list[str]:
    """The groups, in the order of their flags."""
    return list(dict.fromkeys(g.group for g in wanted if not g.spelled.endswith("!")))


def _value(kinds: dict[str, Any]) -> tuple[int, Any] | None:
    """(position, class) of the NamedTuple among the arguments, or None."""
    places = enumerate(kinds.values())
    return next(((i, kind) for i, kind in places if hasattr(kind, "_fields")), None)


def _flat(kinds: dict[str, Any]) -> dict[str, Any]:
    """The arguments, with the NamedTuple replaced by its fields."""
    found: dict[str, Any] = {}
    for name, kind in kinds.items():
        found |= get_type_hints(kind) if hasattr(kind, "_fields") else {name: kind}
    return found


def _declare(name: str, kinds: dict[str, Any], result: Any, body: Callable[..., Any]) -> OpOverload:
    """Define ``body`` as an op with this name, these argument types and this result."""

    def call(*args: Any) -> Any:
        return body(*args)

    kind = inspect.Parameter.POSITIONAL_OR_KEYWORD
    parameters = [inspect.Parameter(n, kind, annotation=a) for n, a in kinds.items()]
    call.__signature__ = inspect.Signature(parameters, return_annotation=result)  # type: ignore[attr-defined]
    call.__name__ = call.__qualname__ = name
    call.__annotations__ = {**kinds, "return": result}
    found = define(call)
    BODIES[name] = body  # saves a Python frame
    DENSE[name] = ()  # a backward gets what was saved
    return found


def _declare_backward(
    forward: str,
    takes: dict[str, Any],
    wanted: list[_Grad],
    laid_out: list[str],
    body: Callable[..., Any] | str,
) -> OpOverload:
    """Declare the backward op. Its fake gives each gradient the form of its argument. ``body`` is
    its body, or the file of its launcher."""
    name = _backward_name(forward)
    arguments = _flat(takes) | {f"need_{group}": bool for group in _groups(wanted)}
    arguments["backend"] = str
    place = {n: i for i, n in enumerate(arguments)}
    for g in wanted:
        if g.argument not in place and not g.argument.endswith("bias"):
            raise ValueError(f"{name} does not take {g.argument}, whose gradient it makes")
    forms = [
        (place.get(g.argument), place.get(f"need_{g.group}"), g.argument in laid_out)
        for g in wanted
    ]

    def fake_of(*args: Any) -> Any:
        beside, found = (args[1] if isinstance(args[1], Tensor) else args[0]), []
        for at, flag, keep in forms:
            t = args[0].new_empty(args[0].shape[-1:]) if at is None else args[at]
            if t is None or not (flag is None or args[flag]):
                found.append(beside.new_empty((0,)))
            else:
                found.append(torch.empty_like(t) if keep else t.new_empty(t.shape))
        return tuple(found) if len(found) > 1 else found[0]

    result = Tensor if len(wanted) == 1 else types.GenericAlias(tuple, (Tensor,) * len(wanted))
    body = body_of(body, name, _value(takes)) if isinstance(body, str) else body
    backward = _declare(name, arguments, result, body)
    fake(backward)(fake_of)
    no_double_backward(backward)
    return backward


def _connect(
    forward: OpOverload,
    backward: OpOverload,
    names: list[str],
    kept: list[str],
    wanted: list[_Grad],
    outputs: list[str],
    residual: list[str],
    seed: Callable[[Tensor], Tensor],
    unsaved: Callable[[dict[str, Any]], dict[str, Any]] | None,
) -> None:
    """Make ``backward`` the gradient of ``forward``; they take ``kept`` and ``names``."""
    index = {n: i for i, n in enumerate(names)}
    plain = {a.name for a in backward._schema.arguments if "Tensor" not in str(a.type)}
    # Tensors are saved separately from the other values; the backward takes both mixed.
    tensors = [n for n in kept if n not in plain]
    rest = [n for n in kept if n in plain]
    # (name, index among the inputs or None, index among the outputs or None)
    sources = [(n, index.get(n), outputs.index(n) if n in outputs else None) for n in tensors]
    places, backend = [index[n] for n in rest], index["backend"]
    order = [(n in plain, (rest if n in plain else tensors).index(n)) for n in kept]
    into = [index[g.argument] for g in wanted]
    flags = [[index[g.argument] for g in wanted if g.group == group] for group in _groups(wanted)]
    through = [index[n] for n in residual]

    def save(ctx: Any, inputs: tuple, output: Any) -> None:
        made = output if isinstance(output, tuple) else (output,)
        values: dict[str, Any] = {}
        for n, i, j in sources:
            given = None if i is None else inputs[i]
            if j is not None and (i is None or (given is None and made[j].numel())):
                given = made[j]
            values[n] = given
        if unsaved is not None:
            values = unsaved(values)
        ctx.save_for_backward(*values.values())
        ctx.rest, ctx.backend = [inputs[i] for i in places], inputs[backend]
        if len(made) > 1:
            ctx.mark_non_differentiable(*made[1:])
            ctx.set_materialize_grads(False)  # otherwise zeros are allocated for them

    def backprop(ctx: Any, dy: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
        found: list[Tensor | None] = [None] * len(names)
        if dy is None:
            return tuple(found)
        need = ctx.needs_input_grad
        needed = need.__getitem__
        for i in through:
            found[i] = dy if need[i] else None
        if any(map(needed, into)):
            saved, others = ctx.saved_tensors, ctx.rest
            given = [others[i] if is_plain else saved[i] for is_plain, i in order]
            asked = [any(map(needed, group)) for group in flags]
            got = run(backward, seed(dy), *given, *asked, ctx.backend)
            for i, t in zip(into, got if isinstance(got, tuple | list) else (got,)):
                found[i] = t if need[i] else None
        return tuple(found)

    autograd(forward, backprop, setup_context=save)
