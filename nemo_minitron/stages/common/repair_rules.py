"""Rules for stages that repair by least squares, or rank for such a repair. No torch."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from nemo_minitron.families import ModelShape
from nemo_minitron.pruning.repairable import repaired_sites
from nemo_minitron.schema.pruning import Compensation, SelectionRules

TOKENS_PER_INPUT = 20
"""Calibration tokens that a repair needs for each input of a linear layer: with fewer, least squares fits noise. The
measurements in docs/results.md had 33 and more."""
MERGED_HEADS_ADVICE = (
    "Set mode: sequential, leave attention_output out of sites, or set head_merge: off and prune again."
)


def calibration_problems(key: str, num_tokens: int, widest: int) -> Iterator[str]:
    """Check that there are enough calibration tokens for a layer with `widest` inputs."""
    needed = TOKENS_PER_INPUT * widest
    if num_tokens < needed:
        yield (
            f"{key}: {num_tokens} calibration tokens (num_samples * seq_len_tokens) are too few for a layer with "
            f"{widest} inputs. Allowed: at least {TOKENS_PER_INPUT} for each input, {needed}."
        )


def merged_head_problems(
    key: str, repair: Compensation, selection: SelectionRules, source: ModelShape | None, target: ModelShape | None
) -> Iterator[str]:
    """Check that a repair can follow a selection that merges cut heads into kept ones."""
    cuts_heads = source is not None and target is not None and target.num_attention_heads < source.num_attention_heads
    if cuts_heads and selection.head_merge != "off" and not fits_merged_heads(repair):
        yield (
            f"{key}: the plan merges heads (head_merge = {selection.head_merge}), so the inputs of o_proj are not the "
            f"teacher's. Next: {MERGED_HEADS_ADVICE}"
        )


def site_problems(key: str, repair: Compensation, source: ModelShape, students: Sequence[ModelShape]) -> Iterator[str]:
    """Check that the repair can change a weight of at least one student."""
    if not any(repaired_sites(repair, source, student) for student in students):
        every = repair.model_copy(update={"sites": Compensation().sites})
        possible = {site for student in students for site in repaired_sites(every, source, student)}
        allowed = [site for site in every.sites if site in possible]
        sequential = repair.model_copy(update={"mode": "sequential"})
        helps = any(repaired_sites(sequential, source, student) for student in students)
        otherwise = ", use mode: sequential" if helps else ""
        yield (
            f"{key}.sites = {list(repair.sites)}: the repair would change nothing. mode: {repair.mode} repairs none of "
            f"these in a model that is cut in this way. Allowed: {', '.join(allowed) or 'none'}. "
            f"Next: name one of these{otherwise}, or leave the repair out."
        )


def widest_input(shape: ModelShape) -> int:
    """Return the most inputs that a repaired layer of the model has."""
    return max(shape.hidden_size, shape.ffn_hidden_size, shape.num_attention_heads * shape.kv_channels)


def fits_merged_heads(repair: Compensation) -> bool:
    """Return whether a repair can follow a plan that merges heads: o_proj then needs the student's own heads."""
    return repair.mode == "sequential" or "attention_output" not in repair.sites
