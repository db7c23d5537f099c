"""Repair the layers of a pruned model one after the other, in closed form.

One-shot: a student's layer gets the kept part of its teacher layer's activations, and each site is solved for them.
Sequential: it gets its own activations, which depend on the repair of everything before it, so each site needs a pass
over the text. In both modes the target of the last kept layer in front of dropped layers is the teacher's stream after
these: its MLP output takes over what they did, as far as its neurons can express it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from nemo_minitron.backends.megatron.compensation.runner import Activations, LayerRunner
from nemo_minitron.backends.megatron.compensation.sites import (
    SITES,
    Site,
    biases_of,
    input_label,
    weights_of,
)
from nemo_minitron.backends.megatron.compensation.streams import Stream
from nemo_minitron.backends.megatron.runtime.session import Session
from nemo_minitron.families import ModelShape, Parameter
from nemo_minitron.families.blocks import ATTENTION, MLP
from nemo_minitron.hf.checkpoint import HEAD, Checkpoint
from nemo_minitron.pruning.compensation import Moments, Repair, best_repair
from nemo_minitron.pruning.plan_file import PrunePlan
from nemo_minitron.pruning.positions import Keep, kept_positions
from nemo_minitron.pruning.repairable import repaired_sites
from nemo_minitron.pruning.slicing import merge_parameter
from nemo_minitron.schema.pruning import Compensation

Weights = dict[str, Tensor]
"""Weights of one layer of the student: Hugging Face name -> tensor."""


@dataclass(frozen=True)
class Models:
    """The teacher, the student, and the plan by which the student was cut out of it."""

    teacher: Checkpoint
    student: Checkpoint
    plan: PrunePlan

    @property
    def source(self) -> ModelShape:
        return self.teacher.shape

    @property
    def target(self) -> ModelShape:
        return self.student.shape

    def keep(self, number: int) -> Keep:
        """Return the kept positions of one layer of the student."""
        return kept_positions(self.plan, self.source, self.plan.layers[number])

    def dropped_after(self, number: int) -> range:
        """Return the dropped layers of the teacher between one layer of the student and the next."""
        layers = (*self.plan.layers, self.source.num_layers)
        return range(layers[number] + 1, layers[number + 1])

    def teacher_rows(self, site: Site, number: int) -> Tensor:
        """Return the teacher's weights of a site with the rows that the student keeps [O, I], fp32 or wider."""
        return self._kept(site, weights_of(site, self.source, self.plan.layers[number]), number)

    def missing_bias(self, site: Site, number: int) -> Tensor | None:
        """Return by how much the teacher's biases of a site exceed the student's [O]; None if it has no biases.

        They differ if one of the models was trained after the cut.
        """
        teacher = biases_of(site, self.source, self.plan.layers[number])
        if not teacher:
            return None
        student = biases_of(site, self.target, number)
        own = torch.cat([_wide(self.student.read(parameter.hf)) for parameter in student])
        return self._kept(site, teacher, number) - own

    def _kept(self, site: Site, parameters: list[Parameter], number: int) -> Tensor:
        keep = self.keep(number)
        return torch.cat([self._rows(site, parameter, keep) for parameter in parameters])

    def _rows(self, site: Site, parameter: Parameter, keep: Keep) -> Tensor:
        whole = self.teacher.read(parameter.hf)
        if site.reads_stream:  # The rows of q are those of merged heads; o_proj should give what all heads gave.
            whole = merge_parameter(whole, parameter.row, self.plan, self.source, parameter.layer)
        label = parameter.row.axes[0]
        return _wide(whole if label not in keep else whole.index_select(0, keep[label]))


