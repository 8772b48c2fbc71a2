"""LoRA layers of a network: how one adds to its output, which role's are switched on, and how they become part of the weights."""

from __future__ import annotations

import torch.nn.functional as F
from peft.tuners.lora import Linear as LoraLinear
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn


class AddedLinear(LoraLinear):
    """peft's LoRA of a linear layer, W x + b + s B A x, with the last product adding itself to the output.

    peft makes the product, scales it and adds it: three passes over a tensor of the output's size, in the backward pass two, and
    copies of it for the graph.
    """

    def forward(self, x: Tensor) -> Tensor:
        if self.disable_adapters:
            return self.base_layer(x)
        (adapter,) = self.active_adapters
        rows = x.reshape(-1, x.shape[-1])  # one product of two matrices adds in place, a batch of them would not
        output, inner = self.base_layer(rows), F.linear(rows, self.lora_A[adapter].weight)
        # in place: the backward pass of W x does not look at W x
        output.addmm_(inner, self.lora_B[adapter].weight.to(inner.dtype).T, alpha=self.scaling[adapter])
        return output.view(*x.shape[:-1], -1)


class Adapters:
    """The LoRA layers of one base, and which role's are switched on ("" none)."""

    def __init__(self, model: nn.Module):
        # found once: the walk over all modules costs more than the switch
        self.layers = [module for module in model.modules() if isinstance(module, BaseTunerLayer)]
        for layer in self.layers:
            # autocast makes the adapter's weights what its input is; peft would make the input float32 first, and autocast undo it
            layer.cast_input_dtype_enabled = False
        self.parameters = [p for name, p in model.named_parameters() if ".lora_" in name]
        self.on: str | None = None

    def switch(self, adapter: str) -> None:
        if adapter == self.on:
            return
        for layer in self.layers:
            if layer.disable_adapters == bool(adapter):  # both calls walk over the layer's weights
                layer.enable_adapters(bool(adapter))
            if adapter:
                layer.set_adapter(adapter)
        # switching changes requires_grad, and autograd drops the gradient of a leaf that lost it: both adapters stay trainable
        for parameter in self.parameters:
            parameter.requires_grad_(True)
        self.on = adapter


def merged(model: nn.Module, adapter: str) -> nn.Module:
    """The model with one LoRA adapter added into its weights and every adapter layer gone; changes the model it is given."""
    for name, layer in list(model.named_modules()):
        if isinstance(layer, BaseTunerLayer):
            layer.enable_adapters(True)
            layer.merge(adapter_names=[adapter])
            parent, _, attribute = name.rpartition(".")
            setattr(model.get_submodule(parent), attribute, layer.get_base_layer())
    for mark in ("peft_config", "_hf_peft_config_loaded"):
        model.__dict__.pop(mark, None)
    return model
