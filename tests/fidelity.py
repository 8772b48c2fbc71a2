"""torch-fidelity for the tests, where its own dependency torchvision is not installed; InceptionV3 with random weights."""

import importlib.util
import io
import sys
import types

import pytest
import torch

NEEDED = {"torchvision": (), "torchvision.datasets": ("CIFAR10", "STL10", "CIFAR100"), "torchvision.transforms": (),
          "torchvision.transforms.functional": (), "torchvision.models": ()}  # fmt: skip


def load():
    """The package. It imports torchvision for data sets and VGG, which nothing here uses: an empty one stands in while it does."""
    if importlib.util.find_spec("torch_fidelity") is None:
        pytest.skip("needs torch-fidelity: pip install --no-deps torch-fidelity")
    if importlib.util.find_spec("torchvision") is None and "torch_fidelity" not in sys.modules:
        modules = {name: types.ModuleType(name) for name in NEEDED}
        for name, classes in NEEDED.items():
            for kind in classes:
                setattr(modules[name], kind, type(kind, (), {}))
            parent, _, child = name.rpartition(".")
            if parent:
                setattr(modules[parent], child, modules[name])
        sys.modules.update(modules)
        try:
            importlib.import_module("torch_fidelity")
        finally:
            for name in modules:
                del sys.modules[name]
    return importlib.import_module("torch_fidelity")


def inception(seed=0):
    """torch-fidelity's InceptionV3 with random weights that keep pictures apart."""
    load()
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

    class Blank(FeatureExtractorInceptionV3):
        def load_state_dict(self, state):
            """What was given is empty."""

    empty = io.BytesIO()
    torch.save({}, empty)
    empty.seek(0)
    torch.manual_seed(seed)
    network = Blank("inception-v3-compat", ["2048"], feature_extractor_weights_path=empty)
    for module in network.modules():  # the variance of the signal stays what it was, layer by layer
        if isinstance(module, torch.nn.Conv2d):
            torch.nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
    return network
