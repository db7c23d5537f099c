"""The chat template of a model folder that a stage publishes, and the tokens that end generation with it."""

from __future__ import annotations

from pathlib import Path

from nemo_minitron.data.chat.templates import add_stop, set_template
from nemo_minitron.data.chat.tokenizing import ChatTemplate
from nemo_minitron.schema.chats import TemplateName


def publish_template(model_dir: Path, name: TemplateName) -> None:
    """Set the chat template of a trained model, and add the token that ends its answers to those that end generation.

    The name `model` leaves the folder's own template as it is.

    Raises:
        CheckpointError: there is no readable tokenizer.
        DataError: the template `model` cannot be used; see `ChatTemplate.load`.
    """
    if name != "model":
        set_template(model_dir, name)
        return
    stop = ChatTemplate.load(model_dir, name, whole_markers=False).end_of_turn()
    if stop is not None:
        add_stop(model_dir, stop)
