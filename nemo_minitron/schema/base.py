"""Base class and common types of all sections of a recipe."""

from __future__ import annotations

import re
from datetime import date
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field


class Schema(BaseModel):
    """A section of a recipe. It is frozen; an unknown key is an error, and so are NaN and infinity."""

    # Before 2.10 pydantic warns of every field that begins with `model_`, unless no name is protected.
    model_config = ConfigDict(
        frozen=True,
        extra="forbid",
        validate_default=True,
        allow_inf_nan=False,
        protected_namespaces=(),
        defer_build=True,
    )


class StageParams(Schema):
    """The keys of one stage. Every class of stage keys extends it and defines `kind` and `inputs`."""

    if TYPE_CHECKING:
        kind: str
        inputs: Schema


_VARIABLE = re.compile(r"\$([A-Za-z_]\w*)")
Fraction = Annotated[float, Field(ge=0.0, le=1.0)]


def _expanded(text: str) -> str:
    variable = _VARIABLE.search(text)
    if variable is not None:
        raise ValueError(f"no shell replaces {variable[0]} in a recipe; write ${{oc.env:{variable[1]}}}")
    if not text.startswith("~"):
        return text
    try:
        return str(Path(text).expanduser())
    except RuntimeError:
        raise ValueError("the home folder of this user is unknown; write the whole path instead of ~") from None


def _off(value: object) -> object:
    return "off" if value is False else value


Off = BeforeValidator(_off)
"""Accepts `off` without quotes for the text "off": YAML reads it as false."""


UserPath = Annotated[str, Field(min_length=1), AfterValidator(_expanded)]
"""A path of this machine; `~` is expanded, because shells do not expand it after KEY=."""
Seed = Annotated[int, Field(ge=0, lt=2**32)]
"""Seed of random numbers, in the range that numpy accepts."""
FITTING_SEED = 4321
"""Default seed of stages that fit a student in front of its distillation. With the seed of a training, the distillation
would begin with the samples that have just been fitted and learn little from them."""
Precision = Literal["fp32", "bf16"]
StageName = Annotated[str, Field(pattern=r"^[a-z][a-z0-9_]*$")]


def _task(name: str) -> str:
    if (
        not name.strip()
        or "/" in name
        or "\\" in name
        or name.startswith(".")
        or name.endswith((".yaml", ".yml", ".py"))
    ):
        # lm-eval would read the file, and run the Python code that it names.
        raise ValueError("is not the name of a task of lm-eval; files of tasks are not read, as they can run code")
    return name


TaskName = Annotated[str, AfterValidator(_task)]
"""A task or group that comes with lm-eval, such as arc_easy."""
WidthMethod = Literal["activation", "taylor", "wanda"]
LayerMetric = Literal["block_influence", "lm_loss", "logit_mse", "task"]
"""Names of the metrics; their functions are in pruning/importance.py and pruning/depth.py."""


TEMPLATE_DATE = date(2024, 7, 26)
"""Date that the templates of Llama 3 write if they are given none."""


class Inputless(Schema):
    """Inputs of a stage that reads no other stage."""
