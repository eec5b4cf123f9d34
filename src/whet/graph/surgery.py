"""Structural edits: each is done on the network and written to its ledger, so that it replays.

"take" keeps slices of a parameter or buffer (packed or not) and corrects the attributes of its
module; "replace" puts one of a few known modules in a module's place; "gather" does so with one
that holds modules of the network, which move there.
Constants of calls (a pad that feeds a residual add) are corrected at their call site.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.nn.utils.weight_norm import WeightNorm, remove_weight_norm

from whet import packed
from whet.errors import Damaged, Refused
from whet.graph import placeable, sites
from whet.graph.attention import unfolded
from whet.graph.ledger import Edit, Grid, ledger, slices
from whet.graph.placeable import CONVOLUTIONS, NORMS, TRANSPOSED

# what an edit raises on a network, or by a description, that it does not fit
MISFITS = (
    Refused, LookupError, AttributeError, ArithmeticError, RuntimeError, TypeError, ValueError
)  # fmt: skip
# modules whose stated sizes are corrected after a cut
INSTANCE_NORMS = (nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d)
RECURRENT = (nn.LSTM, nn.GRU, nn.RNN)
SIZED = (
    nn.Linear, *CONVOLUTIONS, *TRANSPOSED, *NORMS, nn.GroupNorm, *INSTANCE_NORMS, nn.PReLU,
    nn.Embedding, *RECURRENT,
)  # fmt: skip
# replayed edits may place so many weights, and so many times those of the network
FREE_ELEMENTS, MOST_TIMES = 2**20, 16


def split_name(name: str) -> tuple[str, str]:
    """("layer1.0.conv1", "weight") from "layer1.0.conv1.weight"."""
    path, _, leaf = name.rpartition(".")
    return path, leaf


def tensor_of(model: nn.Module, name: str) -> Tensor:
    """The parameter, buffer or packed weight called `name`."""
    path, leaf = split_name(name)
    return getattr(module_at(model, path), leaf)


def module_at(model: nn.Module, path: str) -> nn.Module:
    """The module at `path`, as get_submodule finds it, without its checks: edits are many."""
    for name in path.split(".") if path else ():
        model = model._modules[name]  # type: ignore[assignment]
    return model


def take(model: nn.Module, name: str, dim: int, keep: list[int], groups: int | None = None) -> None:
    """Keep the slices `keep` of dimension `dim` of the tensor `name`, and write it down.

    Args:
        model: changed in place.
        name: of the tensor.
        dim: of it.
        keep: which slices.
        groups: that a convolution has behind it, if it is known; `keep` tells otherwise.
    """
    path, leaf = split_name(name)
    module: Any = module_at(model, path)
    if isinstance(module, (*CONVOLUTIONS, *TRANSPOSED)) and leaf == "weight" and dim == 0:
        if groups is None:
            groups = _groups(module, keep)
        elif type(groups) is not int or groups < 1 or len(keep) % groups:
            raise ValueError(f"{len(keep)} slices do not fall into {groups} groups")
        module.groups = groups
    elif groups is not None:
        raise ValueError(f"{name} has no groups along dimension {dim}")
    index = torch.tensor(keep, dtype=torch.long)
    form = packed.form_of(module, leaf)
    if form is not None:
        form.take(dim, index)
        _correct_sizes(module)
    else:
        old = getattr(module, leaf)
        new = old.detach().index_select(dim, index)
        if isinstance(old, nn.Parameter):
            new = nn.Parameter(new, old.requires_grad)
        _put_tensor(model, name, new)
    arguments: dict[str, Any] = {"dim": dim, "keep": list(keep)}
    if leaf not in module._non_persistent_buffers_set:
        arguments["stored"] = True
    if groups is not None and groups > 1:
        arguments["groups"] = groups
    ledger(model).edits.append(Edit("take", name, arguments))


def _groups(layer: Any, keep: list[int]) -> int:
    """How many groups a convolution has that keeps these slices of its weight."""
    if layer.groups == 1:
        return 1
    if isinstance(layer, TRANSPOSED):
        return len(keep)
    # depthwise layers lose whole groups, grouped ones as many filters of each
    return len({k // (layer.out_channels // layer.groups) for k in keep})


def _names(model: nn.Module, name: str) -> list[str]:
    """Every name of the tensor or module called `name`.

    The network is searched once, not for each edit: their cost has to grow with the layers.
    """
    book = ledger(model)
    if book.shared is None:
        found: dict[int, list[str]] = {}
        for path, module in model.named_modules(remove_duplicate=False):
            found.setdefault(id(module), []).append(path)
            for own in (module._parameters, module._buffers):
                for leaf, tensor in own.items():
                    if tensor is not None:
                        full = f"{path}.{leaf}" if path else leaf
                        found.setdefault(id(tensor), []).append(full)
        book.shared = {each: names for names in found.values() if len(names) > 1 for each in names}
    return book.shared.get(name, [name])


def _put_tensor(model: nn.Module, name: str, new: Tensor) -> None:
    """Put `new` wherever the tensor `name` is: tied weights stay tied."""
    old = tensor_of(model, name)
    for each in _names(model, name):
        path, leaf = split_name(each)
        module = module_at(model, path)
        for own in (module._parameters, module._buffers):
            if own.get(leaf) is old:
                own[leaf] = new  # type: ignore[assignment]
                _correct_sizes(module)


def _correct_sizes(module: nn.Module) -> None:
    """Make the sizes a module states the sizes its tensors have."""
    if isinstance(module, CONVOLUTIONS):
        out, each = module.weight.shape[:2]
        module.out_channels, module.in_channels = out, each * module.groups
    elif isinstance(module, TRANSPOSED):
        module.in_channels = module.weight.shape[0]
        module.out_channels = module.weight.shape[1] * module.groups
    elif isinstance(module, nn.Linear):
        module.out_features, module.in_features = module.weight.shape
    elif isinstance(module, NORMS):
        known = module.weight if module.weight is not None else module.running_mean
        module.num_features = len(known) if known is not None else module.num_features
    elif isinstance(module, nn.GroupNorm):
        module.num_groups = module.num_groups * len(module.weight) // module.num_channels
        module.num_channels = len(module.weight)
    elif isinstance(module, RECURRENT):
        own = dict(module.named_parameters())
        module.input_size = own["weight_ih_l0"].shape[1]
        module.hidden_size = own["weight_hh_l0"].shape[1]
        module._flat_weights = [getattr(module, name) for name in module._flat_weights_names]
    elif isinstance(module, INSTANCE_NORMS):
        module.num_features = len(module.weight)
    elif isinstance(module, nn.PReLU):
        module.num_parameters = len(module.weight)
    elif isinstance(module, nn.Embedding):
        module.num_embeddings, module.embedding_dim = module.weight.shape


def replace(model: nn.Module, path: str, module: nn.Module) -> None:
    """Put `module` wherever the module at `path` is, and write it down.

    Raises:
        Refused: `path` is the network itself.
    """
    spec = placeable.describe(module)
    old = model.get_submodule(path)
    if old is model:
        raise Refused(
            f"replace {type(model).__name__} by another module",
            "it is the whole network",
            "Wrap it: torch.nn.Sequential(network).",
        )
    module.train(old.training)
    names = _names(model, path)
    for each in names:
        parent, leaf = split_name(each)
        model.get_submodule(parent)._modules[leaf] = module
    if len(names) > 1 or any(True for each in (old, module) for _ in each.children()):
        ledger(model).shared = None  # names below come or go
    ledger(model).edits.append(Edit("replace", path, spec))


def gather(model: nn.Module, path: str, module: nn.Module) -> None:
    """Put `module` where the one at `path` is; what it holds of the network moves along with it.

    Where these stood, an identity is left. Grids and constants of their calls follow them.

    Args:
        model: the network.
        path: of a module that stands in one place; the network itself is none.
        module: a composition, of modules that surgery may place and of modules of the network.

    Raises:
        ValueError: it would hold itself, or what it takes stands in several places.
    """
    before = dict(model.named_modules())
    spec = placeable.describe(module, {each: name for name, each in before.items() if name})
    moves = list(_moves(spec, path))
    for old, _ in moves:
        if not path or path.startswith(f"{old}."):
            raise ValueError(f"{old!r} would move into itself")
        if sum(each == old for each, _ in moves) + len(_names(model, old)) > 2:
            raise ValueError(f"{old!r} stands in several places")
    module.train(before[path].training)
    for name, each in [*((old, nn.Identity()) for old, _ in moves), (path, module)]:
        parent, leaf = split_name(name)
        before[parent]._modules[leaf] = each
    book = ledger(model)
    book.shared = None
    book.grids = {_moved(site, moves): grid for site, grid in book.grids.items()}
    book.constants = {_moved(site, moves): each for site, each in book.constants.items()}
    book.edits.append(Edit("gather", path, spec))


def _moves(spec: Mapping[str, Any], at: str) -> Iterator[tuple[str, str]]:
    """(where it stood, where it stands now) for every module that moves into a composition."""
    if spec["type"] == placeable.MOVED:
        yield spec["path"], at
    for k, child in enumerate(spec.get("children", ())):
        yield from _moves(child, f"{at}.{k}")


def _moved(site: str, moves: list[tuple[str, str]]) -> str:
    """The name of a call whose module may have moved."""
    for old, new in moves:
        if site.startswith((f"{old}/", f"{old}.")):
            return new + site[len(old) :]
    return site


def unfold_attention(model: nn.Module) -> list[str]:
    """Give every MultiheadAttention layers of its own, so that its heads can be cut.

    Returns:
        The paths of those that were replaced. One that is packed, that is the whole network or
        that adds keys of its own stays as it is.
    """
    found = []
    for path, module in list(model.named_modules()):
        if not isinstance(module, nn.MultiheadAttention) or module is model:
            continue
        packs = [form for form in module.modules() if isinstance(form, packed.Packed)]
        twin = None if packs else unfolded(module)
        if twin is not None:
            replace(model, path, twin)
            found.append(path)
    return found


@torch.no_grad()
def plain_weights(model: nn.Module) -> list[str]:
    """Make weights that are computed from others, as by a weight norm, ordinary ones.

    Exact in eval mode. Returns:
        The paths of their modules.
    """
    found = [path for path, module in list(model.named_modules()) if _settle(module)]
    if found:
        ledger(model).edits += [Edit("plain", path, {}) for path in found]
    return found


def _settle(module: nn.Module) -> bool:
    lists = getattr(module, "parametrizations", {})
    own = {str(name) for name in lists if packed.form_of(module, str(name)) is None}
    if own:
        was = module.training
        values = {name: getattr(module.eval(), name).detach().clone() for name in own}
        # by hand: torch would delete the property from the class, which copies share
        module.__class__ = parametrize.type_before_parametrizations(module)
        del module._modules["parametrizations"]
        for name, value in values.items():
            module.register_parameter(name, nn.Parameter(value))
        module.train(was)
    hooks = [h for h in module._forward_pre_hooks.values() if isinstance(h, WeightNorm)]
    for hook in hooks:  # torch.nn.utils.weight_norm, which was there before parametrizations
        remove_weight_norm(module, hook.name)
    return bool(own or hooks)


def set_constant(model: nn.Module, site: str, argument: str, old: Any, new: Any) -> None:
    """Give the call at `site` another constant where it is `old`; see `sites.corrected`."""
    known = ledger(model).constants.setdefault(site, {})
    known[argument] = [known[argument][0] if argument in known else old, new]
    sites.activate(model)


def set_grids(model: nn.Module, grids: Mapping[str, Grid]) -> None:
    """Put activation grids at call sites."""
    ledger(model).grids.update(grids)
    sites.activate(model)


def replay(model: nn.Module, book: Mapping[str, Any]) -> None:
    """Do on a fresh instance what `book`, a ledger's spec, says; weights keep arbitrary values.

    Raises:
        Damaged: an edit does not fit this network.
    """
    room = FREE_ELEMENTS + MOST_TIMES * sum(p.numel() for p in model.parameters())
    for edit in book.get("edits", ()):
        try:
            if edit["kind"] == "take":
                arguments, path = edit["arguments"], edit["path"]
                dim = int(arguments["dim"])
                keep = _kept(model, path, dim, arguments)
                take(model, path, dim, keep, arguments.get("groups"))
            elif edit["kind"] == "plain":
                _settle(model.get_submodule(edit["path"]))
                ledger(model).edits.append(Edit("plain", edit["path"], {}))
            elif edit["kind"] in ("replace", "gather"):
                room -= placeable.elements(edit["arguments"])
                if room < 0:
                    raise ValueError("its edits place far more weights than the network has")
                if edit["kind"] == "replace":
                    replace(model, edit["path"], placeable.construct(edit["arguments"]))
                else:
                    held = {name: each for name, each in model.named_modules() if name}
                    gather(model, edit["path"], placeable.construct(edit["arguments"], held))
            else:
                raise KeyError(edit["kind"])
        except MISFITS as error:
            raise Damaged(
                f"replay the edit {edit.get('kind')!r} of {edit.get('path')!r} "
                f"on {type(model).__name__}",
                f"it does not fit: {error}",
                "Give a fresh instance of the class that was compressed, "
                "built with the same arguments.",
            ) from error
    grids = {site: Grid(**grid) for site, grid in book.get("grids", {}).items()}
    if grids:
        set_grids(model, grids)
    for site, constants in book.get("constants", {}).items():
        for argument, (old, new) in constants.items():
            if not sites.is_correction(site, argument, old, new):
                raise Damaged(
                    f"give the call at {site!r} its corrected constants",
                    f"{argument!r}: {old!r} -> {new!r} is not what a cut leaves",
                    "Copy the file again from where it was written.",
                )
            set_constant(model, site, argument, old, new)


def _kept(model: nn.Module, name: str, dim: int, arguments: Mapping[str, Any]) -> list[int]:
    """The slices that an edit keeps, any where their numbers come later; older files list them."""
    if "keep" in arguments:
        return [int(k) for k in arguments["keep"]]
    runs = [0, arguments["count"]] if "count" in arguments else arguments["runs"]
    return slices(runs, tensor_of(model, name).shape[dim])


@torch.no_grad()
def fold_batchnorm(model: nn.Module, conv_path: str, norm_path: str) -> None:
    """w' = gamma / sqrt(var + eps) * w,  b' = gamma (b - mean) / sqrt(var + eps) + beta.

    The convolution or linear layer takes the scale and shift of the BatchNorm behind it, which
    becomes an identity. Exact in eval mode.
    """
    conv: Any = model.get_submodule(conv_path)
    norm: Any = model.get_submodule(norm_path)
    root = torch.rsqrt(norm.running_var + norm.eps)
    gamma = norm.weight if norm.weight is not None else torch.ones_like(root)
    beta = norm.bias if norm.bias is not None else torch.zeros_like(root)
    bias = conv.bias if conv.bias is not None else torch.zeros_like(root)
    factor = gamma * root
    if isinstance(conv, TRANSPOSED):  # [in, out / groups, ...]
        each = factor.reshape(conv.groups, 1, -1).expand(-1, len(conv.weight) // conv.groups, -1)
        along = each.reshape(*conv.weight.shape[:2], *[1] * (conv.weight.ndim - 2))
    else:
        along = factor.reshape([-1] + [1] * (conv.weight.ndim - 1))
    weight = conv.weight * along
    with torch.random.fork_rng(devices=[]):  # a new layer draws weights, which are not kept
        twin: Any = placeable.construct(placeable.describe(conv) | {"bias": True}).to(conv.weight)
    twin.weight.copy_(weight)
    twin.bias.copy_((bias - norm.running_mean) * factor + beta)
    form = packed.form_of(conv)
    if form is not None:
        packed.install(twin, "weight", form.scaled(factor))
    replace(model, conv_path, twin)
    replace(model, norm_path, nn.Identity())


def parameters_of(model: nn.Module) -> Iterable[tuple[str, Tensor]]:
    """Every distinct weight by full name, packed ones as their dense value."""
    seen: set[int] = set()
    for path, module in model.named_modules():
        if isinstance(module, (parametrize.ParametrizationList, packed.Packed)):
            continue
        names = list(module._parameters) + list(getattr(module, "parametrizations", {}))
        for name in names:
            key = id(module._parameters.get(name, module))
            value = getattr(module, name)
            if value is None or (key in seen and name in module._parameters):
                continue
            seen.add(key)
            yield (f"{path}.{name}" if path else name), value.detach()


def structure(model: nn.Module) -> dict[str, Any]:
    """Everything but numbers: the ledger, and the forms with their shapes."""
    shapes = {
        (f"{path}.{name}" if path else name): {
            "spec": form.spec(),
            "shape": list(getattr(model.get_submodule(path), name).shape),
        }
        for path, name, form in packed.forms(model)
    }
    return ledger(model).spec() | {"forms": shapes}
