"""Digits as most scripts read them: torchvision's MNIST, its transforms and a DataLoader.

Written for this comparison, after the usual example; not anybody's code.
"""

from torch.utils.data import DataLoader
from torchvision import transforms
from torchvision.datasets import MNIST


def mnist(root, normalize=True, pad=0):
    """The training digits from ``root/MNIST/raw``, in [-1, 1] with ``normalize`` and else in [0, 1]."""
    steps = [transforms.ToTensor()]
    if pad:
        steps.insert(0, transforms.Pad(pad))
    if normalize:
        steps.append(transforms.Normalize((0.5,), (0.5,)))
    return MNIST(root, train=True, download=False, transform=transforms.Compose(steps))


def binary_mnist(root):
    """The training digits with every pixel 0 or 1: thresholded once, here, so that no batch pays for it."""
    dataset = mnist(root, normalize=False)
    dataset.data = (dataset.data > 127).byte() * 255
    return dataset


def batches(dataset, batch_size, drop_last=False):
    """Shuffled batches of images and labels; training drops the incomplete last one, as the course's loop does."""
    return DataLoader(dataset, batch_size=batch_size, shuffle=True, num_workers=0, drop_last=drop_last)


def read_epoch(loader):
    """Go through the data once; returns how many images there were, and the last batch."""
    count = 0
    for batch in loader:
        count += len(batch[0])
    return count, *batch
