"""Tensors of finished layers in the work folder, so that a killed stage continues after the last one."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, eq=False)
class LayerFiles(Mapping[int, "dict[str, Tensor]"]):
    """Layer -> its tensors by name, which are read on request: one layer is in memory at a time."""

    folder: Path

    def save(self, layer: int, tensors: Mapping[str, Tensor], facts: str = "") -> None:
        """Write a layer atomically: its file is either complete or missing.

        Args:
            facts: text that `facts` returns.
        """
        from safetensors.torch import save_file

        self.folder.mkdir(parents=True, exist_ok=True)
        partial = self._file(layer).with_suffix(".partial")
        whole = {name: tensor.contiguous() for name, tensor in tensors.items()}
        save_file(whole, str(partial), metadata={"facts": facts})
        partial.replace(self._file(layer))

    def facts(self, layer: int) -> str:
        """Return the text that was saved with a layer."""
        from safetensors import safe_open

        with safe_open(str(self._file(layer)), "pt") as opened:
            return str(opened.metadata()["facts"])

    def names(self) -> dict[str, int]:
        """Return tensor name -> the layer that has it; no tensor is read."""
        from safetensors import safe_open

        found: dict[str, int] = {}
        for layer in self:
            with safe_open(str(self._file(layer)), "pt") as opened:
                found |= dict.fromkeys(opened.keys(), layer)
        return found

    def read(self, layer: int, name: str) -> Tensor:
        """Read one tensor of a layer."""
        from safetensors import safe_open

        with safe_open(str(self._file(layer)), "pt") as opened:
            tensor: Tensor = opened.get_tensor(name)
        return tensor

    def __getitem__(self, layer: int) -> dict[str, Tensor]:
        from safetensors.torch import load_file

        if layer not in self:
            raise KeyError(layer)
        return load_file(str(self._file(layer)))

    def __contains__(self, layer: object) -> bool:
        """Return whether the layer is saved. A file that a crash of the machine has truncated does not count."""
        from safetensors import SafetensorError, safe_open

        if not isinstance(layer, int):
            return False
        try:
            with safe_open(str(self._file(layer)), "pt"):
                return True
        except (FileNotFoundError, SafetensorError):
            return False

    def __iter__(self) -> Iterator[int]:
        found = (int(file.stem.split("-")[1]) for file in self.folder.glob("layer-*.safetensors"))
        return iter(sorted(layer for layer in found if layer in self))

    def __len__(self) -> int:
        return len(list(iter(self)))

    def _file(self, layer: int) -> Path:
        return self.folder / f"layer-{layer:05d}.safetensors"