@dataclass(frozen=True)
class _Problem:
    """One site of one layer of the student."""

    site: Site
    number: int
    """Layer of the student."""
    kept_hidden: Tensor | None
    """Channels of the stream that the student keeps; None: all."""
    kept_inputs: Tensor | None
    """Inputs of the site that the student keeps; None: all."""
    teacher_weight: Tensor
    """The teacher's weight with the rows that stay [O, I]."""
    sliced_weight: Tensor
    """The student's weight [O, K]."""
    missing_bias: Tensor | None
    """What the student's biases lack [O]; None: the site has none."""
    target: str
    """Same as `Compensation.target`; always `layer` in a one-shot repair."""

    def residual(
        self, teacher: Activations, student: Activations, teacher_after: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Return (the residual of the sliced layer [S, B, M], its input [S, B, K]).

        For a site that reads the stream, the residual is in front of the teacher's weight.

        Args:
            teacher_after: the teacher's stream behind the layer and the dropped layers that follow it; only the MLP's
                output needs it.
        """
        given, full = student.inputs[self.site.name], teacher.inputs[self.site.name]
        if self.site.reads_stream:
            return _minus_embedded(full, given, self.kept_hidden), given
        made = F.linear(given, self.sliced_weight.to(given))
        if self.target == "stream":
            wanted = _known(teacher_after) if self.site.block is MLP else teacher.after(ATTENTION.name)
            return _take(wanted, self.kept_hidden) - student.before[self.site.block.name] - made, given
        lacks = F.linear(full, self.teacher_weight.to(full)) - made
        if self.site.block is MLP:
            # What dropped layers added to the stream; exactly zero if none follow.
            lacks = lacks + _take(_known(teacher_after) - teacher.out, self.kept_hidden)
        return lacks, given


class LayerRepair:
    """Repair of single layers, with one layer of each model in memory."""

    def __init__(self, models: Models, params: Compensation, session: Session) -> None:
        self.models, self.params, self.session = models, params, session
        self.sites = repaired_sites(params, models.source, models.target)
        self.teacher = LayerRunner(models.source, session, params.precision, params.seq_len_tokens)
        self.student = LayerRunner(models.target, session, params.precision, params.seq_len_tokens)

    def sliced(self, number: int) -> Weights:
        """Return the sliced weights of one layer of the student."""
        sites = (weights_of(site, self.models.target, number) for site in SITES)
        return {parameter.hf: self.models.student.read(parameter.hf) for some in sites for parameter in some}

    def repair(self, number: int, streams: list[Stream]) -> tuple[Weights, dict[str, Repair]]:
        """Return the repaired weights of one layer, and the repair of each site."""
        weights, found = self.sliced(number), dict[str, Repair]()
        if self.models.dropped_after(number):
            self._run_teacher(number, streams)
        self._load_teacher(self.models.plan.layers[number])
        groups = [[site] for site in SITES] if self.params.mode == "sequential" else [list(SITES)]
        wanted = [some for group in groups if (some := [site for site in group if self._wants(site, number)])]
        for sites in wanted:
            found |= self._repair_sites(sites, number, weights, streams, to_end=sites is wanted[-1])
        return weights, found

    def _repair_sites(
        self, sites: list[Site], number: int, weights: Weights, streams: list[Stream], *, to_end: bool
    ) -> dict[str, Repair]:
        """Repair some sites from one pass over the text; their sums are gone before those of the next ones begin.

        Args:
            to_end: run the whole layer of the teacher, not only what is in front of the sites.
        """
        problems = [self._problem(site, number, weights) for site in sites]
        self._load_student(number, weights)
        moments = self._moments(problems, streams, to_end)
        return {
            problem.site.name: self._solve(problem, moments[problem.site.name], number, weights) for problem in problems
        }

    def advance(self, number: int, weights: Weights, streams: list[Stream]) -> None:
        """Move all streams to the next layer of the student, with its repaired weights."""
        if any(stream.teacher_after is None for stream in streams):
            self._run_teacher(number, streams)
        for stream in streams:
            assert stream.teacher_after is not None
            stream.teacher, stream.teacher_after = stream.teacher_after, None
        if self.params.mode == "sequential":
            self._load_student(number, weights)
            for stream in streams:
                stream.student = self.student.forward(stream.of_student).cpu()

    def skip_dropped_before_first(self, streams: list[Stream]) -> None:
        """Move the teacher's streams over the dropped layers before the student's first one."""
        for layer in range(self.models.plan.layers[0]):
            self._load_teacher(layer)
            for stream in streams:
                stream.teacher = self.teacher.forward(stream.teacher).cpu()

    def _run_teacher(self, number: int, streams: list[Stream]) -> None:
        """Compute the teacher's streams after a layer of the student and the dropped layers that follow it."""
        for stream in streams:
            stream.teacher_after = stream.teacher
        for layer in (self.models.plan.layers[number], *self.models.dropped_after(number)):
            self._load_teacher(layer)
            for stream in streams:
                assert stream.teacher_after is not None
                stream.teacher_after = self.teacher.forward(stream.teacher_after).cpu()

    def _load_teacher(self, layer: int) -> None:
        self.teacher.load(layer, lambda parameter: self.models.teacher.read(parameter.hf))

    def _load_student(self, number: int, weights: Weights) -> None:
        read = self.models.student.read
        self.student.load(number, lambda p: weights[p.hf] if p.hf in weights else read(p.hf))

    def _wants(self, site: Site, number: int) -> bool:
        """Return whether the recipe repairs the site in this layer."""
        if site.name not in self.sites:
            return False
        if self.params.mode == "sequential":
            return True
        folds = bool(self.models.dropped_after(number)) and site.name == "mlp_output"
        return folds or input_label(site, self.models.source) in self.models.keep(number)

    def _problem(self, site: Site, number: int, weights: Weights) -> _Problem:
        keep = self.models.keep(number)
        names = [parameter.hf for parameter in weights_of(site, self.models.target, number)]
        bias = self.models.missing_bias(site, number)
        return _Problem(
            site=site,
            number=number,
            kept_hidden=keep.get("hidden"),
            kept_inputs=keep.get(input_label(site, self.models.source)),
            teacher_weight=self.models.teacher_rows(site, number).to(self.session.device),
            sliced_weight=_wide(torch.cat([weights[name] for name in names])).to(self.session.device),
            missing_bias=None if bias is None else bias.to(self.session.device),
            target=self.params.target if self.params.mode == "sequential" else "layer",
        )

    def _moments(
        self, problems: list[_Problem], streams: list[Stream], to_end: bool
    ) -> Mapping[str, tuple[Moments, Moments]]:
        """Return site -> (moments of the calibration text, moments of the held-out text), over all processes."""
        device = self.session.device
        sums: dict[str, tuple[Moments, Moments]] = {}
        for problem in problems:
            residuals = self.models.source.hidden_size if problem.site.reads_stream else len(problem.sliced_weight)
            inputs = problem.sliced_weight.shape[1]
            products = problem.site.reads_stream
            sums[problem.site.name] = (
                Moments.zeros(residuals, inputs, device, residual_products=products),
                Moments.zeros(residuals, inputs, device, residual_products=products),
            )
        for stream in streams:
            teacher = self.teacher.activations(stream.teacher, None if to_end else problems[-1].site.name)
            if to_end and stream.teacher_after is None:
                stream.teacher_after = teacher.out.cpu()
            student = self._student_activations(problems, teacher, stream)
            after = None if stream.teacher_after is None else stream.teacher_after.to(device)
            counted = stream.counted.to(device)
            for problem in problems:
                residual, given = problem.residual(teacher, student, after)
                sums[problem.site.name][stream.is_heldout].add(residual[counted], given[counted])
        for name, pair in sums.items():
            self._sum_over_ranks(pair, f"{name} of layer {problems[0].number}")
        return sums

    def _sum_over_ranks(self, sums: tuple[Moments, Moments], where: str) -> None:
        for moments in sums:
            for tensor in moments.tensors:
                self.session.sum(tensor)
            moments.require_finite(where)

    def _student_activations(self, problems: list[_Problem], teacher: Activations, stream: Stream) -> Activations:
        """Return the student's own activations, or those that it would have on its teacher's stream."""
        if self.params.mode == "sequential":
            return self.student.activations(stream.of_student, problems[-1].site.name)
        kept = problems[0].kept_hidden
        before = {block: _take(tensor, kept) for block, tensor in teacher.before.items()}
        inputs: dict[str, Tensor] = {
            problem.site.name: self.student.norm(problem.site.block, before[problem.site.block.name])
            if problem.site.reads_stream
            else _take(teacher.inputs[problem.site.name], problem.kept_inputs)
            for problem in problems
        }
        return Activations(inputs, before, end=None)

    def _solve(self, problem: _Problem, moments: tuple[Moments, Moments], number: int, weights: Weights) -> Repair:
        """Solve one site and put its repaired weights into `weights`."""
        left = problem.teacher_weight if problem.site.reads_stream else None
        repair, repaired = self._best(moments, left, problem.sliced_weight, problem.kept_hidden, problem.missing_bias)
        start = 0
        for parameter in weights_of(problem.site, self.models.target, number):
            old = weights[parameter.hf]
            weights[parameter.hf] = repaired[start : start + len(old)].to(device="cpu", dtype=old.dtype).contiguous()
            start += len(old)
        return repair

    def _best(
        self,
        moments: tuple[Moments, Moments],
        left: Tensor | None,
        sliced: Tensor,
        kept_hidden: Tensor | None,
        missing_bias: Tensor | None = None,
    ) -> tuple[Repair, Tensor]:
        """Return the best repair of this process, and the weight of the first one, fp64, which all must use.

        That weight also says whether there is a repair: without one it is the sliced weight, which keeps every bit.

        Args:
            moments: of the calibration text and of the held-out text.
            left: the teacher's weight [O, M], if the residuals are in front of it; None: they are behind.
            missing_bias: what the student's biases lack [O].
        """
        calibration, heldout = (some.objective(left) for some in moments)
        if left is not None:
            # Those residuals belong to the teacher's own columns. A trained or repaired student has others.
            differs = _take(left, kept_hidden).double() - sliced.double()
            calibration, heldout = (some.of_weight_below(differs) for some in (calibration, heldout))
        if missing_bias is not None:
            calibration, heldout = (some.of_target_above(missing_bias) for some in (calibration, heldout))
        repair = best_repair(calibration, heldout, self.params.dampings)
        repaired = sliced.double() if repair.update is None else sliced.double() + repair.update
        if self.session.world_size > 1:
            dist.broadcast(repaired, 0)
        return repair, repaired

    @property
    def repairs_head(self) -> bool:
        """Return whether the output head is repaired."""
        return "head" in self.sites

    def repair_head(self, streams: list[Stream]) -> tuple[Weights, dict[str, Repair]]:
        """Return the repaired output head, for streams after the last layer, and its repair."""
        models, device = self.models, self.session.device
        kept = kept_positions(models.plan, models.source, None)["hidden"]
        sizes = (models.source.hidden_size, models.target.hidden_size, device)
        sums = (Moments.zeros(*sizes), Moments.zeros(*sizes))
        own = (s.of_student if self.params.mode == "sequential" else _take(s.teacher, kept) for s in streams)
        normed = self.student.final_norm(own, lambda parameter: models.student.read(parameter.hf))
        wanted = self.teacher.final_norm((s.teacher for s in streams), lambda p: models.teacher.read(p.hf))
        for stream, full, given in zip(streams, wanted, normed, strict=True):
            counted = stream.counted.to(device)
            sums[stream.is_heldout].add(_minus_embedded(full, given, kept)[counted], given[counted])
        self._sum_over_ranks(sums, "the output head")
        sliced = models.student.read(HEAD)
        whole = _wide(models.teacher.read(HEAD)).to(device)
        repair, repaired = self._best(sums, whole, _wide(sliced).to(device), kept)
        return {HEAD: repaired.to(device="cpu", dtype=sliced.dtype).contiguous()}, {"head": repair}


def _minus_embedded(full: Tensor, kept_part: Tensor, kept: Tensor | None) -> Tensor:
    """Return `full` minus the kept part, with each kept channel at its place in the full width."""
    if kept is None:
        return full - kept_part
    return full.index_add(-1, kept.to(full.device), kept_part, alpha=-1)


def _take(tensor: Tensor, kept: Tensor | None) -> Tensor:
    return tensor if kept is None else tensor.index_select(-1, kept.to(tensor.device))


def _known(stream: Tensor | None) -> Tensor:
    assert stream is not None
    return stream


def _wide(tensor: Tensor) -> Tensor:
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def repaired_layers(
    repair: LayerRepair, streams: list[Stream], done: Mapping[int, Weights]
) -> Iterator[tuple[int, Weights, dict[str, Repair] | None]]:
    """Yield (layer of the student, its repaired weights, the repair of each site), in order; then the head, if any.

    Args:
        done: repaired weights of layers that an interrupted run has already made; None is yielded as their repairs.
    """
    # The first rank decides for all: another node may see a layer's file later.
    finished = set(repair.session.gather(list(done))[0])
    repair.skip_dropped_before_first(streams)
    for number in range(repair.models.target.num_layers):
        if number in finished:
            weights, found = done[number], None
        else:
            weights, found = repair.repair(number, streams)
        yield number, weights, found
        repair.advance(number, weights, streams)
    head = repair.models.target.num_layers
    if repair.repairs_head:
        yield head, *((done[head], None) if head in finished else repair.repair_head(streams))
