"""A GAN of dense layers as most scripts have it: sigmoid and BCELoss against tensors of ones and zeros.

Written for this comparison, after the usual example; not anybody's code. The layers are the course's.
"""

import torch
from torch import nn


class Generator(nn.Module):
    def __init__(self, z_dim=64):
        super().__init__()
        self.model = nn.Sequential(
            nn.Linear(z_dim, 256),
            nn.ReLU(),
            nn.Linear(256, 512),
            nn.ReLU(),
            nn.Linear(512, 784),
            nn.Tanh(),
        )

    def forward(self, z):
        return self.model(z).view(z.size(0), 1, 28, 28)


class Discriminator(nn.Module):
    def __init__(self):
        super().__init__()
        self.model = nn.Sequential(
            nn.Linear(784, 512),
            nn.LeakyReLU(0.2),
            nn.Linear(512, 256),
            nn.LeakyReLU(0.2),
            nn.Linear(256, 1),
            nn.Sigmoid(),
        )

    def forward(self, images):
        return self.model(images.view(images.size(0), -1))


def train_step(generator, discriminator, optimizer_g, optimizer_d, real, z_dim=64):
    """One update of each network; returns both losses, the discriminator's halved as usual."""
    criterion = nn.BCELoss()
    valid = torch.ones(real.size(0), 1)
    fake = torch.zeros(real.size(0), 1)
    z = torch.randn(real.size(0), z_dim)
    generated = generator(z)

    optimizer_d.zero_grad()
    real_loss = criterion(discriminator(real), valid)
    fake_loss = criterion(discriminator(generated.detach()), fake)
    d_loss = (real_loss + fake_loss) / 2
    d_loss.backward()
    optimizer_d.step()

    optimizer_g.zero_grad()
    g_loss = criterion(discriminator(generated), valid)
    g_loss.backward()
    optimizer_g.step()
    return d_loss.item(), g_loss.item()


def train(step, generator, discriminator, optimizer_g, optimizer_d, loader, steps):
    """The first ``steps`` steps of an epoch; returns their losses."""
    losses = []
    for i, (real, _) in enumerate(loader):
        losses.append(step(generator, discriminator, optimizer_g, optimizer_d, real))
        if i + 1 == steps:
            break
    return losses
