"""What the kernels of a sparse backward are told of hidden states, weight, and how both are cut."""

from typing import Any

from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from ..kernels import template
from ..kernels.config import coded_config, product_config, tile_config
from .launch import can_use_tma, device_properties, interpretable
from .problem import Problem


class SparseOperands:
    """The operands in the dtype of the matmuls, and the configurations."""

    def __init__(self, problem: Problem) -> None:
        self.problem = problem
        capability, self.processors = device_properties(problem.hidden.device)
        self.config, self.products = tile_config(capability, backward=True), product_config(capability)
        self.coded_config = coded_config(capability)
        self.weight = interpretable(problem.weight.to(problem.compute_dtype))
        self.hidden = interpretable(problem.hidden)
        # of the hidden states kernels load rows that were gathered
        self.tma = can_use_tma(self.weight, self.hidden.new_empty(1, problem.width))
        self.function = template.load(problem.logit_map).value_and_slope

    def blocks_of(self, tensor: Tensor, rows: int, columns: int) -> Tensor | TensorDescriptor:
        """The tensor, as kernels load or store blocks of it."""
        return TensorDescriptor.from_tensor(tensor, [rows, columns]) if self.tma else tensor

    def weight_operand(self, rows: int, columns: int) -> dict[str, Any]:
        """The weight in blocks."""
        return {
            "weight": self.blocks_of(self.weight, rows, columns),
            "stride_wv": self.weight.stride(0),
            "stride_wd": self.weight.stride(1),
            "USE_TMA": self.tma,
        }

    def logits(self) -> dict[str, Any]:
        """The arguments of a kernel that computes logits."""
        config = self.config
        return {
            **self.weight_operand(config.block_v, config.block_d),
            "bias": self.problem.bias,
            "num_columns": self.problem.vocab_size,
            "width": self.problem.width,
            "VALUE_AND_SLOPE": self.function,
            "HAS_BIAS": self.problem.bias is not None,
            "BLOCK_N": config.block_n,
            "BLOCK_V": config.block_v,
            "BLOCK_D": config.block_d,
            "num_warps": config.num_warps,
            "num_stages": config.num_stages,
        }

    def product(self) -> dict[str, Any]:
        """The arguments that the two kernels for products have in common."""
        return {
            "num_columns": self.problem.vocab_size,
            "width": self.problem.width,
            "BLOCK_N": self.config.block_n,
            "BLOCK_V": self.config.block_v,
            "STEP": self.products.step,
            "num_warps": self.config.num_warps,
            "num_stages": self.config.num_stages,
        }
