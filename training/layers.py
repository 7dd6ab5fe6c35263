"""The layers of a backbone, from its input to its output: what layer-wise learning rates count by."""

from __future__ import annotations

from torch import nn


def layers(backbone: nn.Module) -> list[list[str]]:
    """Names of the backbone's parameters, layer by layer from the input on; each stands once.

    A layer is a block that repeats (a residual, an inverted-residual or a transformer block), or what stands alone
    before, between or after these: a first convolution, a downsampling. A lone normalisation belongs to the layer
    before it; parameters that belong to no layer, such as position embeddings, to the first.
    """
    found: list[list[str]] = []
    for prefix, module in _blocks(backbone, "", is_root=True):
        names = [f"{prefix}.{name}" for name, _ in module.named_parameters()]
        if not names:
            continue
        if found and not any(parameter.ndim > 1 for parameter in module.parameters()):
            found[-1] += names
        else:
            found.append(names)
    placed = {name for names in found for name in names}
    loose = [name for name, _ in backbone.named_parameters() if name not in placed]
    if not found:
        return [loose]
    found[0][:0] = loose
    return found


def _blocks(module: nn.Module, prefix: str, *, is_root: bool = False) -> list[tuple[str, nn.Module]]:
    blocks: list[tuple[str, nn.Module]] = []
    for name, child in module.named_children():
        path = f"{prefix}.{name}" if prefix else name
        # Below the root, a module of another class that holds a row of blocks, such as a transformer's encoder, too.
        holds_row = is_root and any(_is_row(grandchild) for grandchild in child.children())
        if _is_row(child) or (holds_row and not isinstance(module, nn.Sequential)):
            blocks += _blocks(child, path)
        else:
            blocks.append((path, child))
    return blocks


def _is_row(module: nn.Module) -> bool:
    """Whether a module only puts others, which have parts themselves, in a row; subclasses are blocks of their own."""
    return type(module) in {nn.Sequential, nn.ModuleList} and any(
        next(child.children(), None) is not None for child in module.children()
    )
