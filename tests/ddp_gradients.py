"""Run under torchrun: the gradients that DistributedDataParallel gives replaced networks are one process's of the whole batch."""

import copy

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn

import fastconv
from fastconv.models._torchvision import import_torchvision

# Norms in eval mode: in training each process normalises by its own share, and no gradient is that of the whole batch.
CASES = (("squeezenet1_1", True), ("mobilenet_v2", False))


def main() -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    rank, world = dist.get_rank(), dist.get_world_size()
    for net, mode in CASES:
        torch.manual_seed(0)
        alone = fastconv.replace(import_torchvision().models.get_model(net, num_classes=10, dropout=0.0)).train(mode)
        for module in alone.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.running_mean.normal_(0, 0.1)
                module.running_var.uniform_(0.5, 1.5)
        model = nn.parallel.DistributedDataParallel(copy.deepcopy(alone))
        x, target = torch.randn(8, 3, 64, 64), torch.randint(10, (8,))
        for accumulated in (1, 2):  # the second adds to the first
            F.cross_entropy(alone(x), target).backward()
            F.cross_entropy(model(x[rank::world]), target[rank::world]).backward()
            for (key, parameter), shared in zip(alone.named_parameters(), model.parameters(), strict=True):
                off = (shared.grad - parameter.grad).norm() / parameter.grad.norm()
                # Two sums of half the terms, rounded once more: on average below 2^-24 sqrt(terms), with 8 * 32 * 32 terms at most.
                assert off < 2**-24 * (8 * 32 * 32) ** 0.5 * 4, f"{net} {key}: {off:.3g} apart after {accumulated}"
                assert parameter.grad.norm() > 0, key
    if rank == 0:
        print(f"equal on {world} processes: {', '.join(net for net, _ in CASES)}")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
