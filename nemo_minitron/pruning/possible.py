"""Check whether a target can be cut out of a model. No torch."""

from __future__ import annotations

from collections.abc import Iterator

from nemo_minitron.errors import PlanError
from nemo_minitron.families import ModelShape, target_shape
from nemo_minitron.families.axes import LAYERS, WIDTH_AXES, holder_of
from nemo_minitron.schema.pruning import Selection, SelectionRules, Target


def selection_for(rules: SelectionRules, target: Target, source: ModelShape) -> Selection:
    """Return the selection of one point of a search: heads are merged only where some are cut."""
    keys = {key: getattr(rules, key) for key in SelectionRules.model_fields}
    if target_shape(source, target, None).num_attention_heads == source.num_attention_heads:
        keys["head_merge"] = "off"
    return Selection(target=target, **keys)


def require_possible(selection: Selection, source: ModelShape) -> None:
    """Require a target that can be cut out of this model.

    Raises:
        PlanError: with the key whose value is impossible.
    """
    problem = next(impossible(selection, source), None)
    if problem is not None:
        key, value, allowed = problem
        raise PlanError(f"{key} = {value} cannot be cut out of this model.", allowed=allowed)


def impossible(selection: Selection, source: ModelShape) -> Iterator[tuple[str, object, str]]:
    """Yield (key, value, allowed values) of each key that makes the target impossible."""
    yield from _too_large(selection, source)
    if selection.drop_layers is None:
        return
    dropped, last = set(selection.drop_layers), source.num_layers - 1
    if not dropped <= set(range(source.num_layers)) or len(dropped) == source.num_layers:
        yield "drop_layers", list(selection.drop_layers), f"layers from 0 to {last}, not all of them"
    count = dict(selection.target).get(LAYERS.target_key)
    left = source.num_layers - len(dropped)
    if count is not None and count != left:
        yield f"target.{LAYERS.target_key}", count, f"{left}, which drop_layers leaves, or nothing"


def _too_large(selection: Selection, source: ModelShape) -> Iterator[tuple[str, object, str]]:
    for key, value in selection.target:
        if value is not None and value > getattr(source, key):
            yield f"target.{key}", value, f"1 to {getattr(source, key)}"
    target = target_shape(source, selection.target, None)
    for axis in WIDTH_AXES:
        holder = holder_of(axis)
        if holder is None:
            continue
        (size, count), (before, most) = (
            (getattr(shape, axis.target_key), getattr(shape, holder.target_key)) for shape in (target, source)
        )
        if size % count:
            yield f"target.{axis.target_key}", size, _multiples(size, count, holder.target_key)
        elif size // count > before // most:
            limit = f"at most {count * (before // most)}, with {holder.target_key} = {count}"
            yield f"target.{axis.target_key}", size, limit
    if selection.head_merge != "off" and target.num_attention_heads == source.num_attention_heads:
        yield "head_merge", selection.head_merge, "off, as no heads are cut"


def _multiples(size: int, count: int, holder: str) -> str:
    near = [str(number) for number in (size // count * count, (size // count + 1) * count) if number > 0]
    return f"a multiple of {holder} = {count}, such as {' or '.join(near)}"
