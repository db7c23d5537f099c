"""Model families: shapes, axes, blocks and the table of parameters, and Hugging Face configs. No torch."""

from nemo_minitron.families.blocks import Row
from nemo_minitron.families.hf_config import explicit_config, read_shape, write_config
from nemo_minitron.families.shape import Llama3RopeScaling, ModelShape, target_shape
from nemo_minitron.families.table import Parameter, num_params, parameters, rows, tensor_shape

__all__ = [
    "Llama3RopeScaling",
    "ModelShape",
    "Parameter",
    "Row",
    "explicit_config",
    "num_params",
    "parameters",
    "read_shape",
    "rows",
    "target_shape",
    "tensor_shape",
    "write_config",
]
