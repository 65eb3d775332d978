"""DINOv2's 14-pixel patches to 16: `FILE.pth` becomes `FILE_14to16.pth`, as the original's script of this name does.

For those who come with the published instructions: `python conversion/convert_14to16.py FILE.pth`. The command
`vit-adapter convert` reads DINOv2 files directly and does not need this step.
"""

import argparse
import sys
from pathlib import Path

import torch

try:
    from vit_adapter.conversion.mapping import State, expand, match
    from vit_adapter.conversion.model_folder import write_checkpoint
    from vit_adapter.conversion.patch_embedding import resize_patches
    from vit_adapter.conversion.source_files import SourceError, read_source
except ModuleNotFoundError as error:
    if error.name != "vit_adapter":
        raise
    sys.exit("error: the package vit_adapter is not installed: run `pip install -e .` in the repository first")

PATCH_KERNEL = "patch_embed.proj.weight"


def patches_14_to_16(state: State) -> dict[str, torch.Tensor]:
    """A DINOv2 state dict as the original's detector reads it: a kernel of 16 x 16, layer scale under other names.

    The mask token is dropped, everything else is passed on, the position embeddings of 37 x 37 patches as they are.

    Raises: ValueError: no DINOv2 state dict with patches of 14 pixels.
    """
    if "blocks.0.ls1.gamma" not in state or PATCH_KERNEL not in state:
        raise ValueError("no DINOv2 checkpoint: it holds no patch_embed.proj.weight and blocks.0.ls1.gamma")
    kernel = state[PATCH_KERNEL]
    if tuple(kernel.shape[2:]) != (14, 14):
        raise ValueError(f"its patches should have 14 x 14 pixels, but the kernel's shape is {list(kernel.shape)}")
    converted: dict[str, torch.Tensor] = {}
    for name, tensor in state.items():
        layer_scale = match("blocks.{i}.ls{n}.gamma", name)
        if layer_scale is not None:
            converted[expand("blocks.{i}.gamma{n}", layer_scale)] = tensor
        elif name != "mask_token":
            converted[name] = tensor
    converted[PATCH_KERNEL] = resize_patches(kernel, (*kernel.shape[:2], 16, 16))
    return converted


def convert_14to16(path: str | Path) -> Path:
    """Writes `FILE_14to16.pth` beside `FILE.pth`, and returns its path.

    Raises: SourceError: the file cannot be read, is not called .pth, or holds something else. OSError: the disk is
    full, for instance.
    """
    path = Path(path)
    if path.suffix != ".pth":
        raise SourceError(f"{path}: a file called .pth was expected")
    files = read_source(path)
    try:
        converted = patches_14_to_16(files.state)
    except ValueError as error:
        raise SourceError(f"{path}: {error}") from error
    out = path.with_name(path.stem + "_14to16.pth")
    write_checkpoint(out, converted)
    return out


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="convert_14to16", description=__doc__.splitlines()[0])
    parser.add_argument("filename", type=Path, help="a DINOv2 checkpoint, for instance dinov2_vits14_pretrain.pth")
    try:
        print(convert_14to16(parser.parse_args(arguments).filename))
    except (SourceError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
