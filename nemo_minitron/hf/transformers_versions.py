"""Differences between the supported versions of transformers, 4.53 to 5.24, and of its hub client, 0.30 to 2.4.

Differences in files are handled elsewhere, because a folder may come from any version: `families/rope.py` and
`families/hf_config.py` for config.json, `hf/tokenizer_classes.py` for tokenizers.
"""

from __future__ import annotations

from importlib.metadata import version
from typing import Any

_VERSION = tuple(int(part) for part in version("transformers").split(".")[:2])


def dtype_option(dtype: Any) -> dict[str, Any]:
    """Return the dtype keyword of `from_pretrained` and `from_config`: `dtype`, or `torch_dtype` before 4.56."""
    return {"dtype" if _VERSION >= (4, 56) else "torch_dtype": dtype}


def generate(model: Any, ids: Any, config: Any, **options: Any) -> Any:
    """Call `model.generate` with the values of `config` and the defaults of transformers only.

    From 4.50 on, values that `config` leaves unset are taken from `model.generation_config`, such as penalties and
    forced tokens. `use_model_defaults=False`, which disables this, is refused from 5.0 on.
    """
    own = model.generation_config
    model.generation_config = config
    try:
        return model.generate(ids, generation_config=config, **options)
    finally:
        model.generation_config = own


def network_errors() -> tuple[type[Exception], ...]:
    """Return the exceptions, besides OSError, that downloads from the hub raise when the network fails.

    They belong to the HTTP library of the hub client: requests before 1.0, whose errors are OSErrors, httpx from 1.0,
    httpx2 from 2.0.
    """
    from huggingface_hub import errors

    return (errors.HTTPError,)
