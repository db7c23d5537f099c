"""`minitron rlhf`: configs and start scripts for the two programs of PPO or REINFORCE, from a finished run."""

from __future__ import annotations

import json
import shlex
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from nemo_minitron.cli.arguments import expanded
from nemo_minitron.cli.output import console
from nemo_minitron.errors import ConfigError
from nemo_minitron.system.safe_files import new_folder

if TYPE_CHECKING:
    from nemo_minitron.schema.rlhf import Rlhf

WHERE = "minitron rlhf"


def rlhf(
    run: Annotated[Path, typer.Argument(metavar="RECIPE_OR_RUN", help="A recipe YAML, or the folder of its run.")],
    settings: Annotated[
        list[str] | None,
        typer.Argument(metavar="[KEY=VALUE]...", help="Keys of nemo_minitron/schema/rlhf.py, e.g. lr=1e-6."),
    ] = None,
    algorithm: Annotated[str, typer.Option(help="ppo or reinforce.")] = "ppo",
    model: Annotated[
        Path | None, typer.Option(callback=expanded, help="A Hugging Face folder; by default the run's last model.")
    ] = None,
    reward: Annotated[str | None, typer.Option(help="The train_attribute_model stage, if there are several.")] = None,
    chats: Annotated[str | None, typer.Option(help="The stage with the prompts, if there are several.")] = None,
    out: Annotated[
        Path | None, typer.Option(callback=expanded, help="A new folder; RUN/rlhf_ALGORITHM unless given.")
    ] = None,
    dry_run: Annotated[bool, typer.Option(help="Write everything but the model in NeMo's format.")] = False,
) -> None:
    """Check the settings; write prompts, complete configs and start scripts for PPO or REINFORCE in a container."""
    from nemo_minitron.backends.alignment.nemo_aligner.rlhf import ACTOR_NEMO, PROMPT_FILES, render
    from nemo_minitron.backends.alignment.nemo_aligner.rlhf_checks import rlhf_problems
    from nemo_minitron.backends.alignment.nemo_aligner.rlhf_inputs import find_stage, gather_facts, prompts_by_part
    from nemo_minitron.cli.chat import find_model
    from nemo_minitron.data.chat.tokenizing import ChatTemplate
    from nemo_minitron.stages.kind import Output
    from nemo_minitron.stages.registry import kinds_with

    parsed = parse_settings(algorithm, settings or [])
    folder = _run_folder(run).resolve()
    target = (out or folder / f"rlhf_{algorithm}").resolve()
    if target.exists():
        raise ConfigError("The target already exists.", where=str(target), next_step="Name a new folder with --out.")
    rows = find_stage(folder, kinds_with(Output.CHAT_ROWS), chats, "--chats")
    reward_model = find_stage(folder, kinds_with(Output.REWARD_MODEL), reward, "--reward")
    start = (model or find_model(folder)).resolve()
    template = ChatTemplate.load(start, parsed.template, whole_markers=parsed.whole_markers, day=parsed.template_date)
    prompts = prompts_by_part(parsed, rows, template)
    facts = gather_facts(start, template, reward_model, prompts)
    problems = list(rlhf_problems(parsed, facts))
    if problems:
        listed = "\n".join(f"  - {problem}" for problem in problems)
        raise ConfigError(
            f"These settings do not fit together:\n{listed}", where=WHERE, next_step="Set them as KEY=VALUE."
        )
    files = render(parsed, facts, target)
    for part, texts in prompts.items():
        files[PROMPT_FILES[part]] = "".join(json.dumps({"text": text}) + "\n" for text in texts)
    _write(files, target, None if dry_run else start)
    console.say(f"{target}: {', '.join(files)}", "written", "green")
    if dry_run:
        convert = ["minitron", "convert", str(start), str(target / ACTOR_NEMO)]
        console.say(f"Still to do: {shlex.join(convert)}")
    console.say("In the container, run server.sh and actor.sh at the same time, and back.sh after actor.sh has ended.")


def parse_settings(algorithm: str, texts: list[str]) -> Rlhf:
    """Parse KEY=VALUE arguments.

    Raises:
        ConfigError: unknown keys or wrong values; lists all of them.
    """
    from pydantic import ValidationError

    from nemo_minitron.config.compose import from_dotlist
    from nemo_minitron.config.explain import problems_in
    from nemo_minitron.schema.rlhf import Rlhf

    given = {**from_dotlist(texts, Rlhf), "algorithm": algorithm}
    try:
        return Rlhf.model_validate(given)
    except ValidationError as error:
        problems = [f"  - {problem}" for problem in problems_in(error, Rlhf, given)]
        raise ConfigError(
            "Wrong settings:\n" + "\n".join(problems),
            where=WHERE,
            next_step="All keys with their defaults: nemo_minitron/schema/rlhf.py.",
        ) from None


def _run_folder(run: Path) -> Path:
    if run.is_dir():
        return run
    from nemo_minitron import api
    from nemo_minitron.plan.folder import run_dir

    return run_dir(api.load_recipe(run))


def _write(files: Mapping[str, str], target: Path, start: Path | None) -> None:
    """Write texts and, in NeMo's format, the actor's initial model into a new folder; after an error there is none."""
    from nemo_minitron.backends.alignment.nemo_aligner import nemo_file
    from nemo_minitron.backends.alignment.nemo_aligner.rlhf import ACTOR_NEMO
    from nemo_minitron.system.interrupts import StopRequest
    from nemo_minitron.system.progress import Progress

    target.parent.mkdir(parents=True, exist_ok=True)
    with new_folder(target) as folder:
        for name, text in files.items():
            (folder / name).parent.mkdir(exist_ok=True)
            (folder / name).write_text(text, encoding="utf-8")
        if start is not None:
            with tempfile.TemporaryDirectory(dir=folder, prefix=".convert-") as work:
                nemo_file.from_hugging_face(
                    start, folder / ACTOR_NEMO, Path(work), Progress(), StopRequest(), final=target / ACTOR_NEMO
                )
