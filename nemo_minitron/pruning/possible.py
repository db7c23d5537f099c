"""Whether a target can be cut out of a model. Imports no torch."""

from __future__ import annotations

from collections.abc import Iterator

from nemo_minitron.errors import PlanError
from nemo_minitron.families import ModelShape, target_shape
from nemo_minitron.schema.pruning import Selection


def require_possible(params: Selection, source: ModelShape) -> None:
    """The target can be cut out of this model.

    Raises:
        PlanError: naming the key that asks for too much.
    """
    problem = next(impossible(params, source), None)
    if problem is not None:
        key, value, allowed = problem
        raise PlanError(f"{key} = {value} cannot be cut out of this model.", where="select", allowed=allowed)


def impossible(params: Selection, source: ModelShape) -> Iterator[tuple[str, object, str]]:
    """(key, value, what is allowed) of every size that cannot be cut out."""
    yield from _too_large(params, source)
    if params.drop_layers is None:
        return
    dropped, last = set(params.drop_layers), source.num_layers - 1
    if not dropped <= set(range(source.num_layers)) or len(dropped) == source.num_layers:
        yield "drop_layers", list(params.drop_layers), f"layers from 0 to {last}, not all of them"
    count = params.target.num_layers
    if count is not None and count != source.num_layers - len(dropped):
        yield "target.num_layers", count, f"{source.num_layers - len(dropped)}, which drop_layers leaves, or nothing"


def _too_large(params: Selection, source: ModelShape) -> Iterator[tuple[str, object, str]]:
    for key, value in params.target:
        if value is not None and value > getattr(source, key):
            yield f"target.{key}", value, f"1 to {getattr(source, key)}"
    target = target_shape(source, params.target, None)
    heads, groups = target.num_attention_heads, target.num_query_groups
    if heads % groups:
        yield "target.num_attention_heads", heads, _multiples(heads, groups)
    elif heads // groups > source.heads_per_group:
        most = groups * source.heads_per_group
        yield "target.num_attention_heads", heads, f"at most {most}, which {groups} query groups hold"
    if params.head_merge != "off" and heads == source.num_attention_heads:
        yield "head_merge", params.head_merge, "off, as no heads are cut"


def _multiples(heads: int, groups: int) -> str:
    near = [str(number) for number in (heads // groups * groups, (heads // groups + 1) * groups) if number > 0]
    return f"a multiple of the {groups} query groups, such as {' or '.join(near)}"
