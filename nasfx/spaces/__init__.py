"""Published search spaces as ordinary models, one module each.

A space is a `torch.nn.Module` made of `nasfx.LayerChoice` and `nasfx.InputChoice`: it runs as it
is, and `nasfx.transform`, `nasfx.search` and `nasfx.finalize` take it. Each module also reads the
notation of its paper, and holds published architectures by name.

- `darts`: the cells of DARTS, for CIFAR and ImageNet.
- `enas`: the macro and the micro space of ENAS.
- `nasbench201`: the 15,625 cells of NAS-Bench-201.
- `pfld`: the landmark detector that FBNet was applied to.
- `proxyless`: the inverted bottlenecks of ProxylessNAS.
- `shufflenet`: the ShuffleNetV2 blocks of single path one-shot.

Example:
    >>> import nasfx
    >>> from nasfx.spaces import darts
    >>> nasfx.search_space(darts.cifar(channels=4, cells=3)).size == (180 * 7**8) ** 2
    True
"""

from nasfx.spaces import darts, enas, nasbench201, pfld, proxyless, shufflenet

__all__ = ["darts", "enas", "nasbench201", "pfld", "proxyless", "shufflenet"]
