"""The draft that a base is: the target's own modules, whose linear maps multiply with the low-bit copies of its matrices.

A layer whose parameters are resident as they compute has no base, and drafts with those: each linear map takes the one or the
other, whichever a pass binds. Knows neither where weights lie nor what a text is.
"""

import copy
from collections.abc import Collection, Mapping
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import nn

from ..coding.base_kinds import BaseKind
from ..coding.base_layout import Base, base_parts, base_prefix
from ..coding.base_product import base_product
from ..errors import ModelError
from .architecture import Architecture
from .attention import ATTENTION
from .probe import probe_layers
from .transformers_api import build_on_meta

WEIGHT = "weight"
PREFIX = base_prefix(WEIGHT)


class BaseLinear(nn.Module):
    """An nn.Linear that multiplies with `weight` where that is bound, [N, K], and with its base where it is not."""

    def __init__(self, linear: nn.Linear, kind: BaseKind, *, kernels: bool) -> None:
        super().__init__()
        self._kind, self._kernels = kind, kernels
        shape = linear.out_features, linear.in_features
        self.weight = nn.Parameter(linear.weight.new_empty(0), requires_grad=False)
        self._names: dict[str, str] = {}  # of the fields of Base
        for part in base_parts(WEIGHT, shape, kind):
            parameter = nn.Parameter(
                torch.empty(part.shape, dtype=part.dtype, device=linear.weight.device), requires_grad=False
            )
            self.register_parameter(part.name, parameter)
            self._names[part.name.removeprefix(PREFIX)] = part.name
        self.bias = linear.bias

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[..., N] of `x` [..., K]."""
        if self.weight.numel():
            return F.linear(x, self.weight, self.bias)
        base = Base(**{field: self.get_parameter(name) for field, name in self._names.items()})
        product = base_product(x, base, self._kind, kernels=self._kernels)
        return product if self.bias is None else product.add_(self.bias)


def parameter_forms(layer: nn.Module) -> tuple[Mapping[str, nn.Parameter], ...]:
    """What a pass may bind of `layer`, all of one of these: its parameters by name. Where it has bases, they are the first, and
    the parameters as they compute the second; a form leaves out what belongs to the other."""
    parameters = dict(layer.named_parameters())
    maps = [name for name, module in layer.named_modules() if isinstance(module, BaseLinear)]
    if not maps:
        return (parameters,)
    weights = {f"{name}.{WEIGHT}" for name in maps}
    bases = {name for name in parameters if name.rpartition(".")[2].startswith(PREFIX)}
    return (
        {name: parameter for name, parameter in parameters.items() if name not in weights},
        {name: parameter for name, parameter in parameters.items() if name not in bases},
    )


def base_architecture(architecture: Architecture, kind: BaseKind, bases: Collection[str], *, kernels: bool) -> Architecture:
    """`architecture` on the meta device anew, in which each matrix of a decoder layer that `bases` names, in full, is a base of
    `kind`. Its `layer_shapes` are those of the parameters that bases stand for. `kernels`: on a device that has Triton.

    ModelError for a family whose layers hold other matrices than those of linear maps, or that uses them otherwise than by
    calling the map.
    """
    model = build_on_meta(copy.deepcopy(architecture.config), ATTENTION)
    model.eval()
    made: dict[str, BaseLinear] = {}
    for name in bases:
        owner, _, key = name.rpartition(".")
        module = model.get_submodule(owner)
        if type(module) is not nn.Linear or key != WEIGHT:
            raise _no_draft(f"{name} is not the matrix of a linear map", architecture)
        made[owner] = BaseLinear(module, kind, kernels=kernels)
    called: set[str] = set()
    hooks = []
    for owner, base in made.items():
        model.set_submodule(owner, base)
        hooks.append(base.register_forward_hook(lambda _module, _args, _output, owner=owner: called.add(owner)))
    try:
        probe_layers(model, architecture.rope, architecture.num_layers)
    except ValueError as error:
        raise _no_draft(str(error), architecture) from error
    finally:
        for hook in hooks:
            hook.remove()
    if unused := sorted(made.keys() - called):
        raise _no_draft(f"its layers do not call {unused[0]}", architecture)
    return replace(architecture, model=model)


def _no_draft(reason: str, architecture: Architecture) -> ModelError:
    return ModelError(
        f"{architecture.config.model_type} cannot draft with a low-bit copy of itself: {reason}",
        where="--draft-model",
        cure="name a smaller model of its family, or none",
    )
