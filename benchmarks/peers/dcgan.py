"""A convolutional GAN of 32 x 32 images as most scripts have it: sigmoid and BCELoss, one backward pass for real and
one for generated images.

Written for this comparison, after the usual example; not anybody's code. The layers are the course's.
"""

import torch
from torch import nn


class Generator(nn.Module):
    def __init__(self, z_dim=100, width=64):
        super().__init__()
        self.main = nn.Sequential(
            nn.ConvTranspose2d(z_dim, width * 4, 4, 1, 0, bias=False),  # 4 x 4
            nn.BatchNorm2d(width * 4),
            nn.ReLU(True),
            nn.ConvTranspose2d(width * 4, width * 2, 4, 2, 1, bias=False),  # 8 x 8
            nn.BatchNorm2d(width * 2),
            nn.ReLU(True),
            nn.ConvTranspose2d(width * 2, width, 4, 2, 1, bias=False),  # 16 x 16
            nn.BatchNorm2d(width),
            nn.ReLU(True),
            nn.ConvTranspose2d(width, 1, 4, 2, 1),  # 32 x 32
            nn.Tanh(),
        )

    def forward(self, z):
        return self.main(z)


class Discriminator(nn.Module):
    def __init__(self, width=64):
        super().__init__()
        self.main = nn.Sequential(
            nn.Conv2d(1, width, 4, 2, 1),  # 16 x 16
            nn.LeakyReLU(0.2, inplace=True),
            nn.Conv2d(width, width * 2, 4, 2, 1, bias=False),  # 8 x 8
            nn.BatchNorm2d(width * 2),
            nn.LeakyReLU(0.2, inplace=True),
            nn.Conv2d(width * 2, width * 4, 4, 2, 1, bias=False),  # 4 x 4
            nn.BatchNorm2d(width * 4),
            nn.LeakyReLU(0.2, inplace=True),
            nn.Conv2d(width * 4, 1, 4, 1, 0),
            nn.Sigmoid(),
        )

    def forward(self, images):
        return self.main(images).view(-1)


def train_step(generator, discriminator, optimizer_g, optimizer_d, real, z_dim=100):
    """One update of each network; returns both losses, the discriminator's as the sum of its two parts."""
    criterion = nn.BCELoss()
    discriminator.zero_grad()
    label = torch.full((real.size(0),), 1.0)
    real_loss = criterion(discriminator(real), label)
    real_loss.backward()
    noise = torch.randn(real.size(0), z_dim, 1, 1)
    generated = generator(noise)
    label.fill_(0.0)
    fake_loss = criterion(discriminator(generated.detach()), label)
    fake_loss.backward()
    d_loss = real_loss + fake_loss
    optimizer_d.step()

    generator.zero_grad()
    label.fill_(1.0)
    g_loss = criterion(discriminator(generated), label)
    g_loss.backward()
    optimizer_g.step()
    return d_loss.item(), g_loss.item()
