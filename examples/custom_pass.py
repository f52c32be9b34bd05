"""A pass of your own: dropout on skip connections while searching.

Candidates without parameters are ready at once, those with weights only after some training, so a
search by gradient descent likes skip connections too much, too early. P-DARTS (arXiv 1904.12760,
section 3.3) puts dropout behind them during the search. That is one small pass here, handed to
`transform`: no strategy and no model knows about it, and the final network has no trace of it.

Run it: python examples/custom_pass.py
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

import nasfx
from nasfx import LayerChoice
from nasfx.ops import SUPERNET, mix
from nasfx.rewriting.graph import free_name, graphs, provenance, set_provenance
from nasfx.rewriting.passes import Exactness, Pass, PassContext
from nasfx.rewriting.verifier import Stage


@dataclass(frozen=True)
class DropSkips(Pass):
    """Put dropout between a choice's input and the mixture where a candidate is a skip connection.

    Rule::

        %y = nasfx.ops.mix(%gate, [%conv, %x], label='block')
        ->
        %drop = call_module[_drop_skips](%x)
        %y = nasfx.ops.mix(%gate, [%conv, %drop], label='block')

    A module, not F.dropout: it follows train() and eval(). Declines mixtures of tuples and
    dictionaries.

    Attributes:
        probability: of an element to be zeroed.
    """

    probability: float = 0.3

    name: ClassVar[str] = "drop-skips"
    consumes: ClassVar[Stage] = SUPERNET
    produces: ClassVar[Stage] = SUPERNET
    exactness: ClassVar[Exactness] = Exactness.APPROXIMATE

    def run(self, gm: fx.GraphModule, ctx: PassContext) -> bool:
        """Rewrite every mixture of every graph."""
        changed = False
        for _, inner in graphs(gm):
            for node in inner.graph.find_nodes(op="call_function", target=mix):
                _, outputs = node.args
                if not all(isinstance(output, fx.Node) for output in outputs):
                    ctx.skip(node, "its candidates do not give single tensors")
                    continue
                # What no candidate computed is the choice's input itself.
                label = provenance(node).label
                skips = [o for o in outputs if provenance(o).label != label]
                for skip in skips:
                    name = free_name(inner, "_drop_skips")
                    inner.add_module(name, nn.Dropout(self.probability))
                    with inner.graph.inserting_before(node):
                        dropped = inner.graph.call_module(name, (skip,))
                    set_provenance(dropped, provenance(node), made_by="")
                    node.replace_input_with(skip, dropped)
                changed |= bool(skips)
        return changed


def conv(channels: int, kernel: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(channels, channels, kernel, padding=kernel // 2, bias=False),
        nn.BatchNorm2d(channels),
        nn.ReLU(),
    )


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = conv(3, 3)
        self.block1 = LayerChoice({"conv3": conv(3, 3), "skip": nn.Identity()}, label="block1")
        self.block2 = LayerChoice({"conv5": conv(3, 5), "skip": nn.Identity()}, label="block2")
        self.head = nn.Linear(3, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.block2(self.block1(self.stem(x)))
        return self.head(x.mean((2, 3)))


def main() -> None:
    torch.manual_seed(0)
    net = nasfx.transform(Net(), "darts", extra_passes=[DropSkips(0.5)])
    print(net.history)
    print("\nWhat drop-skips changed:\n")
    print(net.history.diff(-2, -1))

    weights, alphas = torch.optim.SGD(net.weight_parameters(), 0.05), net.arch_optimizer()
    for _ in range(3):
        x, y = torch.randn(8, 3, 8, 8), torch.randint(10, (8,))
        with net.arch_step():
            net.objective(F.cross_entropy(net(x), y)).backward()
        alphas.step()
        alphas.zero_grad()
        with net.weight_step():
            F.cross_entropy(net(x), y).backward()
        weights.step()
        weights.zero_grad()

    subnet = nasfx.finalize(net, {"block1": "skip", "block2": "conv5"})
    kept = [type(m).__name__ for m in subnet.modules() if isinstance(m, nn.Dropout)]
    print(f"\nDropout in the final network: {kept or 'none'}")


if __name__ == "__main__":
    main()
