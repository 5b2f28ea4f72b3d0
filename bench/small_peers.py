"""Peers of shapes in fewer bits: int8 layers of others, and float32 layers to see what it gains."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import nn

from . import onnx_model
from .peers import OnnxRuntime, Peer, RnnfastFrozen, TorchNN


class RnnfastFloat32(RnnfastFrozen):
    """Our frozen layer in float32: its time over ours is what fewer bits gain."""

    name = "rnnfast float32"
    against_frozen = True
    dtypes = ("bfloat16", "int8")

    @property
    def dtype(self) -> torch.dtype:
        return torch.float32

    def finish(self, module: nn.Module) -> nn.Module:
        return module


class _Dynamic(nn.Module):
    """torch's dynamically quantized layer, which takes weights from a module within a module."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Any, hx: Any = None) -> Any:
        return self.layer(x, hx)


class TorchInt8(TorchNN):
    """torch.ao.quantization.quantize_dynamic: int8 weights with a scale a matrix."""

    name = "torch int8"
    against_frozen = True
    modes = ("streaming", "inference")
    cells = ("lstm", "gru")
    dtypes = ("int8",)

    def finish(self, module: nn.Module) -> nn.Module:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # it is deprecated, and still what torch has
            quantized: nn.Module = torch.ao.quantization.quantize_dynamic(
                _Dynamic(module), {nn.LSTM, nn.GRU}, dtype=torch.qint8
            )
        return quantized


class OnnxRuntimeInt8(OnnxRuntime):
    """ONNX Runtime's DynamicQuantizeLSTM: int8 weights with a scale a row; it has none for GRU."""

    name = "onnxruntime int8"
    cells = ("lstm",)
    dtypes = ("int8",)

    def model(self) -> bytes:
        return onnx_model.build(self.problem, int8=True)


class OnnxRuntimeFloat32(OnnxRuntime):
    """ONNX Runtime in float32, where it has no layer in int8."""

    name = "onnxruntime float32"
    cells = ("gru",)
    dtypes = ("int8",)


SMALL: list[type[Peer]] = [RnnfastFloat32, TorchInt8, OnnxRuntimeInt8, OnnxRuntimeFloat32]
