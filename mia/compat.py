"""Make `import torchvision` work next to a CPU build of torch.

PyPI's torchvision is linked against CUDA. Beside a CPU torch its compiled operators cannot be loaded, torchvision
swallows that error, and then dies registering fake kernels for operators that were never defined
("operator torchvision::nms does not exist"). transformers, diffusers and open_clip all import torchvision, so
they die with it. Defining the two missing operator schemas, without any kernel, is enough: nothing here calls them.
"""

from __future__ import annotations

import functools
import importlib.util
import pathlib

_keep_alive: list[object] = []  # the definitions vanish when the Library object is collected


@functools.cache
def ensure_torchvision() -> str:
    """`native`, `shimmed` or `absent`: how torchvision's operators came to be. Call before importing torchvision."""
    import torch

    spec = importlib.util.find_spec("torchvision")
    if spec is None or not spec.submodule_search_locations:
        return "absent"
    library = next(pathlib.Path(spec.submodule_search_locations[0]).glob("_C*.so"), None)
    try:
        if library is None:
            raise OSError("torchvision has no compiled extension")
        torch.ops.load_library(str(library))
        return "native"
    except OSError:
        shim = torch.library.Library("torchvision", "FRAGMENT")
        for operator in ("nms", "qnms"):
            shim.define(f"{operator}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        _keep_alive.append(shim)
        return "shimmed"
